"""The tail on changed activations: what the language model would have said, beside what it says.

The layers after the hook are run on x + delta, one row for each change of one sequence, all rows of a sequence beside
the same clean one. Attention is causal, so positions before a change are clean, and nothing is left out: the result is
exact for the stored activations.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.shared.lm.tail import Tail


class CountingTail(Tail):
    """A tail that knows how many positions it was given."""

    n_tokens = 0

    def hidden(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        self.n_tokens += x.shape[0] * x.shape[1]
        return super().hidden(x)


BATCH_TOKENS = 4096
"""Positions that the tail is given at a time, at most (or one sequence)."""


class Clean(NamedTuple):
    """What the language model says of a sequence as it is."""

    log_probs: Float[Tensor, "length vocabulary"]
    probs: Float[Tensor, "length vocabulary"]
    negative_entropy: Float[Tensor, " length"]

    @classmethod
    def of(cls, logits: Float[Tensor, "length vocabulary"]) -> "Clean":
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        return cls(log_probs, probs, (probs * log_probs).sum(-1))


class Compared(NamedTuple):
    """Some positions of some changed rows, with the logits of the next token."""

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    clean: Clean
    logits: Float[Tensor, "n vocabulary"]
    log_total: Float[Tensor, " n"]
    """log sum e^logits."""

    @property
    def kl(self) -> Float[Tensor, " n"]:
        """KL(clean || changed) in nats, at least 0: sum p log p - sum p l + log sum e^l."""
        product = torch.linalg.vecdot(self.clean.probs[self.position], self.logits)
        return (self.clean.negative_entropy[self.position] - product + self.log_total).clamp(min=0)

    def ce_change(self, targets: Int[Tensor, " n_targets"]) -> Float[Tensor, " n"]:
        """Rise of the cross-entropy in nats; 0 where no target follows. `targets` are of the whole sequence."""
        has_target = self.position < len(targets)
        chosen = targets.to(self.position.device)[self.position.clamp(max=max(0, len(targets) - 1))]
        after = self.logits.gather(1, chosen[:, None]).squeeze(1) - self.log_total
        return torch.where(has_target, self.clean.log_probs[self.position, chosen] - after, 0.0)

    @property
    def gain(self) -> Float[Tensor, "n vocabulary"]:
        """Rise of each token's probability."""
        return (self.logits - self.log_total[:, None]).exp() - self.clean.probs[self.position]


@torch.inference_mode()
def compared(
    tail: Tail,
    x: Float[Tensor, "length d_model"],
    deltas: Float[Tensor, "m length d_model"],
    first: Int[Tensor, " m"],
    stop: Int[Tensor, " m"],
) -> Iterator[Compared]:
    """One sequence with each of m changes alone, compared at positions first..stop-1 of each, a few at a time."""
    longest = int(stop.max())
    x = x[:longest].to(tail.device, torch.float32)
    clean = Clean.of(tail.unembed(tail.hidden(x[None])[0]))
    per_batch = max(1, BATCH_TOKENS // longest)
    for start in range(0, len(deltas), per_batch):
        part = slice(start, start + per_batch)
        hidden = tail.hidden(x + deltas[part, :longest].to(tail.device))
        counts = stop[part] - first[part]
        row = torch.arange(len(counts)).repeat_interleave(counts)
        position = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + first[part][row]
        row, position = row.to(tail.device), position.to(tail.device)
        for block, (logits,) in tail.slices(hidden[row, position]):
            yield Compared(row[block] + start, position[block], clean, logits, logits.logsumexp(-1))
