"""What a temporal term has beside the code: what it learns or remembers, and what its trainer worked out for it."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tcsae.shared.sae.ops import Code


class BilinearHead(nn.Module):
    """The low-rank form h U V^T h' of two codes, learned beside an SAE and dropped at the end of its training.

    It starts near the cosine: U = V, entries of variance 1 / rank.
    """

    def __init__(self, d: int, rank: int, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        # Drawn on the CPU: a seed gives the same weights on every device.
        start = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
        self.U, self.V = (nn.Parameter(start.clone().to(device or start.device)) for _ in range(2))


class TermState(NamedTuple):
    """None where the kind at hand has no use for it."""

    position: Int[Tensor, " n"] | None = None
    """Each token's position in its sequence, in the order in which the term sees the tokens."""
    means: Float[Tensor, "n_positions d"] | None = None
    """Running mean code at each position, up to the batch before."""
    head: BilinearHead | None = None
    partner: Code | None = None
    """Code of each token's partner (t-sae)."""


NO_STATE = TermState()
