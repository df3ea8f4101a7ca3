"""Smoothness as T-SAE's published code measures it (arXiv 2511.05541): the largest jump of a latent in a text.

A maximum, so one outlier sets it; it goes with the code's scale over that of x; and it is close to what T-SAE trains.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode

RULE = (
    "the largest |f_t+1 - f_t| / ||x_t+1 - x_t|| of each latent on in a sequence, never across a token that is left "
    "out: mean over those, then sequences"
)


class Smoothness:
    """Of all latents; with several groups also of the first (T-SAE's "high") and of the others ("low")."""

    definitions: Mapping[str, str] = {
        "smoothness": f"{RULE} (lower is smoother)",
        "smoothness_high": "the same over the first group of latents",
        "smoothness_low": "the same over the other groups",
    }

    def __init__(self, config: SaeConfig) -> None:
        self._stop = config.group_ranges()[0][1] if len(config.groups) > 1 else None
        self._sums = torch.zeros(3, 2, dtype=torch.float64)
        """Of all, high, low: total over sequences, and sequences."""
        self._lengths: list[int] = []
        self._changes = torch.zeros(0)

    def begin(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """The batch whose code comes next, and its activations at the counted positions."""
        self._lengths = [n for n in batch.counted.sum(1).tolist() if n]
        changes = (x[1:].double() - x[:-1].double()).norm(dim=1)
        # Both sides of a hole are no neighbours: a change of 0 is looked past, like that of an x that stays.
        self._changes = torch.where(batch.runs.diff() == 0, changes, 0.0)

    def add(self, code: Code) -> None:
        start = 0
        for n in self._lengths:
            if n > 1:
                self._add_sequence(*_on(code, start, n), self._changes[start : start + n - 1])
            start += n

    def _add_sequence(
        self, f: Float[Tensor, "n m"], latents: Int[Tensor, " m"], changes: Float[Tensor, " n_pairs"]
    ) -> None:
        moves = changes > 0
        if not len(latents) or not moves.any():
            return
        largest = ((f[1:] - f[:-1]).abs()[moves] / changes[moves, None]).amax(0)
        for row, which in zip(self._sums, self._parts(latents), strict=False):
            if which.any():
                row += torch.tensor([float(largest[which].mean()), 1.0], dtype=torch.float64)

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(latents, dtype=torch.bool)
        if self._stop is not None:
            yield latents < self._stop
            yield latents >= self._stop

    def sums(self) -> Sequence[Tensor]:
        return [self._sums]

    def figures(self) -> dict[str, float | None]:
        rows = zip(self.definitions, self._sums.tolist(), strict=True)
        return {name: total / n if n else None for name, (total, n) in rows}


def _on(code: Code, start: int, n: int) -> tuple[Float[Tensor, "n m"], Tensor]:
    """(code of a sequence, float64, its latents): those whose sum is not 0."""
    if isinstance(code, SparseCode):
        part = slice(int(code.offsets[start]), int(code.offsets[start + n]))
        latents, column = code.latents[part].unique(return_inverse=True)
        rows = torch.repeat_interleave(torch.arange(n), code.offsets[start : start + n + 1].diff())
        f = torch.zeros(n, len(latents), dtype=torch.float64)
        f.index_put_((rows, column), code.values[part].double())
    else:
        f, latents = code[start : start + n].double(), torch.arange(code.shape[1])
    on = f.sum(0) != 0
    return f[:, on], latents[on]
