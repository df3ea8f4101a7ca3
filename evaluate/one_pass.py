"""One pass over a split for many SAEs: each batch is read once and goes through all of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tcsae.evaluate.metrics import Activity, Output, Sums, dense_activity, sparse_activity, sum_tokens, widen
from tcsae.evaluate.tail_metrics import n_predictions, sequence_losses, splice
from tcsae.shared.sae import SparseAutoencoder
from tcsae.shared.store import Split
from tcsae.shared.tail import Tail

BATCH_TOKENS = 4096
"""Positions in a batch, at most (or one sequence)."""
BATCH_CODE_ENTRIES = 8 << 20
"""Of a dense code or of pre-activations, at most: 32 MB."""

System = Callable[[Float[Tensor, "n d_model"]], Output]
"""An SAE or a baseline: activations in, reconstruction and activity out."""


class SaeOutput:
    """An SAE as a system, encoding at most BATCH_CODE_ENTRIES at a time."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        parts = [self._part(part) for part in x.split(max(1, BATCH_CODE_ENTRIES // self.sae.config.d_sae))]
        if len(parts) == 1:
            return parts[0]
        x_hats, activities = zip(*parts, strict=True)
        active, magnitude, firings = zip(*activities, strict=True)
        return Output(torch.cat(x_hats), Activity(torch.cat(active), torch.cat(magnitude), torch.stack(firings).sum(0)))

    def _part(self, x: Float[Tensor, "n d_model"]) -> Output:
        if self.sae.config.activation == "gelu":  # next to no entry is zero, so sparse code would cost three times more
            dense = self.sae.encode(x)
            return Output(self.sae.decode(dense, x), dense_activity(dense))
        code = self.sae.encode_sparse(x)
        return Output(self.sae.decode_sparse(code, x), sparse_activity(code))


class Batch(NamedTuple):
    """Whole sequences."""

    x: Float[Tensor, "batch position d_model"]
    tokens: Int[Tensor, "batch position"]
    lengths: Int[Tensor, " batch"]
    counted: Bool[Tensor, "batch position"]
    """Valid positions from `skip_first` on."""
    skipped: Bool[Tensor, "batch position"]
    """Valid positions before."""


class Losses(NamedTuple):
    """Mean cross-entropy in nats over the counted predictions."""

    clean: float
    zero: float
    """With zeros at all positions."""
    systems: list[float]
    """With each system's output at the counted positions."""


class Measured(NamedTuple):
    """What a pass found."""

    counted: list[Sums]
    """One for each system, over the counted positions."""
    skipped: list[Sums]
    losses: Losses | None
    """None without a tail, or where no counted position has a next token."""
    n_predictions: int


def batches(split: Split, hook: str, skip_first: int) -> Iterator[Batch]:
    """The split in order, as float32, each chunk read once."""
    per_chunk = split.store.sequences_per_chunk
    per_batch = max(1, BATCH_TOKENS // split.store.sequence_length)
    position = torch.arange(split.store.sequence_length)
    for start in range(0, split.n_sequences, per_chunk):
        block = split.read(hook, start, min(start + per_chunk, split.n_sequences))
        for first in range(0, len(block), per_batch):
            x = torch.from_numpy(block[first : first + per_batch]).float()
            rows = slice(start + first, start + first + len(x))
            lengths = torch.from_numpy(split.lengths[rows])
            valid = position < lengths[:, None]
            from_there = position >= skip_first
            yield Batch(x, torch.from_numpy(split.tokens[rows]), lengths, valid & from_there, valid & ~from_there)


@torch.inference_mode()
def measure(
    split: Split,
    hook: str,
    skip_first: int,
    systems: Sequence[System],
    tail: Tail | None,
    advance: Callable[[int], None],
) -> Measured:
    """Run every system over the split; `advance` is told how many valid tokens each batch had."""
    counted: dict[int, Sums] = {}
    skipped: dict[int, Sums] = {}
    losses = torch.zeros(2 + len(systems), dtype=torch.float64)
    predictions = 0
    for batch in batches(split, hook, skip_first):
        x_counted, x_skipped = batch.x[batch.counted], batch.x[batch.skipped]
        wide_counted, wide_skipped = widen(x_counted), widen(x_skipped)
        for i, system in enumerate(systems):
            output = system(x_counted)
            _add(counted, i, sum_tokens(wide_counted, output))
            _add(skipped, i, sum_tokens(wide_skipped, system(x_skipped)))
            if tail is not None:
                losses[2 + i] += _loss(tail, splice(batch.x, batch.counted, output.x_hat), batch, skip_first)
        if tail is not None:
            losses[0] += _loss(tail, batch.x, batch, skip_first)
            losses[1] += _loss(tail, torch.zeros_like(batch.x), batch, skip_first)
            predictions += n_predictions(batch.lengths, skip_first)
        advance(int(batch.lengths.sum()))
    means = (losses / predictions).tolist() if predictions else None
    found = Losses(means[0], means[1], means[2:]) if means else None
    return Measured(list(counted.values()), list(skipped.values()), found, predictions)


def _add(sums: dict[int, Sums], key: int, new: Sums) -> None:
    sums[key] = sums[key] + new if key in sums else new


def _loss(tail: Tail, x: Float[Tensor, "batch position d_model"], batch: Batch, skip_first: int) -> Tensor:
    return sequence_losses(tail, x, batch.tokens, batch.lengths, skip_first).sum()
