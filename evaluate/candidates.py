"""Which folders below --runs are evaluated, with which options, and what of that is done already."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

from tcsae.evaluate.halves import Documents
from tcsae.evaluate.measures import core as metrics
from tcsae.evaluate.measures.probes import PROBE_LATENTS
from tcsae.evaluate.measures.smoothing import Smoothing, check_smoothing, parse_smoothing
from tcsae.shared.base.console import say
from tcsae.shared.base.device import precision
from tcsae.shared.base.errors import RunError, TcsaeError
from tcsae.shared.base.files import file_digest
from tcsae.shared.base.settings import to_dict
from tcsae.shared.sae.folder import (
    CONFIG,
    EVALUATION,
    METRICS,
    RECORD,
    WEIGHTS,
    find_runs,
    is_finished,
    load_evaluation,
    load_record,
    load_sae,
    reason,
)
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.other_formats import LOADERS
from tcsae.shared.sae.saelens import foreign_config, is_foreign, load_foreign, other_format, trained_positions
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.format import Recipe
from tcsae.shared.store.reader import Store

UNTRAINED = ("logged-", "untrained-")
"""Beginnings of presets whose SAEs are not trained on purpose: the only ones with 0 steps that get figures."""
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
    documents: Documents = "all"
    """Which of the split's documents are counted: `halves`."""
    smooth: str | None = None
    """How the SAE's codes are smoothed before they are decoded, as in "ema=0.3"; None: not at all."""
    exclude_tokens: tuple[str, ...] = ()
    """Tokens that are not counted: as in training."""
    positions: tuple[str, ...] = ()
    """Roles whose tokens are counted; empty: everybody's."""
    max_norm: float | None = None
    """Largest norm that is counted, in medians: as in training."""
    precision: str = "float32"
    """Of matrix products (`set_precision`)."""
    ce_tokens: int | None = None
    """Cross-entropies are of the first documents that hold so many tokens; None: all."""
    probe_latents: int = PROBE_LATENTS
    """Latents that a probe reads, those of largest variance."""

    @property
    def rules(self) -> CountingRules:
        """Which positions are counted."""
        return CountingRules(
            skip_first=self.skip_first,
            exclude_tokens=self.exclude_tokens,
            positions=self.positions,
            max_norm=self.max_norm,
            hook=self.hook,
        )

    def to_json(self) -> dict[str, Any]:
        """As evaluations hold them: nothing is said of smoothing, half the documents or rules where there are none."""
        silent: dict[str, object] = {"smooth": None, "documents": "all", "precision": "float32", "ce_tokens": None}
        silent |= {"probe_latents": PROBE_LATENTS, "exclude_tokens": [], "positions": [], "max_norm": None}
        return {name: value for name, value in to_dict(self).items() if name not in silent or value != silent[name]}

    @property
    def split_name(self) -> str:
        return self.split if self.documents == "all" else f"{self.split}-{self.documents}"

    def file(self, name: str) -> str:
        return smoothed_file(name, self.smooth)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRequest:
    """What is asked for on the command line."""

    names: Collection[str] = ()
    """Runs; none: all."""
    force: bool = False
    skip_first: int | None = None
    """None: each run's own."""
    splice: Literal["counted", "all"] = "counted"
    temporal: bool = True
    baselines: bool = False
    documents: Documents = "all"
    positions: Collection[str] = ()
    """Roles whose tokens are counted; none: as each run was trained."""
    ce_tokens: int | None = None
    """Cross-entropies are of the first documents that hold so many tokens; None: all."""
    probe_latents: int = PROBE_LATENTS
    """Latents that a probe reads, those of largest variance."""
    smooth: Collection[str] = ()
    """Each one more evaluation of every run, with its codes smoothed; as on the command line."""

    def smoothings(self) -> list[Smoothing]:
        """Raises ConfigError for one that does not exist, or a value out of its range."""
        return list(dict.fromkeys(map(parse_smoothing, self.smooth)))


def smoothed_file(name: str, smooth: str | None) -> str:
    """The file of a run's smoothed codes that is what `name` is of its own: eval+ema=0.3.json beside eval.json."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}+{smooth}{dot}{ending}" if smooth else name


class Candidate(NamedTuple):
    """A run that fits the store."""

    path: Path
    record: dict[str, Any]
    """tcsae.json, or for a foreign SAE the little that is known."""
    options: EvalOptions
    differences: tuple[str, ...] = ()
    """What a foreign SAE says of its training data that is otherwise in the store."""

    @property
    def name(self) -> str:
        """The folder's; of smoothed codes, with what smooths them."""
        return f"{self.path.name}+{self.options.smooth}" if self.options.smooth else self.path.name


class Loaded(NamedTuple):
    """A run about to be evaluated."""

    run: Candidate
    sae: SparseAutoencoder
    weights: str
    """sha256 of the file that the SAE was loaded from."""


UNFINISHED = f"has no {RECORD}: its training is unfinished"


def evaluable(runs_path: Path, names: Collection[str]) -> list[Path]:
    """Folders with a finished run or a foreign SAE. Raises RunError if there is none, or a named one is neither."""
    folders = find_runs(runs_path, names)
    unusable = {path: why for path in folders if (why := why_not_evaluable(path))}
    if unusable and (names or len(unusable) == len(folders)):
        path, why = next(iter(unusable.items()))
        go_on = f" Go on: tcsae --runs {runs_path} train" if why == UNFINISHED else ""
        raise RunError(f"{path} {why}.{go_on}")
    for path, why in unusable.items():
        what = f"its training is unfinished (no {RECORD})" if why == UNFINISHED else f"it {why}"
        say(f"{path.name}: skipped, {what}.")
    return [path for path in folders if path not in unusable]


def why_not_evaluable(path: Path) -> str | None:
    """What a run's folder lacks or is, as "has no ...": unfinished, or an SAE in a format that is not read."""
    if is_finished(path) or is_foreign(path):
        return None
    if form := other_format(path):
        loadable = any((path / name).is_file() for name in LOADERS)
        by = f", tcsae.load_sae({str(path)!r}).save(FOLDER)" if loadable else ""
        return f"is an SAE in {form}, which is not read: convert it to SAELens' layout ({CONFIG}, {WEIGHTS}{by})"
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if len(missing) == 1 and not (path / METRICS).is_file():
        there = WEIGHTS if missing == [CONFIG] else CONFIG
        return f"has {there} but no {missing[0]}: copy the whole folder"
    return UNFINISHED


def candidate(store: Store, path: Path, request: EvalRequest) -> Candidate:
    """The run at `path`. Raises RunError if it was never trained or does not fit the store, StoreError for its hook."""
    if is_foreign(path):
        config = foreign_config(path)
        recipe = store.manifest.recipe
        record, differences = _foreign_record(store, config), foreign_differences(recipe, config, request.skip_first)
    else:
        record, differences = load_record(path), []
    check_record(path, record)
    if record["steps"] == 0 and not record["preset"].startswith(UNTRAINED):
        names = ", ".join(f"{one}*" for one in UNTRAINED)
        raise RunError(f"no figures: its SAE has taken 0 optimiser steps. Train it, or use one of {names}.")
    hook, width = record["hook"], record["sae"]["d_model"]
    d_store = store.d_model(hook)
    if width != d_store:
        raise RunError(
            f"its SAE reads d_model {width}, but {hook} in {store.location} has d_model {d_store}. "
            "Evaluate it on a store of its own model, or name the runs that fit with --run."
        )
    data = record["train"]["data"]
    skip_first = data["skip_first"] if request.skip_first is None else request.skip_first
    options = EvalOptions(
        hook=hook,
        skip_first=skip_first,
        splice=request.splice,
        temporal=request.temporal,
        baselines=request.baselines,
        documents=request.documents,
        exclude_tokens=tuple(data.get("exclude_tokens", ())),
        positions=tuple(request.positions or data.get("positions", ())),
        max_norm=data.get("max_norm"),
        precision=precision(),
        ce_tokens=request.ce_tokens,
        probe_latents=request.probe_latents,
    )
    return Candidate(path, record, options, tuple(differences))


RECORD_VALUES: dict[str, type | UnionType] = {
    "preset": str,
    "hook": str,
    "sae.d_model": int,
    "train.data.skip_first": int,
    "train.data.exclude_tokens": list | None,
    "train.data.positions": list | None,
    "train.data.max_norm": float | int | None,
    "steps": int | None,
    "tokens": int | None,
    "store.content": str | None,
}
"""What an evaluation reads of tcsae.json, and what it may be."""
LATER = ("train.data.exclude_tokens", "train.data.positions", "train.data.max_norm")
"""Of these, what records of older versions and of others lack."""


def check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises RunError if tcsae.json lacks a value that an evaluation needs, or has one of another type."""
    for name, kind in RECORD_VALUES.items():
        value: Any = record
        for key in name.split("."):
            if isinstance(value, dict) and key not in value and name in LATER:
                value = None
                break
            if not isinstance(value, dict) or key not in value:
                raise RunError(
                    f"{path / RECORD} lacks {key!r}: it is damaged, or no run of ours. Train it again, or remove it."
                )
            value = value[key]
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise RunError(f"{path / RECORD} has {name}={value!r:.80}: it is damaged. Train it again, or remove it.")


def _foreign_record(store: Store, config: Mapping[str, Any]) -> dict[str, Any]:
    """What tcsae.json would say, as far as cfg.json says it."""
    hook = config["hook_name"]
    names = {one.canonical: one.requested for one in store.manifest.recipe.hooks}
    return {
        "preset": f"SAELens {config['architecture']}",
        "hook": names.get(hook, hook) or store.hook(),
        "sae": {"d_model": config.get("d_in") or store.d_model(names.get(hook, hook) or store.hook())},
        "steps": None,
        "tokens": None,
        "train": {"data": {"skip_first": max(FOREIGN_SKIP_FIRST, trained_positions(config).start or 0)}},
        "store": {"content": None},
    }


def foreign_differences(recipe: Recipe, config: Mapping[str, Any], skip_first: int | None = None) -> list[str]:
    """What an SAE of others says of its training data that is otherwise in the store, or here; a line each.

    `skip_first`: as given on the command line; by default nothing that its seqpos_slice leaves out is counted.
    """
    differing, sequences = [], recipe.sequences
    bos = config.get("prepend_bos")
    if bos is not None and bos != sequences.prepend_bos:
        differing.append(
            f"prepend_bos={str(bos).lower()} in its training, but the store has "
            f"{'a' if sequences.prepend_bos else 'no'} BOS: early positions are not what it was trained on"
        )
    positions = trained_positions(config)
    first = positions.start or 0
    skips_less = skip_first is not None and skip_first < first
    if positions.stop is not None or positions.step not in (None, 1) or first < 0 or skips_less:
        differing.append(
            f"seqpos_slice={config['seqpos_slice']} in its training, but all positions from the first counted on are "
            f"scored, up to {sequences.length}: also some that it was not trained on"
        )
    model, theirs = recipe.model.name, config.get("model_name")
    ours_short, theirs_short = (str(one).rstrip("/").rpartition("/")[2].casefold() for one in (model, theirs))
    if theirs and not (ours_short.startswith(theirs_short) or theirs_short.startswith(ours_short)):
        differing.append(f"model_name={str(theirs)[:80]} in its training, but the store is of {model}")
    return differing


def done_before(store: Store, run: Candidate) -> dict[str, Any] | None:
    """The earlier evaluation, if nothing that it depends on has changed.

    One that measured more (temporal, baselines) than is asked for now will do.
    """
    evaluation = load_evaluation(run.path, store.content, run.options.file(EVALUATION))
    if evaluation is None or evaluation.get("definition_version") != metrics.DEFINITION_VERSION:
        return None
    # A tail that could not be read may have been put back.
    tail_is_back = evaluation.get("no_tail") and "none" not in store.manifest.tails.get(run.options.hook, {"none": ""})
    then, now = evaluation.get("options", {}), run.options.to_json()
    same = then.keys() == now.keys() and all(
        then[key] == value or (key in ("temporal", "baselines") and then[key]) for key, value in now.items()
    )
    return evaluation if same and not tail_is_back else None


def load(run: Candidate) -> Loaded:
    """Load a run's SAE. Raises RunError if it does not fit its config, or a weight is NaN or infinite."""
    sae = load_foreign(run.path) if is_foreign(run.path) else load_sae(run.path)
    if sae.config.d_model != run.record["sae"]["d_model"]:
        raise RunError(f"{WEIGHTS} is of d_model {sae.config.d_model}, its config says {run.record['sae']['d_model']}.")
    try:
        return Loaded(run, sae, file_digest(run.path / WEIGHTS))
    except OSError as error:
        raise RunError(f"{run.path / WEIGHTS} cannot be read ({reason(error)}). Start again once it can.") from error


def sparse_runs(
    store: Store, runs_path: Path, names: Collection[str], why_not: Callable[[Loaded, Sequence[Loaded]], str]
) -> tuple[list[Loaded], list[str]]:
    """Runs with a sparse code, read at all positions from skip_first on; and why others are left out, a line each.

    `why_not(run, those taken before it)`: what else stands against a run; empty for nothing. Raises RunError if none is
    left, or there is none.
    """
    runs: list[Loaded] = []
    refused: list[str] = []
    for path in evaluable(runs_path, names):
        try:
            loaded = load(candidate(store, path, EvalRequest()))
        except TcsaeError as error:
            refused.append(f"{path.name}: {error}")
            continue
        dense = "" if loaded.sae.kind.mostly_zero else f"its code is dense ({loaded.sae.config.activation})."
        if reason := dense or why_not(loaded, runs):
            refused.append(f"{path.name}: {reason}")
            continue
        rules = loaded.run.options.rules
        if rules.has_holes or rules.max_norm is not None:
            say(f"{path.name}: all positions from {rules.skip_first} on are counted, whatever else it left out.")
        runs.append(loaded)
    if not runs:
        raise RunError(f"{runs_path} has no run with a sparse code that can be measured. {refused[0]}")
    return runs, refused


class Work(NamedTuple):
    """The evaluations asked for, by what each takes."""

    order: list[str]
    """Names of all evaluations that there will be, in the order asked for, a run's smoothed ones after it."""
    current: dict[str, dict[str, Any]]
    """Evaluations that still hold."""
    groups: dict[EvalOptions, list[Loaded]]
    """What has to be evaluated, by what one pass shares: the options, whatever the smoothing."""
    refused: list[str]
    """A line for each that gets no figures."""


def sort_out(store: Store, folders: Sequence[Path], request: EvalRequest) -> Work:
    """Raises ConfigError for a smoothing that does not exist."""
    work = Work([], {}, {}, [])
    smoothings = request.smoothings()
    for path in folders:
        loaded: Loaded | None = None
        try:
            plain = candidate(store, path, request)
        except TcsaeError as error:
            work.refused.append(f"{path.name}: {error}")
            continue
        for smoothing in (None, *smoothings):
            run = plain._replace(options=replace(plain.options, smooth=str(smoothing) if smoothing else None))
            try:
                if not request.force and (held := done_before(store, run)):
                    work.current[run.name] = held | {"name": run.name}  # the folder may have been renamed since
                else:
                    loaded = loaded or load(plain)
                    if smoothing:
                        check_smoothing(smoothing, loaded.sae.config)
                    work.groups.setdefault(plain.options, []).append(loaded._replace(run=run))
            except TcsaeError as error:
                work.refused.append(f"{run.name}: {error}")
                if loaded is None:
                    break
            else:
                work.order.append(run.name)
    return work
