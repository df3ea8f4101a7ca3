"""Position penalty: the code's variance between positions, which a slow code would otherwise spend on position."""

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.sae.ops import Code, group_dot, group_sums
from tcsae.train.batch import Batch

MEANS_DECAY = 0.99
"""Of the running mean code at each position."""


class PositionPenalty:
    """sum_j sum_p n_p (m_jp - m_j)^2 / n, by running means m over batches.

    The means are held constant in the gradient, 2 (m_jp - m_j) / n for every token at position p.
    """

    def __init__(self, n_positions: int, d: int, device: torch.device) -> None:
        self.sums = torch.zeros(n_positions, d, device=device)
        self.counts = torch.zeros(n_positions, device=device)

    def means(self) -> Float[Tensor, "n_positions d"]:
        """The mean code at each position; 0 where none has been seen."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def __call__(self, code: Code, batch: Batch) -> Float[Tensor, ""]:
        """The penalty at weight 1, this process's share; takes the batch into the means."""
        position = batch.positions()
        # The sums so far are known to all processes: one of them brings them in.
        decay = MEANS_DECAY if batch.group.is_first else 0.0
        new = group_sums(code, position, len(self.counts)).to(self.sums.dtype)
        self.sums.copy_(batch.group.sum_(self.sums * decay + new))
        # A bincount would wait for a GPU.
        n_new = torch.zeros_like(self.counts).index_add_(
            0, position, torch.ones_like(position, dtype=self.counts.dtype)
        )
        self.counts.copy_(batch.group.sum_(self.counts * decay + n_new))
        total = self.counts.sum().clamp(min=1)
        off = torch.where(self.counts[:, None] > 0, self.means() - self.sums.sum(0) / total, 0.0)
        value = (self.counts / total) @ off.square().sum(1)
        slope = group_dot(code, (2 / batch.n_whole) * off, position)
        return batch.group.share(value) + slope - slope.detach()
