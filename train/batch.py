"""What a step is trained on."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.windows import positions
from tcsae.train.collectives import ONE_PROCESS, Collectives


class Whole(NamedTuple):
    """All segments of a batch, where several processes have a part of it each."""

    lengths: Int[ndarray, " n_segments"]
    documents: Int[ndarray, " n_segments"]
    n_before: int
    """Tokens before this process's own."""
    starts: Int[ndarray, " n_segments"]


class Text(NamedTuple):
    """What stands at each token of the whole batch."""

    tokens: Int[ndarray, " n_whole"]
    """Token ids."""
    places: Int[ndarray, " n_whole"]
    """Number of each token within its document."""


class Batch(NamedTuple):
    """Segments packed end to end, without padding."""

    x: Float[Tensor, "n d_model"]
    """float32; the loader's own buffer, overwritten by the next batch."""
    lengths: Int[ndarray, " n_segments"]
    starts: Int[ndarray, " n_segments"]
    """Position of each segment's first token in its sequence."""
    documents: Int[ndarray, " n_segments"]
    n_left_out: int = 0
    """Tokens of the whole batch that are not in it, as data.max_norm asks."""
    whole: Whole | None = None
    """None: these are all."""
    group: Collectives = ONE_PROCESS
    """The processes that have the other parts."""
    text: Text | None = None
    """Only where a loss reads it (TemporalConfig.reads_text)."""

    @property
    def all(self) -> Whole:
        return self.whole or Whole(self.lengths, self.documents, 0, self.starts)

    @property
    def n_whole(self) -> int:
        """Tokens of the whole batch."""
        return len(self.x) if self.whole is None else int(self.whole.lengths.sum())

    @property
    def offset(self) -> int:
        """Where these tokens begin in the whole batch."""
        return self.all.n_before

    def positions(self) -> Int[Tensor, " n"]:
        """Each token's position in its sequence."""
        position = positions(self.lengths) + np.repeat(self.starts, self.lengths)
        return torch.from_numpy(position).to(self.x.device)


# Controls of the temporal term: the same tokens in another order.


def shuffled(order: Literal["segment", "batch"], batch: Batch, seed: int) -> Int[Tensor, " n"]:
    """The batch's tokens in random order, drawn by `seed`: within each segment, or over the batch."""
    rng = np.random.default_rng(seed)
    draws = rng.random(batch.n_whole)[batch.offset : batch.offset + len(batch.x)]
    if order == "segment":
        draws += np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    return torch.from_numpy(np.argsort(draws)).to(batch.x.device)
