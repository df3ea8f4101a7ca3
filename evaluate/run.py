"""Evaluate runs on a store's eval split: what is done already is kept, the rest shares one pass, results go to JSON."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcsae import __version__
from tcsae.evaluate import metrics, tail_metrics
from tcsae.evaluate.baselines import DEFINITIONS as BASELINE_DEFINITIONS
from tcsae.evaluate.baselines import ConstantOutput
from tcsae.evaluate.one_pass import Measured, SaeOutput, System, measure
from tcsae.shared.config import to_dict
from tcsae.shared.console import progress, say
from tcsae.shared.errors import RunError, StoreError, TcsaeError
from tcsae.shared.files import file_digest, write_json
from tcsae.shared.runs import EVALUATION, find_runs, is_finished, load_evaluation
from tcsae.shared.sae import RECORD, WEIGHTS, SparseAutoencoder, load_record, load_sae
from tcsae.shared.store import Store
from tcsae.shared.tail import Tail

UNTRAINED = "logged-"
"""Presets whose SAEs are not trained on purpose: the only ones with 0 steps that get figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """What a run's figures depend on besides its weights, the store and the definitions."""

    hook: str
    skip_first: int
    """First positions of each sequence that are not counted; the run's own setting in training."""
    split: str = "eval"


class Candidate(NamedTuple):
    """A run that fits the store."""

    path: Path
    record: dict[str, Any]
    options: EvalOptions


class Loaded(NamedTuple):
    """A run about to be evaluated."""

    run: Candidate
    sae: SparseAutoencoder
    weights: str
    """sha256 of the file that the SAE was loaded from."""


class Evaluated(NamedTuple):
    """What `evaluate_runs` has to say."""

    evaluations: list[dict[str, Any]]
    """What each run's eval.json holds, in the order asked for."""
    refused: list[str]
    """One line for each run that gets no figures, and why."""


def evaluate_runs(store: Store, runs_path: Path, names: Collection[str] = (), force: bool = False) -> Evaluated:
    """Evaluate the named runs (without names: all) and write each one's eval.json.

    Kept as it is: an eval.json of the same weights, store content, options and definition version, unless `force`.
    Raises RunError if there is no run, or none of a given name; StoreError if the eval split is empty or damaged.
    """
    folders = _finished(find_runs(runs_path, names), runs_path, named=bool(names))
    evaluations: dict[Path, dict[str, Any]] = {}
    groups: dict[EvalOptions, list[Loaded]] = {}
    refused: list[str] = []
    for path in folders:
        try:
            candidate = _candidate(store, path)
            found = None if force else _done_before(store, candidate)
            if found:
                evaluations[path] = found | {"name": path.name}  # the folder may have been renamed since
            else:
                groups.setdefault(candidate.options, []).append(_load(candidate))
        except TcsaeError as error:
            refused.append(f"{path.name}: {error}")
    if evaluations:
        say(f"Evaluated already: {', '.join(path.name for path in evaluations)}. Do it again with --force.")
    for options, group in groups.items():
        for loaded, evaluation in zip(group, _evaluate(store, options, group), strict=True):
            write_json(loaded.run.path / EVALUATION, evaluation)
            evaluations[loaded.run.path] = evaluation
    return Evaluated([evaluations[path] for path in folders if path in evaluations], refused)


def _finished(folders: Sequence[Path], runs_path: Path, named: bool) -> list[Path]:
    unfinished = [path for path in folders if not is_finished(path)]
    if unfinished and (named or len(unfinished) == len(folders)):
        raise RunError(
            f"{unfinished[0]} has no {RECORD}: its training is unfinished. Go on: tcsae --runs {runs_path} train"
        )
    for path in unfinished:
        say(f"{path.name}: skipped, its training is unfinished (no {RECORD}).")
    return [path for path in folders if path not in unfinished]


def _candidate(store: Store, path: Path) -> Candidate:
    """The run at `path`. Raises RunError if it was never trained or does not fit the store, StoreError for its hook."""
    record = load_record(path)
    try:
        preset, hook, d_sae_reads = record["preset"], record["hook"], record["sae"]["d_model"]
        steps, skip_first = record["steps"], record["train"]["data"]["skip_first"]
        _ = record["tokens"], record["store"]["content"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{path / RECORD} lacks {error}: it is damaged, or no run of ours. Train it again.") from error
    if steps == 0 and not preset.startswith(UNTRAINED):
        raise RunError(f"no figures: its SAE has taken 0 optimiser steps. Train it, or use a {UNTRAINED}* preset.")
    d_store = store.d_model(hook)
    if d_sae_reads != d_store:
        raise RunError(
            f"its SAE reads d_model {d_sae_reads}, but {hook} in {store.location} has d_model {d_store}. "
            "Evaluate it on a store of its own model, or name the runs that fit with --run."
        )
    return Candidate(path, record, EvalOptions(hook=hook, skip_first=skip_first))


def _done_before(store: Store, candidate: Candidate) -> dict[str, Any] | None:
    found = load_evaluation(candidate.path, store.content)
    if found is None or found.get("definition_version") != metrics.DEFINITION_VERSION:
        return None
    # A tail that could not be read may have been put back.
    tail_is_back = found.get("no_tail") and "none" not in store.manifest.tails.get(candidate.options.hook, {"none": ""})
    return found if found.get("options") == to_dict(candidate.options) and not tail_is_back else None


def _load(run: Candidate) -> Loaded:
    """Load a run's SAE. Raises RunError, naming the tensor, if a weight is NaN or infinite."""
    sae = load_sae(run.path)
    for name, tensor in sae.tensors().items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise RunError(f"{bad} values of {name} in {WEIGHTS} are NaN or infinite. Train it again.")
    return Loaded(run, sae, file_digest(run.path / WEIGHTS))


def _evaluate(store: Store, options: EvalOptions, group: Sequence[Loaded]) -> list[dict[str, Any]]:
    """One pass for all runs of a group; their evaluations in the same order."""
    split = store.split(options.split)
    if not (split.lengths > options.skip_first).any():
        raise StoreError(
            f"{store.location}: its {options.split} split has no position from {options.skip_first} on in "
            f"{split.n_sequences} sequences. Harvest more tokens, or a larger share for it (--eval-every)."
        )
    tail, no_tail = _tail(store, options.hook)
    mean = torch.from_numpy(store.array(f"statistics/{options.hook}/mean")[:]).float()
    baselines = {"zero_output": ConstantOutput(torch.zeros_like(mean)), "mean_output": ConstantOutput(mean)}
    systems: list[System] = [*baselines.values(), *(SaeOutput(loaded.sae) for loaded in group)]
    title, start = f"eval {len(group)} SAE{'s' * (len(group) > 1)}", time.monotonic()
    with progress(title, total=split.n_tokens) as advance:
        measured = measure(split, options.hook, options.skip_first, systems, tail, advance)
    rows = _figures(measured)
    common = {
        "definition_version": metrics.DEFINITION_VERSION,
        "store": {"location": store.location, "content": store.content},
        "options": to_dict(options),
        "n_sequences": split.n_sequences,
        "n_documents": split.n_documents,
        "n_tokens": measured.counted[0].n_tokens,
        "n_tokens_skipped": measured.skipped[0].n_tokens,
        "n_predictions": measured.n_predictions,
        "no_tail": no_tail,
        "baselines": dict(zip(baselines, rows, strict=False)),
        "definitions": metrics.DEFINITIONS | tail_metrics.DEFINITIONS | BASELINE_DEFINITIONS,
        "seconds": round(time.monotonic() - start, 2),
        "seconds_shared_by": len(group),
        "libraries": {"tcsae": __version__, "torch": torch.__version__},
    }
    own = zip(group, rows[len(baselines) :], strict=True)
    return [_about(loaded, store) | {"metrics": row} | common for loaded, row in own]


def _about(loaded: Loaded, store: Store) -> dict[str, Any]:
    path, record, _ = loaded.run
    trained_on = record["store"]["content"]
    if trained_on != store.content:
        say(f"{path.name}: trained on another store (content {trained_on[:12]}), evaluated on this one.")
    return {
        "name": path.name,
        "preset": record["preset"],
        "sae": record["sae"],
        "steps": record["steps"],
        "tokens": record["tokens"],
        "weights": loaded.weights,
        "trained_on": trained_on,
    }


def _tail(store: Store, hook: str) -> tuple[Tail | None, str | None]:
    """The tail after `hook`, or None and why there is none: every figure but the cross-entropies does without."""
    try:
        return Tail.load(store.tail_path(hook)), None
    except TcsaeError as error:
        return None, str(error)


def _figures(measured: Measured) -> list[dict[str, float | None]]:
    """Each system's figures. The first two are the zero and the mean output."""
    losses = measured.losses
    rows = []
    for i, (counted, skipped) in enumerate(zip(measured.counted, measured.skipped, strict=True)):
        if losses is None:
            ce = tail_metrics.ce_figures(None, None, None, None)
        else:
            ce = tail_metrics.ce_figures(losses.clean, losses.zero, losses.systems[1], losses.systems[i])
        rows.append(metrics.figures(counted, skipped) | ce)
    return rows
