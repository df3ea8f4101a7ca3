"""Controls of the temporal term: the same tokens in another order."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tcsae.train.batch import Batch


def shuffled(order: Literal["segment", "batch"], batch: Batch, seed: int) -> Int[Tensor, " n"]:
    """The batch's tokens in random order, drawn by `seed`: within each segment, or over the batch."""
    rng = np.random.default_rng(seed)
    draws = rng.random(batch.n_whole)[batch.offset : batch.offset + len(batch.x)]
    if order == "segment":
        draws += np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    return torch.from_numpy(np.argsort(draws)).to(batch.x.device)
