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

from tcsae.evaluate.measures.code_ops import (
    Cells,
    Held,
    Pairs,
    add_lag_products,
    by_latent,
    cells,
    compare_neighbours,
    compare_pairs,
    entry_values,
    take,
    token_sums,
)
from tcsae.evaluate.measures.core import join_codes
from tcsae.evaluate.measures.positions import LAGS, N_GROUPS, N_LABELS, Layout, View
from tcsae.shared.sae.ops import Code

N_LAGS = 32
N_BINS = 400
"""Of the relative distance between two codes, which lies in 0..2."""


UNGROUPED = ("permuted_by_position", "permuted_by_token", "permuted_token_squares")
BY_LAG = ("n_pairs", "products", "edges", "edges_m", "m_squares")


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
    distances: Float64[Tensor, "g 4 n_bins"]
    """Histogram of the relative distance: adjacent, permuted, joins of documents, restarts inside one."""
    energy: Float64[Tensor, " g"]
    """|f|^2."""
    magnitude: Float64[Tensor, " g"]
    """|f|_1."""

    def without(self, group: int | None) -> "TemporalSums":
        """All groups but one (None: all) added up, keeping an axis of one."""
        names = [field.name for field in fields(self) if field.name not in UNGROUPED]
        left = {name: getattr(self, name).sum(0, keepdim=True) for name in names}
        whole = replace(self, **left)
        return whole if group is None else whole.less(self, group, N_LAGS)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def cpu(self) -> "TemporalSums":
        return TemporalSums(*(one.cpu() for one in self.tensors()))

    def less(self, by_group: "TemporalSums", group: int, n_lags: int) -> "TemporalSums":
        """These sums over all groups without one of them; of the lags the first `n_lags`."""
        left = {}
        for name in [field.name for field in fields(self) if field.name not in UNGROUPED]:
            whole, part = getattr(self, name), getattr(by_group, name)[group : group + 1]
            left[name] = whole[:, :n_lags] - part[:, :n_lags] if name in BY_LAG else whole - part
        return replace(self, **left)


def no_sums(width: int, n_positions: int, device: torch.device | str = "cpu") -> TemporalSums:
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
        "distances": (4, N_BINS),
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
    return TemporalSums(**{name: one.to(device) for name, one in made.items()})


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


class Collector:
    """Adds up one system's sums, batch after batch."""

    def __init__(self, width: int, layout: Layout, device: torch.device | str = "cpu") -> None:
        """`device`: where codes and views come from."""
        self.sums = no_sums(width, layout.n_positions, device)
        self.positions = PositionSums(width, layout.n_positions, device)
        self.kept: Code | None = None

    def add(self, view: View, code: Code) -> None:
        """The code of a batch's counted tokens."""
        if not view.n:
            return
        held, moved = by_latent(code), by_latent(take(code, view.standing_in))
        of_tokens = token_sums(code)
        pieces, of_pieces = _Pieces(view), cells(held, view.piece)
        mean, active = self._add_documents(pieces, held, of_pieces)
        self.positions.add(view, held, mean)
        self._add_edges(view, held, of_pieces.look_up(mean))
        self.sums.active_first.index_add_(0, pieces.group, active)  # of the last tokens, it has been taken away
        add_lag_products(self.sums.products, self.sums.both, held, view.sequence, view.group)
        self._add_labels(view, held, moved)
        group = view.group[:-1][view.adjacent]
        for kind, (one, its_sums) in enumerate(((held, of_tokens), (moved, of_tokens.at(view.standing_in)))):
            pairs = compare_neighbours(one, its_sums, view.adjacent)
            self._add_jaccard(kind, pairs, group)
            self._add_distances(kind, pairs, group)
        self._add_across(view, code)
        self.sums.energy.index_add_(0, view.group, of_tokens.energy)
        self.sums.magnitude.index_add_(0, view.group, of_tokens.magnitude)

    def tensors(self) -> list[Tensor]:
        """All sums; over parts of a split they add up."""
        return [*self.sums.tensors(), *self.positions.tensors()]

    def to_cpu(self) -> None:
        self.sums = self.sums.cpu()
        self.positions.to_cpu()

    def pass_over(self, view: View, code: Code) -> None:
        """The code of tokens that are added up elsewhere; what comes next is compared with it."""
        if view.n:
            self._keep(view, code)

    def _keep(self, view: View, code: Code) -> Code:
        """The code of the tokens kept so far, then of these."""
        both = code if self.kept is None else join_codes([self.kept, code])
        self.kept = take(both, view.kept)
        return both

    def _add_documents(
        self, pieces: "_Pieces", held: Held, of_pieces: Cells
    ) -> tuple[Float64[Tensor, "n_pieces d_sae"], Float64[Tensor, "n_pieces d_sae"]]:
        """What depends on a document's own sums alone; returns the documents' means and numbers of active tokens."""
        sums, values = self.sums, entry_values(held)
        total, squares, active = sums.f.new_zeros(3, len(pieces.n), sums.f.shape[1])
        of_pieces.add(total, values)
        of_pieces.add(squares, values.square())
        of_pieces.add(active, values > 0)
        n, n_1 = pieces.n, pieces.n_pairs[:, 0]
        pairs = (n * (n - 1)).clamp(min=1)
        sums.n.index_add_(0, pieces.group, n)
        sums.n_documents.index_add_(0, pieces.group, torch.ones_like(n))
        sums.n_pairs.index_add_(0, pieces.group, pieces.n_pairs)
        one, total_squares = torch.ones_like(n), total.square()
        for into, weights, terms in (
            (sums.f, one, total),
            (sums.squares, one, squares),
            (sums.active, one, active),
            (sums.between, 1 / n, total_squares),
            (sums.permuted_m, n_1 / n, total),
            (sums.permuted_squares, n_1 / n, squares),
            (sums.permuted_products, n_1 / pairs, total_squares - squares),
            (sums.permuted_active, n_1 / n, active),
            (sums.permuted_both, n_1 / pairs, active.square() - active),
        ):
            into.addmm_(pieces.member * weights, terms)
        mean = total / n[:, None]
        for group in pieces.group.unique().cpu().tolist():
            ours = pieces.group == group
            sums.m_squares[group].addmm_(pieces.n_pairs[ours].T, mean[ours].square_())
        return mean, active

    def _add_edges(self, view: View, held: Held, mean: Tensor) -> None:
        """Tokens near the ends of their sequence: they are first or second of fewer pairs. `mean`: as the values."""
        sums, values = self.sums, entry_values(held)
        for distance in (view.from_start, view.to_end):
            near = cells(held, torch.where(distance < N_LAGS, view.group * N_LAGS + distance, -1))
            near.add(sums.edges.flatten(0, 1), values)
            near.add(sums.edges_m.flatten(0, 1), values * mean)
            end = cells(held, torch.where(distance == 0, view.group, -1))
            end.add(sums.edge_squares, values.square())
        end.add(sums.active_first, -(values > 0).double())

    def _add_labels(self, view: View, held: Held, moved: Held) -> None:
        """Sums by position and by token, as they are and with stand-ins."""
        sums, n_positions = self.sums, self.sums.by_position.shape[1]
        known = view.token < N_LABELS
        for labels, n_labels, into, counts in (
            (view.group * n_positions + view.position, n_positions, sums.by_position, sums.n_by_position),
            (torch.where(known, view.group * N_LABELS + view.token, -1), N_LABELS, sums.by_token, sums.n_by_token),
        ):
            cells(held, labels).add(into.flatten(0, 1), entry_values(held))
            counts.view(-1).add_(torch.bincount(labels[labels >= 0], minlength=N_GROUPS * n_labels))
        cells(held, torch.where(known, view.group, -1)).add(sums.token_squares, entry_values(held).square())
        values = entry_values(moved)
        cells(moved, view.position).add(sums.permuted_by_position, values)
        cells(moved, torch.where(known, view.token, -1)).add(sums.permuted_by_token, values)
        cells(moved, torch.where(known, 0, -1)).add(sums.permuted_token_squares, values.square())

    def _add_across(self, view: View, code: Code) -> None:
        """Pairs of tokens of different documents, or of different sequences of one."""
        both = self._keep(view, code)
        self._add_jaccard(2, compare_pairs(both, view.partners.first, view.partners.second), view.partners.group)
        for kind, pairs in ((2, view.joins), (3, view.restarts)):
            self._add_distances(kind, compare_pairs(both, pairs.first, pairs.second), pairs.group)

    def _add_jaccard(self, kind: int, pairs: Pairs, group: Int[Tensor, " m"]) -> None:
        """Pairs of tokens without any active latent do not count."""
        either = pairs.active - pairs.both
        self.sums.jaccard[:, kind, 0].index_add_(0, group, pairs.both / either.clamp(min=1))
        self.sums.jaccard[:, kind, 1].index_add_(0, group, (either > 0).double())

    def _add_distances(self, kind: int, pairs: Pairs, group: Int[Tensor, " m"]) -> None:
        """|f - f'|^2, and the same over |f|^2 + |f'|^2 (0 where both are zero)."""
        difference = (pairs.energy - 2 * pairs.dots).clamp(min=0)
        if kind < self.sums.difference.shape[1]:
            self.sums.difference[:, kind].index_add_(0, group, difference)
        relative = torch.where(pairs.energy > 0, difference / pairs.energy, 0.0)
        keys = group * N_BINS + (relative * (N_BINS / 2)).long().clamp(max=N_BINS - 1)
        self.sums.distances[:, kind].add_(torch.bincount(keys, minlength=N_GROUPS * N_BINS).view(N_GROUPS, N_BINS))


class _Pieces:
    """Of each document (or piece) in a batch: its tokens, its pairs at each lag, its group."""

    def __init__(self, view: View) -> None:
        self.n = torch.bincount(view.piece, minlength=view.n_pieces).double()
        ahead = torch.bincount(
            view.piece * (N_LAGS + 1) + view.to_end.clamp(max=N_LAGS), minlength=view.n_pieces * (N_LAGS + 1)
        ).view(view.n_pieces, N_LAGS + 1)
        # A token with e tokens after it in its sequence is the first of a pair at lags 1 to e.
        self.n_pairs = ahead.flip(1).cumsum(1).flip(1)[:, 1:].double()
        self.group = view.group.new_zeros(view.n_pieces).index_put_((view.piece,), view.group)
        self.member = (self.group == torch.arange(N_GROUPS, device=self.group.device)[:, None]).double()
        """[g, n_pieces]: 1 where a piece is of a group."""
