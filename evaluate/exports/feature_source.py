"""What an export of features is made from: one SAE, and the part of a store that it is run over."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tcsae.evaluate.candidates import EvalRequest, candidate, evaluable, load
from tcsae.evaluate.report.feature_pass import Excerpt
from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.reader import Store

BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What features are exported from."""

    name: str
    """Of the run."""
    split: str = "eval"
    max_tokens: int | None = None
    """About how many tokens are read; None: all of the split."""
    context_length: int | None = None
    """Of delphi: positions of a context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSource:
    """A run that fits the store, and the part that is read."""

    store: Store
    name: str
    path: Path
    sae: SparseAutoencoder
    record: dict[str, Any]
    part: Excerpt

    @property
    def layer(self) -> int:
        """Number of the block that the hook is in. Raises RunError for a hook in none."""
        match = BLOCK.match(self.part.hook)
        if match is None:
            raise RunError(
                f"{self.name} is of {self.part.hook}, which is in no block, and Neuronpedia goes by a layer's number. "
                "Export it to another form."
            )
        return int(match[1])

    @property
    def lengths(self) -> Int[ndarray, " n_sequences"]:
        return self.part.split.lengths[: self.part.n_sequences]

    @property
    def dataset(self) -> str:
        return self.store.manifest.recipe.corpus.name

    @property
    def model(self) -> str:
        return self.store.manifest.recipe.model.name


def feature_source(store: Store, runs_path: Path, request: ExportRequest) -> FeatureSource:
    """Raises RunError if there is no such run or it does not fit the store."""
    (path,) = evaluable(runs_path, [request.name])
    run = candidate(store, path, EvalRequest())
    part = Excerpt(store.split(request.split), run.options.hook, run.options.rules, request.max_tokens)
    return FeatureSource(store=store, name=path.name, path=path, sae=load(run).sae, record=run.record, part=part)


def split_edges(width: int, n_splits: int) -> list[tuple[int, int]]:
    """First and last latent of each of `n_splits` ranges, as equal as can be."""
    edges = np.linspace(0, width, n_splits + 1).astype(int)
    return [(int(first), int(stop) - 1) for first, stop in itertools.pairwise(edges) if stop > first]
