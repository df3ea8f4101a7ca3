"""Temporal and position measures: what is summed while codes stream by in document order.

Kept are sums per latent and group of documents, nothing per token. Pairs lie within a sequence: none crosses from one
sequence to the next, even of the same document. Means of a document are over all of its counted tokens (over those of
a piece, where it has more sequences than `batches.PIECE_SEQUENCES`). The null of permuted positions is the expected
value over all permutations within a document where that has a closed form (sums of products), and one fixed
permutation where it has none. `temporal_figures` makes figures of the sums.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from tcsae.evaluate.activity import Code, join_codes, n_latents
from tcsae.evaluate.code_ops import (
    active_counts,
    add_by_label,
    add_lag_products,
    entry_values,
    pair_stats,
    sums_by_label,
    take,
    token_energy,
)
from tcsae.evaluate.layout import N_GROUPS, N_LABELS, Layout, View
from tcsae.shared.codes import SparseCode

N_LAGS = 32
N_BINS = 400
"""Of the relative distance between two codes, which lies in 0..2."""


UNGROUPED = ("permuted_by_position", "permuted_by_token", "permuted_token_squares")


@dataclass(frozen=True, slots=True)
class TemporalSums:
    """Sums over the counted tokens; first axis: groups of documents. `g` below: the number of groups.

    f is a latent's value, m its mean over the document, n the document's tokens, n_k its pairs at lag k.
    """

    n: Float64[Tensor, " g"]
    n_pairs: Float64[Tensor, "g n_lags"]
    f: Float64[Tensor, "g d_sae"]
    squares: Float64[Tensor, "g d_sae"]
    active: Float64[Tensor, "g d_sae"]
    active_first: Float64[Tensor, "g d_sae"]
    """Active tokens that have a next one."""
    both: Float64[Tensor, "g d_sae"]
    """Pairs at lag 1 with both active."""
    edge_squares: Float64[Tensor, "g d_sae"]
    """f^2 of each sequence's first and last counted token."""
    products: Float64[Tensor, "g n_lags d_sae"]
    """f_t f_(t+k)."""
    edges: Float64[Tensor, "g n_lags d_sae"]
    """f of the tokens with k - 1 before (added: after) them in their sequence."""
    edges_m: Float64[Tensor, "g n_lags d_sae"]
    """The same of m f."""
    m_squares: Float64[Tensor, "g n_lags d_sae"]
    """n_k m^2, summed over documents."""
    between: Float64[Tensor, "g d_sae"]
    """n m^2."""
    permuted_m: Float64[Tensor, "g d_sae"]
    """n_1 m."""
    permuted_squares: Float64[Tensor, "g d_sae"]
    """n_1 times the document's mean f^2."""
    permuted_products: Float64[Tensor, "g d_sae"]
    """n_1 times the mean f f' over all pairs of a document: what is expected at lag 1 if positions are permuted."""
    permuted_active: Float64[Tensor, "g d_sae"]
    permuted_both: Float64[Tensor, "g d_sae"]
    """The same for active tokens, and for both being active."""
    by_position: Float32[Tensor, "g n_positions d_sae"]
    n_by_position: Float64[Tensor, "g n_positions"]
    by_token: Float32[Tensor, "g n_labels d_sae"]
    n_by_token: Float64[Tensor, "g n_labels"]
    token_squares: Float64[Tensor, "g d_sae"]
    """f^2 of the tokens that have a label."""
    permuted_by_position: Float32[Tensor, "n_positions d_sae"]
    permuted_by_token: Float32[Tensor, "n_labels d_sae"]
    permuted_token_squares: Float64[Tensor, "1 d_sae"]
    """With a stand-in's code at each token; not by group."""
    n_documents: Float64[Tensor, " g"]
    """Documents, or pieces of them."""
    jaccard: Float64[Tensor, "g 3 2"]
    """Sum and number of pairs: adjacent, permuted, partners in other documents."""
    difference: Float64[Tensor, "g 2"]
    """|f_t - f_(t+1)|^2: adjacent, permuted."""
    distances: Float64[Tensor, "g 3 n_bins"]
    """Histogram of the relative distance: adjacent, permuted, joins."""
    energy: Float64[Tensor, " g"]
    """|f|^2."""
    magnitude: Float64[Tensor, " g"]
    """|f|_1."""

    def without(self, group: int | None) -> "TemporalSums":
        """All groups but one (None: all) added up, keeping an axis of one."""
        keep = [one for one in range(N_GROUPS) if one != group]
        return replace(
            self,
            **{
                field.name: getattr(self, field.name)[keep].sum(0, keepdim=True)
                for field in fields(self)
                if field.name not in UNGROUPED
            },
        )


def no_sums(width: int, n_positions: int) -> TemporalSums:
    """Sums over nothing, for codes of `width` latents."""
    shapes: dict[str, tuple[int, ...]] = {
        "n": (),
        "n_pairs": (N_LAGS,),
        "by_position": (n_positions, width),
        "n_by_position": (n_positions,),
        "by_token": (N_LABELS, width),
        "n_by_token": (N_LABELS,),
        "n_documents": (),
        "jaccard": (3, 2),
        "difference": (2,),
        "distances": (3, N_BINS),
        "energy": (),
        "magnitude": (),
    }
    shapes |= dict.fromkeys(("products", "edges", "edges_m", "m_squares"), (N_LAGS, width))
    made = {
        field.name: torch.zeros(N_GROUPS, *shapes.get(field.name, (width,)), dtype=torch.float64)
        for field in fields(TemporalSums)
    }
    made["permuted_by_position"] = torch.zeros(n_positions, width)
    made["permuted_by_token"] = torch.zeros(N_LABELS, width)
    made["permuted_token_squares"] = torch.zeros(1, width, dtype=torch.float64)
    for name in ("by_position", "by_token"):  # the largest, and each cell sums few tokens
        made[name] = made[name].float()
    return TemporalSums(**made)


class Collector:
    """Adds up one system's sums, batch after batch."""

    def __init__(self, width: int, layout: Layout) -> None:
        self.sums = no_sums(width, layout.n_positions)
        self.kept: Code | None = None

    def add(self, view: View, code: Code) -> None:
        """The code of a batch's counted tokens."""
        if view.n:
            mean = self._add_documents(view, _Pieces(view), code)
            self._add_edges(view, code, mean)
            add_lag_products(self.sums.products, self.sums.both, code, view.sequence, view.group)
            self._add_labels(view, code)
            self._add_token_pairs(view, code)

    def _add_documents(self, view: View, per_piece: "_Pieces", code: Code) -> Float64[Tensor, "n_pieces d_sae"]:
        """What depends on a document's own sums alone; returns the documents' means."""
        sums, values = self.sums, entry_values(code)
        total, squares, active = (
            sums_by_label(code, one, view.piece, view.n_pieces) for one in (values, values * values, values > 0)
        )
        into, n, n_1 = per_piece.group, per_piece.n[:, None], per_piece.n_pairs[:, :1]
        pairs = (n * (n - 1)).clamp(min=1)
        mean = total / n
        sums.n.index_add_(0, into, per_piece.n)
        sums.n_documents.index_add_(0, into, torch.ones_like(per_piece.n))
        sums.n_pairs.index_add_(0, into, per_piece.n_pairs)
        sums.f.index_add_(0, into, total)
        sums.squares.index_add_(0, into, squares)
        sums.active.index_add_(0, into, active)
        sums.between.index_add_(0, into, total * mean)
        sums.permuted_m.index_add_(0, into, n_1 * mean)
        sums.permuted_squares.index_add_(0, into, n_1 * squares / n)
        sums.permuted_products.index_add_(0, into, n_1 * (total.square() - squares) / pairs)
        sums.permuted_active.index_add_(0, into, n_1 * active / n)
        sums.permuted_both.index_add_(0, into, n_1 * active * (active - 1) / pairs)
        sums.energy.index_add_(0, into, squares.sum(1))
        for group in range(N_GROUPS):
            ours = into == group
            if ours.any():
                sums.m_squares[group] += per_piece.n_pairs[ours].T @ mean[ours].square()
        magnitude = sums_by_label(code, values.abs(), view.group, N_GROUPS).sum(1)
        sums.magnitude.add_(magnitude)
        return mean

    def _add_edges(self, view: View, code: Code, mean: Tensor) -> None:
        """Tokens near the ends of their sequence: they are first or second of fewer pairs."""
        sums, width = self.sums, mean.shape[1]
        for distance in (view.from_start, view.to_end):
            at = (distance < N_LAGS).nonzero().squeeze(1)
            part, piece = take(code, at), view.piece[at]
            values, labels = entry_values(part), view.group[at] * N_LAGS + distance[at]
            means = mean[piece[part.rows], part.latents] if isinstance(part, SparseCode) else mean[piece]
            add_by_label(sums.edges.view(-1, width), part, values, labels)
            add_by_label(sums.edges_m.view(-1, width), part, values * means, labels)
            end = (distance == 0).nonzero().squeeze(1)
            part = take(code, end)
            add_by_label(sums.edge_squares, part, entry_values(part).square(), view.group[end])
        first = (view.to_end > 0).nonzero().squeeze(1)
        part = take(code, first)
        add_by_label(sums.active_first, part, entry_values(part) > 0, view.group[first])

    def _add_labels(self, view: View, code: Code) -> None:
        """Sums by position and by token, as they are and with stand-ins."""
        sums, values, width = self.sums, entry_values(code), n_latents(code)
        n_positions = sums.by_position.shape[1]
        place = torch.empty_like(view.standing_in)
        place[view.standing_in] = torch.arange(view.n)  # where each token stands in
        keys = view.group * n_positions + view.position
        add_by_label(sums.by_position.view(-1, width), code, values, keys)
        sums.n_by_position.view(-1).add_(torch.bincount(keys, minlength=N_GROUPS * n_positions))
        add_by_label(sums.permuted_by_position, code, values, view.position[place])
        common = (view.token < N_LABELS).nonzero().squeeze(1)
        part, keys = take(code, common), (view.group * N_LABELS + view.token)[common]
        add_by_label(sums.by_token.view(-1, width), part, entry_values(part), keys)
        sums.n_by_token.view(-1).add_(torch.bincount(keys, minlength=N_GROUPS * N_LABELS))
        add_by_label(sums.token_squares, part, entry_values(part).square(), view.group[common])
        standing = take(code, view.standing_in[common])
        add_by_label(sums.permuted_by_token, standing, entry_values(standing), view.token[common])
        add_by_label(sums.permuted_token_squares, standing, entry_values(standing).square(), torch.zeros_like(common))

    def _add_token_pairs(self, view: View, code: Code) -> None:
        """Jaccard, differences and distances of pairs of tokens."""
        at = view.adjacent.nonzero().squeeze(1)
        group = view.group[at]
        both = code if self.kept is None else join_codes([self.kept, code])
        self.kept = take(both, view.kept)
        compare = _Comparison(self.sums, code)
        compare.add(0, at, at + 1, group)
        compare.add(1, view.standing_in[at], view.standing_in[at + 1], group)
        across = _Comparison(self.sums, both)
        across.add_jaccard(2, *view.partners)
        across.add_distances(2, *view.joins)


class _Pieces:
    """Of each document (or piece) in a batch: its tokens, its pairs at each lag, its group."""

    def __init__(self, view: View) -> None:
        self.n = torch.bincount(view.piece, minlength=view.n_pieces).double()
        ahead = torch.bincount(
            view.piece * (N_LAGS + 1) + view.to_end.clamp(max=N_LAGS), minlength=view.n_pieces * (N_LAGS + 1)
        ).view(view.n_pieces, N_LAGS + 1)
        # A token with e tokens after it in its sequence is the first of a pair at lags 1 to e.
        self.n_pairs = ahead.flip(1).cumsum(1).flip(1)[:, 1:].double()
        self.group = torch.zeros(view.n_pieces, dtype=torch.int64).index_put_((view.piece,), view.group)


class _Comparison:
    """Compares pairs of tokens of one code."""

    def __init__(self, sums: TemporalSums, code: Code) -> None:
        self.sums, self.code = sums, code
        self.energy, self.active = token_energy(code), active_counts(code)

    def add(self, kind: int, first: Int[Tensor, " m"], second: Int[Tensor, " m"], group: Int[Tensor, " m"]) -> None:
        dots, both = pair_stats(self.code, first, second)
        self._jaccard(kind, both, first, second, group)
        difference, relative = self._distances(dots, first, second)
        self.sums.difference[:, kind].index_add_(0, group, difference)
        self._histogram(kind, relative, group)

    def add_jaccard(self, kind: int, first: Tensor, second: Tensor, group: Tensor) -> None:
        self._jaccard(kind, pair_stats(self.code, first, second)[1], first, second, group)

    def add_distances(self, kind: int, first: Tensor, second: Tensor, group: Tensor) -> None:
        dots, _ = pair_stats(self.code, first, second)
        self._histogram(kind, self._distances(dots, first, second)[1], group)

    def _jaccard(self, kind: int, both: Tensor, first: Tensor, second: Tensor, group: Tensor) -> None:
        """Pairs of tokens without any active latent do not count."""
        either = self.active[first] + self.active[second] - both
        some = (either > 0).double()
        self.sums.jaccard[:, kind, 0].index_add_(0, group, both / either.clamp(min=1))
        self.sums.jaccard[:, kind, 1].index_add_(0, group, some)

    def _distances(self, dots: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """|f - f'|^2, and the same over |f|^2 + |f'|^2 (0 where both are zero)."""
        energy = self.energy[first] + self.energy[second]
        difference = (energy - 2 * dots).clamp(min=0)
        return difference, torch.where(energy > 0, difference / energy, 0.0)

    def _histogram(self, kind: int, relative: Tensor, group: Tensor) -> None:
        keys = group * N_BINS + (relative * (N_BINS / 2)).long().clamp(max=N_BINS - 1)
        self.sums.distances[:, kind].add_(torch.bincount(keys, minlength=N_GROUPS * N_BINS).view(N_GROUPS, N_BINS))
