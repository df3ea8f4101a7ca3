"""The stores of the experiments: the text, its two nulls, and synthetic activations of the paper's moments."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tcsae.harvest.documents import CorpusChoice
from tcsae.harvest.resolve import HarvestConfig, ModelChoice
from tcsae.harvest.run import harvest
from tcsae.paper.arms import MOMENTS, TEXT
from tcsae.shared.store.create import create_store
from tcsae.shared.store.format import ControlRecipe
from tcsae.shared.store.reader import Store, open_store

D_MODEL, NORM, SPREAD = 512, 15.8, 1.89
"""Of Pythia-70m's layer 4 as the paper read it: width, mean norm, and E[|x|^2 / |x - mu|^2]."""
PYTHIA_SQUARED_NORM = 372.0
"""Its mean squared norm on OpenWebText, without BOS."""
MOMENTS_SEQUENCES = {"train": 40, "eval": 160}


@dataclass(frozen=True)
class Place:
    """Where an experiment's stores and runs lie."""

    work: Path

    def store(self, name: str) -> Path:
        return self.work / f"{name}.zarr"

    def runs(self, name: str) -> Path:
        return self.work / "runs" / name


@dataclass(frozen=True)
class Source:
    """The language model, the text, and how much of it."""

    model: str
    dataset: str
    n_tokens: int


def open_or_make(place: Place, name: str, asked: Source) -> Store:
    """The store of this name, made first where it is not there yet."""
    location = str(place.store(name))
    if name == MOMENTS:
        return _moments(location)
    control = None if name == TEXT else ControlRecipe(kind=name)
    model, corpus = ModelChoice(name=asked.model), CorpusChoice(name=asked.dataset)
    return harvest(location, HarvestConfig(model=model, corpus=corpus, n_tokens=asked.n_tokens, control=control))


def squared_norm(store: Store) -> float:
    """Mean |x|^2 of the train split."""
    mean, variance = (np.asarray(store.array(f"statistics/{store.hook()}/{one}")[:]) for one in ("mean", "variance"))
    return float((mean**2 + variance).sum())


def natural_segments(store: Store, n_segments: int) -> int:
    """Whole sequences of any length that hold the tokens of so many full ones, position 0 left out of each."""
    usable = np.maximum(store.train.lengths - 1, 0)
    return round(n_segments * (store.sequence_length - 1) / float(usable[usable > 0].mean()))


def _moments(location: str) -> Store:
    """Gaussian activations about a mean, of the paper's norm and spread: with |mu|^2 = m and total variance v,
    (m + v) / v = SPREAD and m + v = NORM^2."""
    if Path(location, "zarr.json").exists():
        return open_store(location)
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D_MODEL)
    variance = NORM**2 / SPREAD
    mean = direction / np.linalg.norm(direction) * np.sqrt(NORM**2 - variance)
    with create_store(location, hooks={"moments": D_MODEL}, sequence_length=128) as store:
        for split, n in MOMENTS_SEQUENCES.items():
            x = rng.standard_normal((n, 128, D_MODEL)) * np.sqrt(variance / D_MODEL) + mean
            documents = np.arange(n) + (split == "eval") * MOMENTS_SEQUENCES["train"]
            store.append(split, {"moments": x.astype(np.float32)}, documents=documents)
    return open_store(location)
