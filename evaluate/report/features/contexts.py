"""Where latents fire, as sequences: the strongest of each latent, and a fair sample, in bounded memory.

Of each latent are kept the N_TOP sequences with the largest peaks, and N_SAMPLED of all sequences in which it fires,
drawn by a hash of (sequence, latent): which ones depends on nothing else. Quantiles of the peaks are those of the
sample, exact where a latent fires in no more sequences than that. Each kept sequence has all its activations, as
float16 shares of its peak: three digits, and below 3e-8 of the peak nothing.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, positive_code

N_TOP, N_SAMPLED = 8, 32
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
"""Of the sequences in which a latent fires, ordered by their peaks: where one is shown besides the strongest."""
EMPTY, SILENT = -1.0, -2.0
"""Scores of a free place and of a sequence without firing."""


class Context(NamedTuple):
    """One sequence, as one latent sees it."""

    sequence: int
    """Its number within the split."""
    quantile: float | None
    """None: one of the strongest."""
    activations: Float32[np.ndarray, " length"]


class _BestSequences:
    """The n sequences of best score for each latent."""

    def __init__(self, d_sae: int, n: int, length: int) -> None:
        self.score = torch.full((d_sae, n), EMPTY, dtype=torch.float64)
        self.peak = torch.zeros(d_sae, n)
        self.sequence = torch.full((d_sae, n), -1, dtype=torch.int32)
        self.shares = torch.zeros(d_sae, n, length, dtype=torch.float16)

    def offer(
        self, score: Float64[Tensor, "d_sae batch"], peak: Float[Tensor, "d_sae batch"], start: int, entries: "_Entries"
    ) -> None:
        """Let the sequences of a batch in, where they score better."""
        n = self.score.shape[1]
        best = torch.cat((self.score, score), 1).topk(n, dim=1).indices
        chosen = torch.zeros(len(score), n + score.shape[1], dtype=torch.bool).scatter_(1, best, True)
        latent, row = (chosen[:, n:] & (score > EMPTY)).nonzero().T
        # Of each latent as many places fall free as sequences come in: both lists run latent by latent.
        free = _first(~chosen[:, :n], torch.bincount(latent, minlength=len(score)))
        at = free.nonzero()[:, 0], free.nonzero()[:, 1]
        self.score[at], self.peak[at] = score[latent, row], peak[latent, row]
        self.sequence[at] = (start + row).int()
        self.shares[at] = (entries.rows(latent, row) / peak[latent, row][:, None]).half()


def _first(mask: Bool[Tensor, "d n"], counts: Int[Tensor, " d"]) -> Bool[Tensor, "d n"]:
    """The first counts[i] places of each row i of the mask."""
    return mask & (mask.cumsum(1) <= counts[:, None])


class _Entries:
    """The active entries of a batch, by sequence and latent."""

    def __init__(self, code: SparseCode, sequence: Tensor, position: Tensor, shape: tuple[int, int]) -> None:
        on = (code.values > 0).nonzero().squeeze(1)
        token, self.values = code.rows[on], code.values[on]
        self.n_sequences, self.length = shape
        self.d_sae, self.latents = code.d_sae, code.latents[on]
        keys, self.order = (sequence[token] * code.d_sae + self.latents).sort()
        self.keys, self.position = keys, position[token][self.order]

    def peaks(self) -> Float[Tensor, "d_sae batch"]:
        """Largest activation of each latent in each sequence; 0 where it never fires."""
        flat = torch.zeros(self.n_sequences * self.d_sae)
        flat.scatter_reduce_(0, self.keys, self.values[self.order], "amax")
        return flat.view(self.n_sequences, self.d_sae).T.contiguous()

    def rows(self, latent: Int[Tensor, " m"], sequence: Int[Tensor, " m"]) -> Float[Tensor, "m length"]:
        """All activations of m latents in m sequences."""
        keys = sequence * self.d_sae + latent
        first = torch.searchsorted(self.keys, keys)
        counts = torch.searchsorted(self.keys, keys, right=True) - first
        row = torch.repeat_interleave(torch.arange(len(keys)), counts)
        at = torch.arange(len(row)) + (first - (counts.cumsum(0) - counts))[row]
        made = torch.zeros(len(keys), self.length)
        made[row, self.position[at]] = self.values[self.order[at]]
        return made


class ContextCollector:
    """Keeps the sequences to show of each latent while codes stream by."""

    def __init__(self, d_sae: int, length: int) -> None:
        self.top = _BestSequences(d_sae, N_TOP, length)
        self.sample = _BestSequences(d_sae, N_SAMPLED, length)
        self.n_sequences = torch.zeros(d_sae, dtype=torch.int64)
        """In which each latent fires."""
        self.n_active = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        """Of its activations, where it fires."""

    def add(self, start: int, counted: Bool[Tensor, "batch length"], code: Code) -> None:
        """The code of a batch's counted positions; `start` is the number of its first sequence."""
        sequence, position = counted.nonzero().T
        entries = _Entries(_positive(code), sequence, position, (counted.shape[0], counted.shape[1]))
        peak = entries.peaks()
        fires = peak > 0
        self.n_sequences += fires.sum(1)
        self.n_active += torch.bincount(entries.latents, minlength=entries.d_sae)
        self.total += torch.bincount(entries.latents, weights=entries.values.double(), minlength=entries.d_sae)
        self.top.offer(torch.where(fires, peak.double(), SILENT), peak, start, entries)
        draw = _draws(start, counted.shape[0], entries.d_sae)
        self.sample.offer(torch.where(fires, draw, SILENT), peak, start, entries)

    def maximum(self) -> Float[Tensor, " d_sae"]:
        """Each latent's largest activation; 0 for one that never fires."""
        return self.top.peak.amax(1)

    def contexts(self, latent: int) -> list[Context]:
        """The strongest first, then one at each of QUANTILES that is not among them."""
        places = [int(at) for at in self.top.score[latent].argsort(descending=True, stable=True)]
        contexts = [self._context(self.top, latent, at, None) for at in places if self.top.sequence[latent, at] >= 0]
        shown = {one.sequence for one in contexts}
        peaks = torch.where(self.sample.score[latent] > EMPTY, self.sample.peak[latent], torch.inf)
        drawn = peaks.argsort(stable=True)[: int(peaks.isfinite().sum())].tolist()
        for quantile in QUANTILES if drawn else ():
            one = self._context(self.sample, latent, drawn[round(quantile * (len(drawn) - 1))], quantile)
            if one.sequence not in shown:
                shown.add(one.sequence)
                contexts.append(one)
        return contexts

    def kept(self, latent: int) -> list[Context]:
        """All sequences that are kept of a latent, each once."""
        every = [
            self._context(part, latent, at, None)
            for part in (self.top, self.sample)
            for at in range(part.sequence.shape[1])
        ]
        return list({one.sequence: one for one in every if one.sequence >= 0}.values())

    def _context(self, part: _BestSequences, latent: int, at: int, quantile: float | None) -> Context:
        activations = part.shares[latent, at].numpy().astype(np.float32) * float(part.peak[latent, at])
        return Context(int(part.sequence[latent, at]), quantile, activations)


def _positive(code: Code) -> SparseCode:
    return code if isinstance(code, SparseCode) else positive_code(code)


def _draws(start: int, n_sequences: int, d_sae: int) -> Float64[Tensor, "d_sae {n_sequences}"]:
    """A number in (0, 1) for each latent and sequence: splitmix64 of both."""
    sequence = np.arange(start, start + n_sequences, dtype=np.uint64)
    mixed = (np.arange(d_sae, dtype=np.uint64)[:, None] << np.uint64(40)) + sequence
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(multiplier)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy(((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53)
