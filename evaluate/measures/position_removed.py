"""Temporal measures of what is left of a code once its mean by position is taken out.

In a language model the slowest direction is the position: of a temporal SAE's code a tenth of the variance was
position, and all of its gain at lag 8. Of w, f less its document's mean, the covariance is taken given the position: of
pairs whose first members lie at one position, the mean of the first members is taken out, and that of the second ones.
Jaccard and dwell know only which latents are on, which no mean changes.

Kept are sums by position, not by group of documents: these figures have no interval.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tcsae.evaluate.measures.code_ops import Held, cells, entry_values
from tcsae.evaluate.measures.positions import FAR, View

if TYPE_CHECKING:
    from tcsae.evaluate.measures.temporal_sums import TemporalSums

LAGS = (1, FAR)


class PositionSums:
    """Sums by position (or bin of positions, `View.position`); w = f - m, m the document's mean."""

    def __init__(self, width: int, n_positions: int, device: torch.device | str = "cpu") -> None:
        self.n = torch.zeros(n_positions, dtype=torch.float64, device=device)
        self.w = torch.zeros(n_positions, width, device=device)
        self.n_pairs = self.n.new_zeros(len(LAGS), n_positions)
        self.pairs = self.w.new_zeros(len(LAGS), 2, n_positions, width)
        """w of the first and of the second members, by the first one's position."""
        self.overlap = self.n.new_zeros(n_positions, n_positions)
        """Sum over documents of c c' / n, c the document's tokens at a position."""

    def add(self, view: View, held: Held, mean: Float64[Tensor, "n_pieces d_sae"]) -> None:
        """A batch's code, and the means of its documents (or pieces)."""
        counts = self._add_labels(self.w, view, held, (view.position, view.piece), mean)
        self.n += counts.sum(0)
        self.overlap += counts.T @ (counts / counts.sum(1, keepdim=True).clamp(min=1))
        for i, lag in enumerate(LAGS):
            first = torch.where(view.to_end >= lag, view.position, -1)
            second = torch.where(view.from_start >= lag, view.position.roll(lag), -1)
            for table, labels in zip(self.pairs[i], (first, second), strict=True):
                counts = self._add_labels(table, view, held, (labels, view.piece), mean)
            self.n_pairs[i] += counts.sum(0)

    def _add_labels(
        self,
        table: Tensor,
        view: View,
        held: Held,
        labels: tuple[Int[Tensor, " n"], Int[Tensor, " n"]],
        mean: Float64[Tensor, "n_pieces d_sae"],
    ) -> Float64[Tensor, "n_pieces n_positions"]:
        """Add w by position; returns how many tokens of each piece have which."""
        position, piece = labels
        cells(held, position).add(table, entry_values(held))
        n_positions, known = len(self.n), position >= 0
        counts = torch.bincount((piece * n_positions + position)[known], minlength=view.n_pieces * n_positions)
        counts = counts.view(view.n_pieces, n_positions).double()
        table -= (counts.T @ mean).to(table.dtype)
        return counts

    def tensors(self) -> list[Tensor]:
        return [self.n, self.w, self.n_pairs, self.pairs, self.overlap]

    def to_cpu(self) -> None:
        """Move the sums, for good."""
        self.n, self.w, self.n_pairs, self.pairs, self.overlap = (one.cpu() for one in self.tensors())

    def figures(self, sums: "TemporalSums") -> dict[str, float]:
        """Pooled over latents; `sums` are of all groups of documents added up, with an axis of one."""
        n_pairs, variance = sums.n_pairs[0], self._variance(sums)
        within = sums.squares[0] - sums.between[0] - _square(self.w, self.n)
        figures = {}
        for i, lag in enumerate(LAGS):
            first, second = self.pairs[i].double()
            shared = (first * second / self.n_pairs[i].clamp(min=1)[:, None]).sum(0)
            around = 2 * sums.between[0] - sums.edges_m[0, :lag].sum(0)
            products = sums.products[0, lag - 1] - around + sums.m_squares[0, lag - 1] - shared
            figures[f"rho_{lag}_within"] = _ratio(products / n_pairs[lag - 1], within / self.n.sum())
        first, second = self.pairs[0].double()
        moved = 2 * sums.squares[0] - sums.edge_squares[0] - 2 * sums.products[0, 0]
        moved = moved - _square(second - first, self.n_pairs[0])
        figures["slowness"] = _ratio(moved / n_pairs[0], 2 * variance / self.n.sum())
        figures["document_share"] = self._document_share(sums, variance)
        return figures

    def _variance(self, sums: "TemporalSums") -> Float64[Tensor, " d_sae"]:
        """Sum of squares around the mean by position."""
        return sums.squares[0] - _square(sums.by_position[0], self.n)

    def _document_share(self, sums: "TemporalSums", variance: Tensor) -> float:
        """Bias-corrected, as `Ratio` has it."""
        by_position = sums.by_position[0].double()
        mean = by_position / self.n.clamp(min=1)[:, None]
        of_documents = by_position - self.w.double()  # m summed over the tokens at each position
        between = sums.between[0] - 2 * (mean * of_documents).sum(0) + (mean * (self.overlap @ mean)).sum(0)
        n, n_documents = self.n.sum(), sums.n_documents[0]
        share = between.sum() / variance.sum()
        return float(1 - (1 - share) * (n - 1) / (n - n_documents)) if n > n_documents > 1 else torch.nan


def _square(total: Tensor, n: Tensor) -> Float64[Tensor, " d_sae"]:
    """Sum over positions of total^2 / n."""
    return (1 / n.clamp(min=1)) @ total.double().square()


def _ratio(over: Tensor, under: Tensor) -> float:
    return float(over.sum() / under.sum())
