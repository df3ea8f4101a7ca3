"""How large each latent's activations are: an exact histogram in bounded memory, though the largest is known last."""

import torch
from jaxtyping import Int
from torch import Tensor

from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, positive_code

N_BINS = 64
LOWEST = -40
"""Exponent of the smallest range, 1e-12."""


class ActivationHistogram:
    """Counts of the positive activations of each latent, in N_BINS equal bins from 0 to a power of two.

    Where a value lies beyond the range, the range doubles and neighbouring bins are added: their edges stay edges, so
    the counts do not depend on the order of the values.
    """

    def __init__(self, d_sae: int) -> None:
        self.counts = torch.zeros(d_sae, N_BINS, dtype=torch.int64)
        self.exponent = torch.full((d_sae,), LOWEST, dtype=torch.int64)
        """The range of each latent is 0 to 2 to this power."""

    def add(self, code: Code) -> None:
        """The code of some tokens."""
        sparse = code if isinstance(code, SparseCode) else positive_code(code)
        on = sparse.values > 0
        values, latents = sparse.values[on].float(), sparse.latents[on].long()
        largest = torch.zeros(len(self.exponent)).scatter_reduce_(0, latents, values, "amax")
        # frexp: value = mantissa * 2^exponent with mantissa in [0.5, 1), so value < 2^exponent.
        needed = torch.where(largest > 0, torch.frexp(largest).exponent.long(), LOWEST)
        self._widen(torch.maximum(needed, self.exponent))
        bins = (torch.ldexp(values, -self.exponent[latents]) * N_BINS).long().clamp(max=N_BINS - 1)
        self.counts += torch.bincount(latents * N_BINS + bins, minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, exponent: Int[Tensor, " d_sae"]) -> None:
        grow = exponent - self.exponent
        for _ in range(min(int(grow.max()), N_BINS.bit_length())):
            which = (grow > 0).nonzero().squeeze(1)
            halved = self.counts[which].view(len(which), N_BINS // 2, 2).sum(2)
            self.counts[which] = torch.cat((halved, torch.zeros_like(halved)), 1)
            grow[which] -= 1
        self.exponent = exponent

    def of(self, latent: int) -> tuple[float, list[int]]:
        """(width of a bin, counts up to the last bin that has any)."""
        counts = self.counts[latent]
        filled = counts.nonzero()
        n = int(filled[-1]) + 1 if len(filled) else 0
        return 2.0 ** int(self.exponent[latent]) / N_BINS, counts[:n].tolist()
