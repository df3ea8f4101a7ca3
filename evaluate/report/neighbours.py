"""Which latents are alike: by the direction that they write, and by when they fire."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from tcsae.evaluate.measures.core import Code
from tcsae.shared.sae.sparse import SparseCode, positive_code

N_NEAREST = 6
BLOCK = 512
"""Latents compared with all others at a time: 8 MB at 4096 latents."""
SAMPLE_TOKENS = 65_536
"""Tokens that firing together is counted on, at most: whole sequences, evenly spaced."""
SAMPLE_PAIRS = 1 << 28
"""Pairs of latents firing at one token, over the whole sample, at most: bounds the time for dense codes."""
PAIR_BLOCK = 1 << 20


class Nearest(NamedTuple):
    """For each latent the most alike others, best first; likeness 0 where there are fewer."""

    latents: Int[Tensor, "d_sae n"]
    likeness: Float[Tensor, "d_sae n"]


def nearest_by_decoder(W_dec: Float[Tensor, "d_sae d_model"], alive: Bool[Tensor, " d_sae"]) -> Nearest:
    """By the cosine of decoder rows, among the latents that are alive."""
    unit = functional.normalize(W_dec.detach(), dim=1)
    return _nearest(len(unit), alive, lambda first, stop: unit[first:stop] @ unit.T)


class FiringSample:
    """Which latents fire at the tokens of a sample of sequences."""

    def __init__(self, d_sae: int, n_tokens: int) -> None:
        self.d_sae = d_sae
        self.every = -(-n_tokens // SAMPLE_TOKENS)
        """One sequence in so many is looked at."""
        self.n_tokens = self._pairs = 0
        self._latents: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, start: int, counted: Bool[Tensor, "batch length"], code: Code) -> None:
        """The code of a batch's counted positions; `start` is the number of its first sequence."""
        sparse = code if isinstance(code, SparseCode) else positive_code(code)
        chosen = ((start + counted.nonzero()[:, 0]) % self.every) == 0
        on = (sparse.values > 0) & chosen[sparse.rows]
        counts = torch.bincount(sparse.rows[on], minlength=sparse.n_tokens)[chosen]
        if self._pairs + int(counts.square().sum()) > SAMPLE_PAIRS:
            return
        self._pairs += int(counts.square().sum())
        self.n_tokens += len(counts)
        self._latents.append(sparse.latents[on].int())
        self._counts.append(counts.int())

    def nearest(self, alive: Bool[Tensor, " d_sae"]) -> Nearest:
        """By firing at the same tokens: those at which both fire, over those at which either does."""
        if not self._latents:
            return _nearest(self.d_sae, alive, lambda first, stop: torch.zeros(stop - first, self.d_sae))
        latents, counts = torch.cat(self._latents).long(), torch.cat(self._counts).long()
        offsets = counts.cumsum(0) - counts
        token = torch.repeat_interleave(torch.arange(len(counts)), counts)
        by_latent, order = latents.sort()
        firings = torch.bincount(latents, minlength=self.d_sae).float()

        def likeness(first: int, stop: int) -> Tensor:
            both = torch.zeros(stop - first, self.d_sae)
            low, high = torch.searchsorted(by_latent, torch.tensor([first, stop])).tolist()
            # Each firing of a latent of the block meets all that fire at its token.
            step = max(1, PAIR_BLOCK // max(1, int(counts.max()) if len(counts) else 1))
            for at in range(low, high, step):
                entries = order[at : min(at + step, high)]
                n = counts[token[entries]]
                pair = torch.repeat_interleave(torch.arange(len(entries)), n)
                other = torch.arange(len(pair)) + (offsets[token[entries]] - (n.cumsum(0) - n))[pair]
                keys = (latents[entries][pair] - first) * self.d_sae + latents[other]
                both.view(-1).index_add_(0, keys, torch.ones(len(keys)))
            return both / (firings[first:stop, None] + firings - both).clamp(min=1)

        return _nearest(self.d_sae, alive, likeness)


def _nearest(d_sae: int, alive: Tensor, likeness: Callable[[int, int], Tensor]) -> Nearest:
    n = min(N_NEAREST, d_sae - 1)
    latents, values = torch.zeros(d_sae, n, dtype=torch.int64), torch.zeros(d_sae, n)
    for first in range(0, d_sae, BLOCK):
        stop = min(first + BLOCK, d_sae)
        block = likeness(first, stop).masked_fill(~alive, -torch.inf)
        block[torch.arange(stop - first), torch.arange(first, stop)] = -torch.inf
        best = block.topk(n, dim=1)
        latents[first:stop], values[first:stop] = best.indices, best.values.clamp(min=0)
    return Nearest(latents, values)
