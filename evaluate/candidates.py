"""Which folders below --runs are evaluated, with which options, and what of that is done already."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tcsae.evaluate import metrics
from tcsae.evaluate.foreign import foreign_config, is_foreign, load_foreign
from tcsae.shared.config import to_dict
from tcsae.shared.console import say
from tcsae.shared.errors import RunError, TcsaeError
from tcsae.shared.files import file_digest
from tcsae.shared.runs import find_runs, is_finished, load_evaluation
from tcsae.shared.sae import RECORD, WEIGHTS, SparseAutoencoder, load_record, load_sae
from tcsae.shared.store import Store

UNTRAINED = "logged-"
"""Presets whose SAEs are not trained on purpose: the only ones with 0 steps that get figures."""
FOREIGN_SKIP_FIRST = 1
"""Positions left out for an SAE that says nothing of it: our own default in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """What a run's figures depend on besides its weights, the store and the definitions."""

    hook: str
    skip_first: int
    """First positions of each sequence that are not counted; by default the run's own setting in training."""
    splice: Literal["counted", "all"] = "counted"
    """Where xhat stands when the tail reads it: `tail_metrics.SPLICES`."""
    temporal: bool = True
    """Whether temporal and position measures are taken."""
    baselines: bool = False
    """Whether the baselines that have the size of an SAE are scored."""
    split: str = "eval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for on the command line."""

    names: Collection[str] = ()
    """Runs; none: all."""
    force: bool = False
    skip_first: int | None = None
    """None: each run's own."""
    splice: Literal["counted", "all"] = "counted"
    temporal: bool = True
    baselines: bool = False


class Candidate(NamedTuple):
    """A run that fits the store."""

    path: Path
    record: dict[str, Any]
    """tcsae.json, or for a foreign SAE the little that is known."""
    options: EvalOptions


class Loaded(NamedTuple):
    """A run about to be evaluated."""

    run: Candidate
    sae: SparseAutoencoder
    weights: str
    """sha256 of the file that the SAE was loaded from."""


def evaluable(runs_path: Path, names: Collection[str]) -> list[Path]:
    """Folders with a finished run or a foreign SAE. Raises RunError if there is none, or a named one is unfinished."""
    folders = find_runs(runs_path, names)
    unfinished = [path for path in folders if not is_finished(path) and not is_foreign(path)]
    if unfinished and (names or len(unfinished) == len(folders)):
        raise RunError(
            f"{unfinished[0]} has no {RECORD}: its training is unfinished. Go on: tcsae --runs {runs_path} train"
        )
    for path in unfinished:
        say(f"{path.name}: skipped, its training is unfinished (no {RECORD}).")
    return [path for path in folders if path not in unfinished]


def candidate(store: Store, path: Path, request: Request) -> Candidate:
    """The run at `path`. Raises RunError if it was never trained or does not fit the store, StoreError for its hook."""
    record = _foreign_record(store, path) if is_foreign(path) else load_record(path)
    try:
        preset, hook, width = record["preset"], record["hook"], record["sae"]["d_model"]
        steps, skip_first = record["steps"], record["train"]["data"]["skip_first"]
        _ = record["tokens"], record["store"]["content"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{path / RECORD} lacks {error}: it is damaged, or no run of ours. Train it again.") from error
    if steps == 0 and not preset.startswith(UNTRAINED):
        raise RunError(f"no figures: its SAE has taken 0 optimiser steps. Train it, or use a {UNTRAINED}* preset.")
    d_store = store.d_model(hook)
    if width != d_store:
        raise RunError(
            f"its SAE reads d_model {width}, but {hook} in {store.location} has d_model {d_store}. "
            "Evaluate it on a store of its own model, or name the runs that fit with --run."
        )
    skip_first = skip_first if request.skip_first is None else request.skip_first
    return Candidate(
        path,
        record,
        EvalOptions(
            hook=hook,
            skip_first=skip_first,
            splice=request.splice,
            temporal=request.temporal,
            baselines=request.baselines,
        ),
    )


def _foreign_record(store: Store, path: Path) -> dict[str, Any]:
    """What tcsae.json would say, as far as cfg.json says it."""
    config = foreign_config(path)
    hook = config["hook_name"]
    names = {one.canonical: one.requested for one in store.manifest.recipe.hooks}
    return {
        "preset": f"SAELens {config['architecture']}",
        "hook": names.get(hook, hook) or store.hook(),
        "sae": {"d_model": config.get("d_in"), "d_sae": config.get("d_sae")},
        "steps": None,
        "tokens": None,
        "train": {"data": {"skip_first": FOREIGN_SKIP_FIRST}},
        "store": {"content": None},
    }


def done_before(store: Store, run: Candidate) -> dict[str, Any] | None:
    """What an earlier evaluation found, if nothing that it depends on has changed.

    One that measured more (temporal, baselines) than is asked for now will do.
    """
    found = load_evaluation(run.path, store.content)
    if found is None or found.get("definition_version") != metrics.DEFINITION_VERSION:
        return None
    # A tail that could not be read may have been put back.
    tail_is_back = found.get("no_tail") and "none" not in store.manifest.tails.get(run.options.hook, {"none": ""})
    then, now = found.get("options", {}), to_dict(run.options)
    same = then.keys() == now.keys() and all(
        then[key] == value or (key in ("temporal", "baselines") and then[key]) for key, value in now.items()
    )
    return found if same and not tail_is_back else None


def load(run: Candidate) -> Loaded:
    """Load a run's SAE. Raises RunError, naming the tensor, if a weight is NaN or infinite."""
    sae = load_foreign(run.path) if is_foreign(run.path) else load_sae(run.path)
    for name, tensor in sae.tensors().items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise RunError(f"{bad} values of {name} in {WEIGHTS} are NaN or infinite. Train it again.")
    if sae.config.d_model != run.record["sae"]["d_model"]:
        raise RunError(f"{WEIGHTS} is of d_model {sae.config.d_model}, its config says {run.record['sae']['d_model']}.")
    return Loaded(run, sae, file_digest(run.path / WEIGHTS))


def sort_out(
    store: Store, folders: Sequence[Path], request: Request
) -> tuple[dict[Path, dict[str, Any]], dict[EvalOptions, list[Loaded]], list[str]]:
    """(evaluations that still hold, runs to evaluate by their options, a line for each that is refused)."""
    kept: dict[Path, dict[str, Any]] = {}
    groups: dict[EvalOptions, list[Loaded]] = {}
    refused: list[str] = []
    for path in folders:
        try:
            run = candidate(store, path, request)
            found = None if request.force else done_before(store, run)
            if found:
                kept[path] = found | {"name": path.name}  # the folder may have been renamed since
            else:
                groups.setdefault(run.options, []).append(load(run))
        except TcsaeError as error:
            refused.append(f"{path.name}: {error}")
    return kept, groups, refused
