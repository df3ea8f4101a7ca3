"""Evaluate runs on a store's eval split: what is done already is kept, the rest shares one pass, results go to JSON."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from tcsae.evaluate import baselines
from tcsae.evaluate.batches import Settings, check_counted
from tcsae.evaluate.candidates import EvalRequest, Loaded, evaluable, sort_out
from tcsae.evaluate.evaluation_files import AGAIN, Figures, Group, all_rows, common_values, points, write_evaluation
from tcsae.evaluate.halves import half
from tcsae.evaluate.measures.concentration import dense_latents
from tcsae.evaluate.measures.cross_entropy import FOLDER, load_reference, save_reference
from tcsae.evaluate.measures.registry import MeasureObserver
from tcsae.evaluate.measures.smoothing import parse_smoothing
from tcsae.evaluate.measures.temporal_run import TemporalObserver
from tcsae.evaluate.one_pass import Observer, measure
from tcsae.evaluate.parallel import Part, part_of
from tcsae.evaluate.systems import SequenceSystem, System, sae_on, system_of
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.device import sums_on
from tcsae.shared.base.distributed import ALONE, Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.base.errors import NoTailError, StoreError
from tcsae.shared.base.files import remove_dead_partials_in
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.lm.tail import Tail, TailError
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store


class Evaluated(NamedTuple):
    """What `evaluate_runs` has to say."""

    evaluations: list[dict[str, Any]]
    """What each run's eval.json holds, in the order asked for; a run's smoothed ones come after it."""
    refused: list[str]
    """One line for each run that gets no figures, and why."""


def evaluate_runs(
    store: Store,
    runs_path: Path,
    request: EvalRequest | None = None,
    ours: Ranks = ALONE,
    device: torch.device | str = "cpu",
) -> Evaluated:
    """Evaluate the runs asked for and write each one's eval.json, its replicates, and SAEBench's form of it.

    Each smoothing asked for gives one more evaluation of every run, named like "run+ema=0.3", in eval+ema=0.3.json;
    SAEBench has no form for it. Kept as it is: an eval.json of the same weights, store content, options and definition
    version, unless forced.
    With several processes all call this, each with its number; rank 0 writes and returns, the others return nothing.
    Raises RunError if there is no run, or none of a given name; ConfigError for a smoothing that does not exist;
    StoreError if the eval split is empty or damaged.
    """
    request = request or EvalRequest()
    folders = evaluable(runs_path, request.names)
    for folder in (*folders, runs_path / FOLDER):
        remove_dead_partials_in(folder)
    with stop_on_signals() as stop:
        work = sort_out(store, folders, request)
        evaluations = dict(work.current)
        if evaluations:
            say(f"Evaluated already: {', '.join(evaluations)}. Do it again with --force.")
        for options, runs in work.groups.items():
            check_writable(loaded.run.path for loaded in runs)
            made = _evaluate(Group(store, runs_path, options, runs, ours, stop, torch.device(device)))
            evaluations |= {loaded.run.name: one for loaded, one in zip(runs, made, strict=False)}
    if ours.rank:
        return Evaluated([], [])
    return Evaluated([evaluations[name] for name in work.order], work.refused)


def _evaluate(group: Group) -> list[dict[str, Any]]:
    """One pass for all runs of a group; their evaluations, written and returned in the same order (by rank 0)."""
    store, options = group.store, group.options
    split = half(store.split(options.split), options.documents)
    check_counted(split, options.rules)
    part = part_of(split, options.rules, group.ours)
    tail, no_tail = _tail(store, options.hook, group.device)
    _check_agreed(part, no_tail)
    mean = train_mean(store, options.hook)
    settings = Settings(
        hook=options.hook,
        rules=options.rules,
        splice_all=options.splice == "all",
        mean=mean,
        device=group.device,
        ce_tokens=options.ce_tokens,
    )
    reference = load_reference(group.runs_path, store, options.split_name, settings) if tail else None
    if not all(part.all_gather(reference is not None)):
        reference = None
    constant = baselines.constant_baselines(mean.float().to(group.device))
    sized = _sized_baselines(group) if options.baselines else {}
    systems = [*(_system(one, group.device) for one in group.runs), *sized.values(), *constant.values()]
    centre = mean.nan_to_num()  # of no influence on a measure but by rounding
    observer = None
    if options.temporal:
        on = sums_on(group.device)
        observer = TemporalObserver(split, options.rules, centre, len(group.runs), on, options.probe_latents)
    widths = [one.sae.config.d_sae for one in group.runs]
    measures = MeasureObserver([one.sae for one in group.runs], split)
    observers: list[Observer] = [measures, observer] if observer else [measures]
    start = time.monotonic()
    with _progress(group, part.n_tokens(split)) as advance, _stopping(group.stop):
        measured = measure(split, settings, systems, tail, reference, observers, advance, part)
        if observer:
            observer.add_up(part, widths)
        measures.add_up(part)
    if not part.has_all:
        return []
    if tail and reference is None and measured.reference is not None:
        with writing(group.runs_path, AGAIN):
            save_reference(group.runs_path, store, options.split_name, settings, measured.reference)
    rows = all_rows(measured, len(group.runs))
    common = common_values(group, measured, no_tail)
    common["baselines"] = dict(zip([*sized, *constant], map(points, rows[len(group.runs) :]), strict=True))
    common["definitions"] |= {name: baselines.DEFINITIONS[name] for name in common["baselines"]}
    evaluations = []
    for i, one in enumerate(group.runs):
        group.stop.check(f"{i} of {len(group.runs)} evaluations of this pass are written")
        temporal = observer.measures(i, one.sae.config) if observer else None
        firings, sample = measured.firings[i], observer.sample(i) if observer else None
        assert firings is not None
        of_codes = measures.figures(i) | {"dense latents": dense_latents(one.sae, firings, common["n_tokens"], sample)}
        probed = observer.probe_draws.get(i, {}) if observer else {}
        spent = {"seconds": round(time.monotonic() - start, 2), "seconds_shared_by": len(group.runs)}
        of_run = Figures(rows[i], probed, firings)
        shared = common | spent | {"temporal": temporal, "measures": of_codes}
        evaluations.append(write_evaluation(group, one, of_run, shared))
    return evaluations


@contextmanager
def _progress(group: Group, n_tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar whose advance also looks for a signal: batches are the pieces of work of a pass."""
    n = len(group.runs)
    with progress(f"eval {n} SAE{'s' * (n > 1)}", total=n_tokens) as advance:

        def after_batch(n_tokens: int) -> None:
            advance(n_tokens)
            group.stop.check(f"nothing of this pass of {n} SAE{'s' * (n > 1)} is written")

        yield after_batch


@contextmanager
def _stopping(stop: StopRequest) -> Iterator[None]:
    """A collective that fails as another process has stopped is no error here, where the same signal came, too."""
    try:
        yield
    except RuntimeError:
        stop.check("nothing of this pass is written")
        raise


def check_writable(folders: Iterable[Path]) -> None:
    """Raises RunError if nothing can be written to a run's folder: better before the pass than after it."""
    for folder in folders:
        with writing(folder, AGAIN), tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()


def train_mean(store: Store, hook: str) -> Float64[Tensor, " d_model"]:
    """The mean of x over the train split; NaN if that is empty, so that no figure around it looks like one."""
    mean = torch.from_numpy(store.array(f"statistics/{hook}/mean")[:]).double()
    return mean if store.train.n_tokens else torch.full_like(mean, torch.nan)


def _system(loaded: Loaded, device: torch.device) -> System | SequenceSystem:
    smooth, sae = loaded.run.options.smooth, sae_on(loaded.sae, device)
    return system_of(sae, parse_smoothing(smooth) if smooth else None)


def _check_agreed(part: Part, no_tail: str | None) -> None:
    """Raises StoreError if some process reads the tail and another does not: their sums would not be of one thing."""
    reasons = part.all_gather(no_tail)
    if None in reasons and (failed := [i for i, one in enumerate(reasons) if one is not None]):
        first = failed[0]
        raise StoreError(f"Process {first} of {len(reasons)} cannot read the tail that others read: {reasons[first]}")


def _tail(store: Store, hook: str, device: torch.device) -> tuple[Tail | None, str | None]:
    """The tail after `hook`, or None and why there is none: every figure but the cross-entropies does without.

    Raises StoreError for one that is damaged or out of reach: without a word the figures would be of less.
    """
    try:
        return Tail.load(store.tail_path(hook), str(device)), None
    except (NoTailError, TailError) as error:
        return None, str(error)


def _sized_baselines(group: Group) -> dict[str, System]:
    options = group.options
    like = group.runs[0].sae.config
    return baselines.sized_baselines(group.store, options.hook, options.rules, like, group.device)


def evaluate_parallel(
    store: Store, runs_path: Path, request: EvalRequest, ours: Ranks, device: torch.device | str = "cpu"
) -> Evaluated:
    """As `evaluate_runs`, by one of several processes. Returns what this one is to show: rank 0 all, once the others
    are done; without a rendezvous, where no sums can be added up and SAEs are dealt out always, each its own.
    """
    folders = evaluable(runs_path, request.names)
    if len(folders) < ours.world and has_rendezvous():
        start_group(ours, device)
        evaluated = evaluate_runs(store, runs_path, request, ours, device)
        wait_for_all(ours)
        return evaluated
    mine = [path.name for path in folders][ours.rank :: ours.world]
    names = ", ".join(mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ours.rank} of {ours.world} evaluates {names}.")
    evaluated = Evaluated([], [])
    if mine:
        evaluated = evaluate_runs(store, runs_path, replace(request, names=tuple(mine)), device=device)
    if not has_rendezvous():
        return evaluated
    wait_for_all(ours)
    if ours.rank:
        return Evaluated([], [])
    return evaluate_runs(store, runs_path, replace(request, names=tuple(path.name for path in folders), force=False))
