"""What a pass found, as the files of an evaluation: eval.json, its replicates, and SAEBench's form of it.

eval.json is written last and carries the digests of the others, so that a kill in between leaves no pair of files that
look as if they belonged together: an evaluation whose files do not fit counts as none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tcsae import __version__
from tcsae.evaluate.batches import n_sequences
from tcsae.evaluate.candidates import EvalOptions, Loaded
from tcsae.evaluate.halves import half
from tcsae.evaluate.intervals import LEVEL, MIN_DOCUMENTS, N_RESAMPLINGS, interval, point
from tcsae.evaluate.measures import core as metrics
from tcsae.evaluate.measures import cross_entropy as tail_metrics
from tcsae.evaluate.measures import saebench, temporal_run
from tcsae.evaluate.measures.cross_entropy import resampled
from tcsae.evaluate.measures.smoothing import DEFINITIONS as SMOOTHINGS
from tcsae.evaluate.measures.smoothing import parse_smoothing
from tcsae.evaluate.one_pass import Measured
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import Ranks
from tcsae.shared.base.files import file_digest, write_atomic, write_json
from tcsae.shared.base.settings import to_dict
from tcsae.shared.base.signals import StopRequest
from tcsae.shared.sae.folder import CONFIG, EVALUATION, evaluation_digest, writing
from tcsae.shared.store.counted import left_out
from tcsae.shared.store.reader import Store

REPLICATES = "eval_replicates.safetensors"
"""Beside eval.json: every figure on each resampling of the documents, the split itself first."""
AGAIN = "What was finished stays: start the same command again once it can."


class Group(NamedTuple):
    """Runs with the same options but for the smoothing, and what they share."""

    store: Store
    runs_path: Path
    options: EvalOptions
    runs: Sequence[Loaded]
    ours: Ranks
    """The processes that share the pass."""
    stop: StopRequest
    """Looked at after each batch, and before each run's files are written."""
    device: torch.device
    """Where SAEs and tail run."""


def all_rows(measured: Measured, n_runs: int) -> list[dict[str, Tensor]]:
    """Each system's figures: the runs' on the split and on every resampling, the baselines' on the split alone."""
    reference, losses = measured.reference, measured.losses
    if reference is not None:
        has_draws = int((reference.n_predictions > 0).sum()) >= MIN_DOCUMENTS
        reference, losses = resampled(measured.resamplings, reference, losses)
    all_rows = []
    for i, (counted, skipped) in enumerate(zip(measured.counted, measured.skipped, strict=True)):
        rows = metrics.figures(counted, skipped)
        if reference is not None:
            of_tail = tail_metrics.tail_figures(reference, losses[i])
            rows |= {name: one if has_draws else one[:1] for name, one in of_tail.items()}
        firings = measured.firings[i]
        if firings is None:  # no latents
            rows = {name: values for name, values in rows.items() if not name.startswith(("l0", "l1"))}
        else:
            rows["dead_fraction"] = (firings[0] == 0).double().mean()[None]
        all_rows.append(rows if i < n_runs else {name: values[:1] for name, values in rows.items()})
    return all_rows


def points(rows: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The figures themselves, all of them: None where undefined or without a tail."""
    names = [*metrics.DEFINITIONS, *(name for name in metrics.PREDICTED if name in rows), *tail_metrics.DEFINITIONS]
    return {name: point(rows[name]) if name in rows else None for name in names}


def common_values(group: Group, measured: Measured, no_tail: str | None) -> dict[str, Any]:
    """What the evaluations of a group share."""
    store, split = group.store, half(group.store.split(group.options.split), group.options.documents)
    reference = measured.reference
    return {
        "definition_version": metrics.DEFINITION_VERSION,
        "store": {"location": store.location, "content": store.content},
        "sequence_length": store.sequence_length,
        "n_sequences": split.n_sequences,
        "n_documents": split.n_documents,
        "n_tokens": int(measured.counted[0].n_tokens[0]),
        "n_tokens_skipped": int(measured.skipped[0].n_tokens[0]),
        "left_out": left_out(split, group.options.rules),
        "n_ce_tokens": int(split.lengths[: n_sequences(split, group.options.ce_tokens)].sum()),
        "n_predictions": 0 if reference is None else int(reference.n_predictions.sum()),
        "no_tail": no_tail,
        "through_the_tail": [] if reference is None else list(tail_metrics.DEFINITIONS),
        "splice": tail_metrics.SPLICES[group.options.splice],
        "interval_rule": f"{LEVEL:.0%}, percentiles of {N_RESAMPLINGS} resamplings of whole documents; none of "
        f"fewer than {MIN_DOCUMENTS} documents",
        "definitions": metrics.DEFINITIONS | tail_metrics.DEFINITIONS,
        "temporal_definitions": temporal_run.DEFINITIONS,
        "libraries": {"tcsae": __version__, "torch": torch.__version__},
    }


class Figures(NamedTuple):
    """What a pass found of one SAE."""

    rows: Mapping[str, Tensor]
    """Figures on the split and on every resampling."""
    probed: Mapping[str, Tensor]
    """Of the probes: likewise."""
    firings: Tensor


def write_evaluation(group: Group, loaded: Loaded, figures: Figures, common: dict[str, Any]) -> dict[str, Any]:
    """Write a run's files, eval.json last, with the digests of the others; returns what that holds.

    Raises RunError if they cannot be written.
    """
    rows, probed, firings = figures
    folder, options = loaded.run.path, loaded.run.options
    evaluation = _about(loaded, group.store) | {"metrics": points(rows)}
    evaluation["intervals"] = {name: interval(values) for name, values in rows.items() if name != "dead_fraction"}
    evaluation |= common
    if rows.keys() & metrics.PREDICTED.keys():
        evaluation["definitions"] = evaluation["definitions"] | metrics.PREDICTED
    with writing(folder, AGAIN):
        files = [options.file(REPLICATES)]
        if options.smooth is None:
            details = saebench.feature_details(loaded.sae, firings, common["n_tokens"])
            core = saebench.core_output(evaluation, loaded.sae, details, group.store.manifest.recipe.model.name)
            write_json(folder / saebench.FILE, core)
            files.append(saebench.FILE)
        draws = {name: values.contiguous() for name, values in {**rows, **probed}.items()}
        write_atomic(folder / files[0], safetensors.torch.save(draws, {"content": group.store.content}))
        evaluation["files"] = {name: file_digest(folder / name) for name in files}
        evaluation["digest"] = evaluation_digest(evaluation)
        write_json(folder / options.file(EVALUATION), evaluation)
    return evaluation


def _about(loaded: Loaded, store: Store) -> dict[str, Any]:
    run = loaded.run
    trained_on = run.record["store"]["content"]
    if not run.options.smooth:
        if trained_on not in (None, store.content):
            say(f"{run.name}: trained on another store (content {trained_on[:12]}), evaluated on this one.")
        for difference in run.differences:
            say(f"{run.name}: {CONFIG} says {difference}.")
    about = {
        "name": run.name,
        "preset": run.record["preset"],
        "sae": to_dict(loaded.sae.config),
        "steps": run.record["steps"],
        "tokens": run.record["tokens"],
        "weights": loaded.weights,
        "trained_on": trained_on,
        "options": run.options.to_json(),
    }
    if run.differences:
        about["differences"] = list(run.differences)
    if run.options.smooth:
        about["smoothing"] = SMOOTHINGS[parse_smoothing(run.options.smooth).kind]
    return about
