"""Which latents are alike, or opposite: by the direction that they write, and by when and how much they fire."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, positive_code

N_NEAREST = 6
DECODER_BLOCK = 512
"""Latents compared with all others at a time: 8 MB at 4096 latents."""
SAMPLE_TOKENS = 65_536
"""Tokens that joint firing is counted on, at most: whole sequences, evenly spaced."""
SAMPLE_PAIRS = 1 << 28
"""Pairs of latents firing at one token, over the whole sample, at most: bounds the time for dense codes."""
PAIR_BLOCK = 1 << 20


class Nearest(NamedTuple):
    """For each latent the most alike others, best first; likeness 0 where there are fewer."""

    latents: Int[Tensor, "d_sae n"]
    likeness: Float[Tensor, "d_sae n"]


class ByDecoder(NamedTuple):
    """By the cosine of decoder rows."""

    near: Nearest
    opposite: Nearest
    """Likeness is minus the cosine."""


class ByFiring(NamedTuple):
    """By the tokens of a sample."""

    joint: Nearest
    """Jaccard: tokens at which both fire, over those at which either does."""
    correlated: Nearest
    """Pearson's correlation of their activations, zeros included."""


def unit_rows(W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
    """Decoder rows of length 1."""
    return functional.normalize(W_dec.detach().float(), dim=1)


def nearest_by_decoder(W_dec: Float[Tensor, "d_sae d_model"], alive: Bool[Tensor, " d_sae"]) -> ByDecoder:
    """Among the latents that are alive."""
    unit = unit_rows(W_dec)

    def likenesses(first: int, stop: int) -> tuple[Tensor, Tensor]:
        cosines = unit[first:stop] @ unit.T
        return cosines, -cosines

    return ByDecoder(*_nearest(len(unit), alive, likenesses))


class FiringSample:
    """Which latents fire, and how much, at the tokens of a sample of sequences."""

    def __init__(self, d_sae: int, n_tokens: int) -> None:
        self.d_sae = d_sae
        self.every = -(-n_tokens // SAMPLE_TOKENS)
        """One sequence in so many is looked at."""
        self.n_tokens = self._pairs = 0
        self._latents: list[Tensor] = []
        self._values: list[Tensor] = []
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
        self._values.append(sparse.values[on].float())
        self._counts.append(counts.int())

    def nearest(self, alive: Bool[Tensor, " d_sae"]) -> ByFiring:
        """Among the latents that are alive."""
        if not self._latents:
            nothing = torch.zeros(DECODER_BLOCK, self.d_sae)
            return ByFiring(
                *_nearest(self.d_sae, alive, lambda first, stop: (nothing[: stop - first], nothing[: stop - first]))
            )
        latents, counts = torch.cat(self._latents).long(), torch.cat(self._counts).long()
        values = torch.cat(self._values)
        offsets = counts.cumsum(0) - counts
        token = torch.repeat_interleave(torch.arange(len(counts)), counts)
        by_latent, order = latents.sort()
        firings = torch.bincount(latents, minlength=self.d_sae).float()
        mean = torch.bincount(latents, weights=values.double(), minlength=self.d_sae) / self.n_tokens
        square = torch.bincount(latents, weights=values.double().square(), minlength=self.d_sae) / self.n_tokens
        deviation = (square - mean.square()).clamp(min=0).sqrt()

        def likenesses(first: int, stop: int) -> tuple[Tensor, Tensor]:
            both, products = torch.zeros(stop - first, self.d_sae), torch.zeros(stop - first, self.d_sae)
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
                products.view(-1).index_add_(0, keys, values[entries][pair] * values[other])
            jaccard = both / (firings[first:stop, None] + firings - both).clamp(min=1)
            covariance = products.double() / self.n_tokens - mean[first:stop, None] * mean
            scale = deviation[first:stop, None] * deviation
            return jaccard, torch.where(scale > 0, covariance / scale.clamp(min=1e-30), 0.0).float()

        return ByFiring(*_nearest(self.d_sae, alive, likenesses))


def _nearest(
    d_sae: int, alive: Tensor, likenesses: Callable[[int, int], tuple[Tensor, Tensor]]
) -> tuple[Nearest, Nearest]:
    """Of two likenesses, each given for a block of latents with all."""
    n = min(N_NEAREST, d_sae - 1)
    nearest_of = [Nearest(torch.zeros(d_sae, n, dtype=torch.int64), torch.zeros(d_sae, n)) for _ in range(2)]
    for first in range(0, d_sae, DECODER_BLOCK):
        stop = min(first + DECODER_BLOCK, d_sae)
        for nearest, likeness in zip(nearest_of, likenesses(first, stop), strict=True):
            block = likeness.masked_fill(~alive, -torch.inf)
            block[torch.arange(stop - first), torch.arange(first, stop)] = -torch.inf
            best = block.topk(n, dim=1)
            nearest.latents[first:stop], nearest.likeness[first:stop] = best.indices, best.values.clamp(min=0)
    return nearest_of[0], nearest_of[1]
