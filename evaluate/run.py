"""Evaluate runs on a store's eval split: what is done already is kept, the rest shares one pass, results go to JSON."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tcsae import __version__
from tcsae.evaluate.batches import Settings
from tcsae.evaluate.candidates import EvalOptions, Loaded, Request, evaluable, sort_out
from tcsae.evaluate.intervals import LEVEL, N_RESAMPLINGS, interval, point, resamplings
from tcsae.evaluate.measures import baselines, saebench, temporal_run
from tcsae.evaluate.measures import core as metrics
from tcsae.evaluate.measures import cross_entropy as tail_metrics
from tcsae.evaluate.measures.cross_entropy import load_reference, save_reference
from tcsae.evaluate.measures.smoothing import DEFINITIONS as SMOOTHINGS
from tcsae.evaluate.measures.smoothing import parse_smoothing
from tcsae.evaluate.measures.temporal_run import TemporalObserver
from tcsae.evaluate.one_pass import Measured, measure
from tcsae.evaluate.parallel import Part, part_of
from tcsae.evaluate.systems import SaeOutput, SmoothedOutput, System
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.distributed import ALONE, Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.base.errors import RemoteError, StoreError, TcsaeError
from tcsae.shared.base.files import write_atomic, write_json
from tcsae.shared.base.settings import to_dict
from tcsae.shared.lm.tail import Tail
from tcsae.shared.sae.folder import EVALUATION
from tcsae.shared.store.reader import Split, Store

REPLICATES = "eval_replicates.safetensors"
"""Beside eval.json: every figure on each resampling of the documents, the split itself first."""


class Evaluated(NamedTuple):
    """What `evaluate_runs` has to say."""

    evaluations: list[dict[str, Any]]
    """What each run's eval.json holds, in the order asked for; a run's smoothed ones come after it."""
    refused: list[str]
    """One line for each run that gets no figures, and why."""


class Group(NamedTuple):
    """Runs with the same options but for the smoothing, and what they share."""

    store: Store
    runs_path: Path
    options: EvalOptions
    runs: Sequence[Loaded]
    ours: Ranks
    """The processes that share the pass."""


def evaluate_runs(store: Store, runs_path: Path, request: Request | None = None, ours: Ranks = ALONE) -> Evaluated:
    """Evaluate the runs asked for and write each one's eval.json, its replicates, and SAEBench's form of it.

    Each smoothing asked for gives one more evaluation of every run, named like "run+ema=0.3", in eval+ema=0.3.json;
    SAEBench has no form for it. Kept as it is: an eval.json of the same weights, store content, options and definition
    version, unless forced.
    With several processes all call this, each with its number; rank 0 writes and returns, the others return nothing.
    Raises RunError if there is no run, or none of a given name; ConfigError for a smoothing that does not exist;
    StoreError if the eval split is empty or damaged.
    """
    request = request or Request()
    folders = evaluable(runs_path, request.names)
    work = sort_out(store, folders, request)
    evaluations = dict(work.kept)
    if evaluations:
        say(f"Evaluated already: {', '.join(evaluations)}. Do it again with --force.")
    for options, runs in work.groups.items():
        found = _evaluate(Group(store, runs_path, options, runs, ours))
        evaluations |= {loaded.run.name: one for loaded, one in zip(runs, found, strict=False)}
    if ours.rank:
        return Evaluated([], [])
    return Evaluated([evaluations[name] for name in work.order], work.refused)


def _evaluate(group: Group) -> list[dict[str, Any]]:
    """One pass for all runs of a group; their evaluations, written and returned in the same order (by rank 0)."""
    store, options = group.store, group.options
    split = store.split(options.split)
    _check_not_empty(store, split, options)
    part = part_of(split, options.skip_first, group.ours)
    tail, no_tail = _tail(store, options.hook)
    _check_agreed(part, no_tail)
    mean = torch.from_numpy(store.array(f"statistics/{options.hook}/mean")[:]).double()
    settings = Settings(hook=options.hook, skip_first=options.skip_first, splice_all=options.splice == "all", mean=mean)
    reference = load_reference(group.runs_path, store, options.split, settings) if tail else None
    if not all(part.told(reference is not None)):
        reference = None
    constant = baselines.constant_baselines(mean.float())
    sized = _sized_baselines(group) if options.baselines else {}
    systems = [*map(_system, group.runs), *sized.values(), *constant.values()]
    observer = TemporalObserver(split, options.skip_first, mean, len(group.runs)) if options.temporal else None
    start = time.monotonic()
    title = f"eval {len(group.runs)} SAE{'s' * (len(group.runs) > 1)}"
    with progress(title, total=part.n_tokens(split)) as advance:
        measured = measure(split, settings, systems, tail, reference, observer, advance, part)
    if observer:
        observer.add_up(part, [one.sae.config.d_sae for one in group.runs])
    if not part.has_all:
        return []
    if tail and reference is None and measured.reference is not None:
        save_reference(group.runs_path, store, options.split, settings, measured.reference)
    rows = _all_rows(measured, len(group.runs))
    temporal = [observer.measures(i, one.sae.config) if observer else None for i, one in enumerate(group.runs)]
    beaten = dict(zip([*sized, *constant], map(_points, rows[len(group.runs) :]), strict=True))
    common = _common(group, measured, no_tail) | {
        "baselines": beaten,
        "definitions": metrics.DEFINITIONS
        | tail_metrics.DEFINITIONS
        | {name: baselines.DEFINITIONS[name] for name in beaten},
        "temporal_definitions": temporal_run.DEFINITIONS,
        "seconds": round(time.monotonic() - start, 2),
        "seconds_shared_by": len(group.runs),
    }
    return [
        _write(
            group,
            i,
            (row, observer.probe_draws.get(i, {}) if observer else {}),
            measured.firings[i],
            common | {"temporal": temporal[i]},
        )
        for i, row in enumerate(rows[: len(group.runs)])
    ]


def _system(loaded: Loaded) -> System | SmoothedOutput:
    smooth = loaded.run.options.smooth
    return SmoothedOutput(loaded.sae, parse_smoothing(smooth)) if smooth else SaeOutput(loaded.sae)


def _check_not_empty(store: Store, split: Split, options: EvalOptions) -> None:
    if not (split.lengths > options.skip_first).any():
        raise StoreError(
            f"{store.location}: its {options.split} split has no position from {options.skip_first} on in "
            f"{split.n_sequences} sequences. Harvest more tokens, or a larger share for it (--eval-every)."
        )


def _check_agreed(part: Part, no_tail: str | None) -> None:
    """Raises StoreError if some process reads the tail and another does not: their sums would not be of one thing."""
    told = part.told(no_tail)
    if None in told and (failed := [i for i, one in enumerate(told) if one is not None]):
        raise StoreError(f"Process {failed[0]} of {len(told)} cannot read the tail that others read: {told[failed[0]]}")


def _tail(store: Store, hook: str) -> tuple[Tail | None, str | None]:
    """The tail after `hook`, or None and why there is none: every figure but the cross-entropies does without."""
    try:
        return Tail.load(store.tail_path(hook)), None
    except RemoteError:  # there may be one
        raise
    except TcsaeError as error:
        return None, str(error)


def _sized_baselines(group: Group) -> dict[str, System]:
    options = group.options
    return baselines.sized_baselines(group.store, options.hook, options.skip_first, group.runs[0].sae.config)


def _all_rows(measured: Measured, n_runs: int) -> list[dict[str, Tensor]]:
    """Each system's figures: the runs' on the split and on every resampling, the baselines' on the split alone."""
    reference, losses = measured.reference, list(measured.losses)
    if reference is not None:
        losses[-2:] = [reference.zero, reference.mean]
    weights = resamplings(len(measured.counted[0].n_tokens))
    all_rows = []
    for i, (counted, skipped) in enumerate(zip(measured.counted, measured.skipped, strict=True)):
        draws = weights if i < n_runs else weights[:1]
        rows = metrics.figures(counted.weighted(draws), skipped.weighted(draws))
        if reference is not None:
            rows |= tail_metrics.tail_figures(reference.weighted(draws), losses[i].weighted(draws))
        firings = measured.firings[i]
        if firings is None:  # no latents
            rows = {name: values for name, values in rows.items() if not name.startswith(("l0", "l1"))}
        else:
            rows["dead_fraction"] = (firings[0] == 0).double().mean()[None]
        all_rows.append(rows)
    return all_rows


def _points(rows: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The figures themselves, all of them: None where undefined or without a tail."""
    names = [*metrics.DEFINITIONS, *tail_metrics.DEFINITIONS]
    return {name: point(rows[name]) if name in rows else None for name in names}


def _common(group: Group, measured: Measured, no_tail: str | None) -> dict[str, Any]:
    """What the evaluations of a group share."""
    store, split = group.store, group.store.split(group.options.split)
    reference = measured.reference
    return {
        "definition_version": metrics.DEFINITION_VERSION,
        "store": {"location": store.location, "content": store.content},
        "sequence_length": store.sequence_length,
        "n_sequences": split.n_sequences,
        "n_documents": split.n_documents,
        "n_tokens": int(measured.counted[0].n_tokens.sum()),
        "n_tokens_skipped": int(measured.skipped[0].n_tokens.sum()),
        "n_predictions": 0 if reference is None else int(reference.n_predictions.sum()),
        "no_tail": no_tail,
        "through_the_tail": [] if reference is None else list(tail_metrics.DEFINITIONS),
        "splice": tail_metrics.SPLICES[group.options.splice],
        "interval_rule": f"{LEVEL:.0%}, percentiles of {N_RESAMPLINGS} resamplings of whole documents",
        "libraries": {"tcsae": __version__, "torch": torch.__version__},
    }


def _write(
    group: Group,
    i: int,
    figures: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    firings: Tensor | None,
    common: dict[str, Any],
) -> dict[str, Any]:
    """Write a run's files, eval.json last; returns what that holds. `figures`: the metrics and the probes, by row."""
    rows, probed = figures
    loaded, folder, options = group.runs[i], group.runs[i].run.path, group.runs[i].run.options
    evaluation = _about(loaded, group.store) | {"metrics": _points(rows)}
    evaluation["intervals"] = {name: interval(rows[name]) for name in rows if len(rows[name]) > 1}
    evaluation |= common
    assert firings is not None
    if options.smooth is None:
        details = saebench.feature_details(loaded.sae, firings, common["n_tokens"])
        core = saebench.core_output(evaluation, loaded.sae, details, group.store.manifest.recipe.model.name)
        write_json(folder / saebench.FILE, core)
    draws = {name: values.contiguous() for name, values in {**rows, **probed}.items() if len(values) > 1}
    write_atomic(folder / options.file(REPLICATES), safetensors.torch.save(draws, {"content": group.store.content}))
    write_json(folder / options.file(EVALUATION), evaluation)
    return evaluation


def _about(loaded: Loaded, store: Store) -> dict[str, Any]:
    path, record, options = loaded.run
    trained_on = record["store"]["content"]
    if trained_on not in (None, store.content) and not options.smooth:
        say(f"{path.name}: trained on another store (content {trained_on[:12]}), evaluated on this one.")
    about = {
        "name": loaded.run.name,
        "preset": record["preset"],
        "sae": to_dict(loaded.sae.config),
        "steps": record["steps"],
        "tokens": record["tokens"],
        "weights": loaded.weights,
        "trained_on": trained_on,
        "options": options.to_json(),
    }
    if options.smooth:
        about["smoothing"] = SMOOTHINGS[parse_smoothing(options.smooth).kind]
    return about


def evaluate_in_several(store: Store, runs_path: Path, request: Request, ours: Ranks) -> Evaluated:
    """As `evaluate_runs`, by one of several processes. Returns what this one is to show: rank 0 all, once the others
    are done; without a rendezvous, where no sums can be added up and SAEs are dealt out always, each its own.
    """
    folders = evaluable(runs_path, request.names)
    if len(folders) < ours.world and has_rendezvous():
        start_group(ours)
        found = evaluate_runs(store, runs_path, request, ours)
        wait_for_all(ours)
        return found
    mine = [path.name for path in folders][ours.rank :: ours.world]
    names = ", ".join(mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ours.rank} of {ours.world} evaluates {names}.")
    found = evaluate_runs(store, runs_path, replace(request, names=tuple(mine))) if mine else Evaluated([], [])
    if not has_rendezvous():
        return found
    wait_for_all(ours)
    if ours.rank:
        return Evaluated([], [])
    return evaluate_runs(store, runs_path, replace(request, names=tuple(path.name for path in folders), force=False))
