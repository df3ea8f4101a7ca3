"""The planted experiment: stores, SAEs and scores, each made only where it is not there yet."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.batches import batches
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.planted.recovery_figures import Planted, PlantedTokens
from tcsae.evaluate.planted.truth import CLASSES, FAST, SLOW_RARE, Truth, load_truth
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.console import say
from tcsae.shared.base.distributed import ranks, start_group, wait_for_all
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest, json_digest, write_json
from tcsae.shared.sae.crosscoder import decoder_rows
from tcsae.shared.sae.folder import EVALUATION, WEIGHTS, is_finished, load_evaluation, load_sae, read_object, writing
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Store
from tcsae.synthetic.identifiability import ARMS, PLAIN, TEMPORAL, WIDER, Grid, Size
from tcsae.synthetic.planting import planted_config
from tcsae.synthetic.run import HOOK, write_planted
from tcsae.train.plan import Request, Run, plan_runs
from tcsae.train.run import train_runs

SCORES = "planted_scores.json"
"""In a run's folder: F1 of every feature, with the digest of the weights it is of."""
AGAIN = "What was finished stays: start the same command again once it can."


@dataclass(frozen=True)
class Place:
    """Where stores and runs lie."""

    work: Path

    def store(self, name: str) -> Path:
        return self.work / f"{name}.zarr"

    def runs(self, name: str) -> Path:
        return self.work / f"{name}-runs"


METHODS = (
    "topk", "batchtopk", "jumprelu", "relu-l1", "temporal-topk", "temporal-topk-penalised", "temporal-matryoshka",
    "local-contrast", "topic", "t-sae", "slow-linear", "crosscoder-3", "tfa", "persistent",
)  # fmt: skip
"""Presets of the table: one of each family. The paper's are dense or not trained."""


class Cell(NamedTuple):
    """One store and the runs on it: of the table of methods, or (with a duration) of the diagram."""

    name: str
    seed: int
    duration: int | None


def table_cells(size: Size) -> list[Cell]:
    return [Cell(f"default-seed{seed}", seed, None) for seed in range(size.n_seeds)]


def grid_cells(size: Size) -> list[Cell]:
    """A seed at a time: whatever seeds are complete can be looked at."""
    seeds = range(size.n_seeds)
    return [Cell(f"duration{one}-seed{seed}", seed, one) for seed in seeds for one in size.durations]


def make_all(place: Place, size: Size) -> None:
    """Every store, run and score; in parallel processes each makes every n-th cell, and waits for the others.

    Raises Stopped after a signal, with all that is finished on disk; ConfigError for processes without a rendezvous.
    """
    ours, cells = ranks(), [*table_cells(size), *grid_cells(size)]
    if ours.parallel:
        start_group(ours)
    for i, cell in enumerate(cells):
        if i % ours.world != ours.rank:
            continue
        start = time.process_time()
        store = write_planted(str(place.store(cell.name)), planted_config("small", planting_of(size, cell)))
        _finish(place, cell, store, runs_of(store, size, cell))
        if (spent := time.process_time() - start) > 5:
            say(f"{cell.name}: cell {i + 1} of {len(cells)}, {spent / 60:.1f} minutes of processor time.")
    wait_for_all(ours)


def planting_of(size: Size, cell: Cell) -> tuple[str, ...]:
    """Settings of a cell's store: the default, or with slow features of one duration and every strength."""
    settings = (*size.planting, f"seed={cell.seed}")
    if cell.duration is None:
        return settings
    amplitudes = ",".join(map(str, size.amplitudes))
    n_slow = len(size.amplitudes) * size.per_cell
    return (*settings, f"n_slow={n_slow}", f"slow_amplitudes={amplitudes}", f"slow_durations={cell.duration}")


def runs_of(store: Store, size: Size, cell: Cell) -> list[Run]:
    if cell.duration is None:
        return plan_runs(store, Request(METHODS, _settings(size, cell.seed)))
    return list(grid_runs(store, size, cell.seed).values())


def _settings(size: Size, seed: int) -> list[str]:
    return [*size.sae, f"steps={size.steps}", f"init_seed={seed}", f"data.seed={seed}", "data.skip_first=0"]


def grid_runs(store: Store, size: Size, seed: int) -> dict[str, Run]:
    """The run of each arm."""
    wider = [one for one in _settings(size, seed) if not one.startswith("sae.k=")] + [f"sae.k={size.k + 2}"]
    asked = {PLAIN: ("topk", _settings(size, seed)), TEMPORAL: ("temporal-topk", _settings(size, seed))}
    asked[WIDER] = ("topk", wider)
    return {arm: plan_runs(store, Request((preset,), settings))[0] for arm, (preset, settings) in asked.items()}


def _finish(place: Place, cell: Cell, store: Store, runs: list[Run]) -> None:
    """Train, evaluate and score what is not trained, evaluated, scored yet."""
    folder = place.runs(cell.name)
    if todo := [run for run in runs if not is_finished(folder / run.name)]:
        train_runs(store, folder, todo)
    done = [load_evaluation(folder / run.name, store.content, EVALUATION) for run in runs]
    if not all(done):
        evaluate_runs(store, folder, EvalRequest(names=[run.name for run in runs], temporal=False))
    truth: Truth | None = None
    for run in runs if cell.duration is not None else ():
        path = folder / run.name
        if load_scores(path) is None:
            truth = truth or load_truth(store)
            if truth is None:
                raise RunError(
                    f"{store.location} has lost its truth. Start the same command again: it is written anew."
                )
            with writing(path, AGAIN):
                write_json(path / SCORES, score(store, truth, path))


def score(store: Store, truth: Truth, path: Path) -> dict[str, Any]:
    """F1 and recovery of every feature by the run at `path`, and each feature's signal to noise."""
    sae, tokens = load_sae(path), PlantedTokens(truth, store.eval.lengths)
    planted = Planted(tokens, decoder_rows(sae))
    moments = np.zeros((sae.config.d_model + 1, sae.config.d_model + 1))
    for batch in batches(store.eval, HOOK, CountingRules()):
        tokens.begin(batch)
        x = batch.x[batch.counted]
        planted.add(sae.encode_sparse(x))
        wide = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], 1)
        moments += wide.T @ wide
    scored = planted.per_feature()
    values = {
        "f1": scored["f1"],
        "recovered": scored["recovered"],
        "snr": signal_to_noise(truth, moments),
        "amplitude": truth.amplitudes,
    }
    lists = {name: [None if np.isnan(one) else round(float(one), 6) for one in row] for name, row in values.items()}
    scores = {"weights": file_digest(path / WEIGHTS), "kinds": [CLASSES[kind] for kind in truth.kinds], **lists}
    return scores | {"digest": json_digest(scores)}


def signal_to_noise(truth: Truth, moments: np.ndarray) -> np.ndarray:
    """Amplitude over the standard deviation of everything else along a feature's direction.

    Everything else: the covariance of x without the feature's own part, a^2 p (1 - p).
    """
    n, mean = moments[-1, -1], moments[-1, :-1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / n - np.outer(mean, mean)
    along = np.einsum("nd,de,ne->n", truth.directions, covariance, truth.directions)
    shown = np.bincount(truth.features[truth.values > 0], minlength=truth.n_features) / n
    rest = along - truth.amplitudes**2 * shown * (1 - shown)
    return truth.amplitudes / np.sqrt(np.maximum(rest, 1e-12))


def load_scores(path: Path) -> dict[str, Any] | None:
    """A run's scores, if they are of the weights that lie there and whole; None: score it (again)."""
    try:
        scores = read_object(path / SCORES, "")
        whole = scores.get("digest") == json_digest({key: one for key, one in scores.items() if key != "digest"})
        return scores if whole and scores["weights"] == file_digest(path / WEIGHTS) else None
    except (RunError, OSError, KeyError):
        return None


def grid_of(place: Place, size: Size, open_: Callable[[Path], Store]) -> Grid:
    """Scores of the whole diagram. `make_all` must have run."""
    shape = size.n_seeds, len(size.durations), len(size.amplitudes)
    slow, recovered = ({arm: np.full(shape, np.nan) for arm in ARMS} for _ in range(2))
    fast = {arm: np.full(shape[:2], np.nan) for arm in ARMS}
    snr = np.zeros((size.n_seeds * shape[1], shape[2]))
    for row, (arm, at, scores) in enumerate(_scored(place, size, open_)):
        kinds, f1 = np.array(scores["kinds"]), np.array(scores["f1"], float)
        amplitude = np.array(scores["amplitude"])
        fast[arm][at] = np.nanmean(f1[kinds == FAST])
        for i, one in enumerate(size.amplitudes):
            which = (kinds == SLOW_RARE) & np.isclose(amplitude, one)
            slow[arm][(*at, i)] = np.nanmean(f1[which])
            recovered[arm][(*at, i)] = np.nanmean(np.array(scores["recovered"], float)[which])
            snr[row // len(ARMS), i] = np.array(scores["snr"])[which].mean()
    return Grid(size.durations, snr.mean(0), slow, recovered, fast)


def _scored(
    place: Place, size: Size, open_: Callable[[Path], Store]
) -> Iterator[tuple[str, tuple[int, int], dict[str, Any]]]:
    for cell in grid_cells(size):
        assert cell.duration is not None
        for arm, run in grid_runs(open_(place.store(cell.name)), size, cell.seed).items():
            scores = load_scores(place.runs(cell.name) / run.name)
            assert scores is not None, "made before"
            yield arm, (cell.seed, size.durations.index(cell.duration)), scores
