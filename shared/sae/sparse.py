"""Sparse codes: which latents are active at each token, selected exactly and decoded without a dense matrix.

All on float32 tensors of one device. The fast paths were chosen by measurement on a CPU; see tests/bench/. Elsewhere
training keeps to static shapes: as many entries whatever their values, those without a meaning being zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import static_shapes

SELECT_GROUPS = 16
MOST_REACHING = 4
"""Times k: more entries of a row than that are searched as they are."""
ROWS = 128
"""Rows of a slice that stays in cache."""
CACHED, READS, PANEL = 1 << 20, 32, 64
"""Numbers of rows beyond which, and readings of each from which on, panels of so many columns are faster."""
SAMPLE = 65_536
"""Entries that a batch's lower bound is estimated from."""


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The code of n tokens, row by row: token i has entries offsets[i] : offsets[i + 1], of distinct latents.

    An entry may be an explicit zero (a top-k that found fewer than k positive pre-activations). `values` may carry a
    gradient; the pattern (latents, offsets) never does, and what is derived from it is computed once.
    """

    values: Float[Tensor, " n_entries"]
    latents: Int[Tensor, " n_entries"]
    offsets: Int[Tensor, " n_tokens_plus_1"]
    d_sae: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was computed from the pattern, shared by all codes on it."""
    per_token: int | None = None
    """Entries of every token, where all have as many."""
    parked: bool = False
    """Whether entries of latent number d_sae stand for nothing; their values are 0."""

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    @property
    def columns(self) -> Int[Tensor, " n_entries"]:
        """Latent of each entry, a parked one's being the last: there it adds nothing."""
        return self.latents.clamp(max=self.d_sae - 1) if self.parked else self.latents

    @property
    def rows(self) -> Int[Tensor, " n_entries"]:
        """Token of each entry."""
        if "rows" not in self._derived:
            tokens = torch.arange(self.n_tokens, device=self.offsets.device)
            counts = self.offsets.diff()
            self._derived["rows"] = torch.repeat_interleave(tokens, counts, output_size=len(self.latents))
        return self._derived["rows"]

    @property
    def by_latent(self) -> "LatentOrder":
        """The entries sorted by latent, then by token."""
        if "by_latent" not in self._derived:
            self._derived["by_latent"] = _latent_order(self)
        return self._derived["by_latent"]

    def detached(self) -> "SparseCode":
        """The same entries without a gradient, on the same pattern."""
        return self.with_values(self.values.detach())

    def with_values(self, values: Float[Tensor, " n_entries"]) -> "SparseCode":
        """Other values on the same pattern."""
        return SparseCode(values, self.latents, self.offsets, self.d_sae, self._derived, self.per_token, self.parked)

    def to(self, device: torch.device | str) -> "SparseCode":
        """The same code on a device; itself where it is there."""
        if self.values.device == torch.device(device):
            return self
        values, latents, offsets = (one.to(device) for one in (self.values, self.latents, self.offsets))
        return SparseCode(values, latents, offsets, self.d_sae, {}, self.per_token, self.parked)

    def to_torch_sparse(self) -> Tensor:
        """The same code as a coalesced torch.sparse_coo tensor [n_tokens, d_sae]; explicit zeros stay."""
        places = torch.stack((self.rows, self.columns))
        return torch.sparse_coo_tensor(
            places, self.values, (self.n_tokens, self.d_sae), check_invariants=False
        ).coalesce()

    def dense(self) -> Float[Tensor, "n_tokens d_sae"]:
        """The same code as a matrix."""
        empty = self.values.new_zeros(self.n_tokens, self.d_sae)
        return empty.index_put_((self.rows, self.columns), self.values, accumulate=self.parked)

    def take(self, tokens: Int[Tensor, " m"]) -> tuple["SparseCode", Int[Tensor, " n_taken"]]:
        """The code of the given tokens, in that order (one may come twice), and where its entries stand in this one."""
        n = None if self.per_token is None else self.per_token * len(tokens)
        return self._taken(tokens, n)

    def permuted(self, tokens: Int[Tensor, " n_tokens"]) -> "SparseCode":
        """The code of all tokens in another order."""
        return self._taken(tokens, len(self.latents))[0]

    def _taken(self, tokens: Int[Tensor, " m"], n: int | None) -> tuple["SparseCode", Int[Tensor, " n_taken"]]:
        """`take`, of `n` entries (None: counted)."""
        counts = self.offsets.diff()[tokens]
        offsets = self.offsets.new_zeros(len(tokens) + 1)
        torch.cumsum(counts, 0, out=offsets[1:])
        n = int(offsets[-1]) if n is None else n
        shift = torch.repeat_interleave(self.offsets[tokens] - offsets[:-1], counts, output_size=n)
        at = torch.arange(n, device=shift.device) + shift
        values, latents = self.values.index_select(0, at), self.latents.index_select(0, at)
        return SparseCode(values, latents, offsets, self.d_sae, {}, self.per_token, self.parked), at

    def part(self, first: int, stop: int) -> "SparseCode":
        """The code of latents first..stop-1 alone, numbered from 0."""
        if (first, stop) == (0, self.d_sae):
            return self
        if static_shapes(self.values):
            inside = (self.latents >= first) & (self.latents < stop)
            latents = torch.where(inside, self.latents - first, stop - first)
            values = torch.where(inside, self.values, 0.0)
            return SparseCode(values, latents, self.offsets, stop - first, {}, self.per_token, parked=True)
        at = ((self.latents >= first) & (self.latents < stop)).nonzero().squeeze(1)
        counts = torch.bincount(self.rows[at], minlength=self.n_tokens)
        offsets = torch.zeros_like(self.offsets)
        offsets[1:] = counts.cumsum(0)
        return SparseCode(self.values.index_select(0, at), self.latents[at] - first, offsets, stop - first)


class LatentOrder(NamedTuple):
    """The entries of a code sorted by latent, computed once and used for every weight's gradient."""

    order: Int[Tensor, " n_entries"]
    tokens: Int[Tensor, " n_entries"]
    """Token of each entry, in that order."""
    edges: Int[Tensor, " d_sae_plus_1"]
    """Where each latent's entries begin."""

    def weighted_rows(
        self, values: Float[Tensor, " n_entries"], rows: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """For each latent, the sum over its entries of value times the token's row."""
        return _weighted_sums(rows, self.tokens, self.edges, values[self.order])


def _latent_order(code: SparseCode) -> LatentOrder:
    if static_shapes(code.latents) or code.d_sae > 1 << 16:
        order = torch.argsort(code.latents, stable=True)
    else:  # NumPy counts numbers of 16 bits, where torch compares: 4 times as fast
        order = torch.from_numpy(np.argsort(code.latents.numpy().astype(np.uint16), kind="stable"))
    if static_shapes(code.latents):  # a bincount would read the largest latent
        every = torch.arange(code.d_sae + 1, device=code.latents.device)
        edges = torch.searchsorted(code.latents[order], every)
    else:
        counts = torch.bincount(code.latents, minlength=code.d_sae)
        edges = F.pad(counts.cumsum(0), (1, 0))
    return LatentOrder(order, code.rows[order], edges)


def join_codes(parts: Sequence[SparseCode]) -> SparseCode:
    """The codes of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    ends = torch.tensor([0, *(len(part.values) for part in parts)]).cumsum(0)
    offsets = [part.offsets[:-1] + end for part, end in zip(parts, ends.tolist(), strict=False)]
    last = parts[-1].offsets[-1:] + int(ends[-2])
    values, latents = torch.cat([part.values for part in parts]), torch.cat([part.latents for part in parts])
    widths = {part.per_token for part in parts}
    per_token = widths.pop() if len(widths) == 1 else None
    return SparseCode(values, latents, torch.cat([*offsets, last]), parts[0].d_sae, per_token=per_token)


def select_topk(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest entries of each row, exactly, in no particular order: (values, latents).

    In two stages where that is faster: of the maxima over strided groups k reach the k-th largest, so that no entry
    below that is among the k best.
    """
    n_groups, left = divmod(pre.shape[1], SELECT_GROUPS)
    selected = None
    if not left and n_groups >= 2 * k:
        if static_shapes(pre):
            selected = _of_best_groups(pre, k, n_groups)
        elif pre.dtype != torch.bfloat16:  # which NumPy has not
            selected = _above_maxima(pre.detach().numpy(), k, n_groups)
    if selected is None:
        values, latents = pre.topk(k, dim=-1, sorted=False)
        return values, latents
    return selected


def _of_best_groups(pre: Float[Tensor, "n d_sae"], k: int, n_groups: int) -> tuple[Tensor, Tensor]:
    """`select_topk` from the k groups of the largest maxima."""
    n = len(pre)
    grouped = pre.view(n, SELECT_GROUPS, n_groups)
    best = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, best.unsqueeze(1).expand(n, SELECT_GROUPS, k)).view(n, SELECT_GROUPS * k)
    values, at = candidates.topk(k, dim=-1, sorted=False)
    return values, torch.div(at, k, rounding_mode="floor") * n_groups + best.gather(1, at % k)


def _above_maxima(pre: Float[ndarray, "n d_sae"], k: int, n_groups: int) -> tuple[Tensor, Tensor] | None:
    """`select_topk` from the few entries that reach the k-th largest maximum of a group; None if they are many (ties)
    or too few (NaN). By NumPy, whose partition and search are several times as fast as torch's on a CPU.
    """
    n, d_sae = pre.shape
    maxima = pre.reshape(n, SELECT_GROUPS, n_groups).max(1)
    least = np.partition(maxima, n_groups - k, axis=1)[:, n_groups - k]
    at = np.flatnonzero(pre >= least[:, None])
    row = at // d_sae
    counts = np.bincount(row, minlength=n)
    most = int(counts.max(initial=k))
    if most > MOST_REACHING * k or counts.min(initial=k) < k:
        return None
    place = np.arange(len(at)) + (most * np.arange(n) - np.cumsum(counts) + counts)[row]
    values, latents = np.full((n, most), -np.inf, pre.dtype), np.zeros((n, most), np.int64)
    values.reshape(-1)[place], latents.reshape(-1)[place] = pre.reshape(-1)[at], at - d_sae * row
    best, which = torch.from_numpy(values).topk(k, dim=1, sorted=False)
    return best, torch.from_numpy(latents).gather(1, which)


def topk_code(pre: Float[Tensor, "n d_sae"], k: int) -> SparseCode:
    """TopK (Gao et al. 2024, arXiv:2406.04093): relu of the k largest pre-activations of each token."""
    values, latents = select_topk(pre, k)
    offsets = torch.arange(0, values.numel() + 1, k, device=pre.device)
    return SparseCode(values.relu().flatten(), latents.flatten(), offsets, pre.shape[1], per_token=k)


def batchtopk_code(pre: Float[Tensor, "n d_sae"], k: int) -> SparseCode:
    """BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): the n * k largest positive entries of the whole batch.

    Exactly n * k entries, fewer only where fewer are positive. In two stages: a bound estimated from a strided sample
    leaves some 1.3 n k candidates, among which the last one kept is found exactly. With static shapes in one, and what
    is not positive is an explicit zero.
    """
    want, flat = len(pre) * k, pre.view(-1)
    if static_shapes(pre):
        at = flat.topk(want, sorted=False).indices.sort().values
        return from_flat(at, flat[at].relu(), pre.shape)
    candidates = _places(pre, _sampled_bound(flat, want) if want else 0.0)
    if len(candidates) < want:
        candidates = _places(pre, 0.0)
    values = flat[candidates]
    if len(values) > want:
        last = values.kthvalue(len(values) - want + 1).values
        keep = values > last
        # Of several entries that equal the last one, the first are kept.
        ties = (values == last).nonzero().squeeze(1)[: want - int(keep.sum())]
        keep[ties] = True
        candidates, values = candidates[keep], values[keep]
    return from_flat(candidates, values, pre.shape)


def threshold_code(
    pre: Float[Tensor, "n d_sae"], threshold: Float[Tensor, "*d_sae"], margin: float = 0.0
) -> SparseCode:
    """JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435): pre-activations above their latent's threshold.

    With a `margin`, pre-activations up to that far below a threshold are entries too, as they are: their gradient
    moves the threshold.
    """
    at = _places(pre, threshold - margin)
    return from_flat(at, pre.view(-1)[at], pre.shape)


def positive_code(activations: Float[Tensor, "n d_sae"]) -> SparseCode:
    """The positive entries of a dense code (all that are not zero, but for a gelu's)."""
    at = _places(activations, 0.0)
    return from_flat(at, activations.reshape(-1)[at], activations.shape)


def decode(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d_model"], b_dec: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "n_tokens d_model"]:
    """The reconstruction sum_j f_j W_dec[j] + b_dec (if any), reading only the rows of active latents."""
    out = _weighted_sums(W_dec, code.columns, code.offsets, code.values)
    return out if b_dec is None else out.add_(b_dec)


def _weighted_sums(
    rows: Float[Tensor, "n d_model"],
    at: Int[Tensor, " n_entries"],
    edges: Int[Tensor, " n_bags_plus_1"],
    weights: Float[Tensor, " n_entries"],
) -> Float[Tensor, "n_bags d_model"]:
    """For each bag, the sum over its entries of weight times row. On a CPU, rows that are read many times over are read
    in panels of columns that stay in cache.
    """

    def sums(part: Tensor) -> Tensor:
        return F.embedding_bag(at, part, edges, per_sample_weights=weights, mode="sum", include_last_offset=True)

    if static_shapes(rows) or rows.numel() <= CACHED or len(at) < READS * len(rows):
        return sums(rows)
    return torch.cat([sums(panel.contiguous()) for panel in rows.split(PANEL, dim=1)], dim=1)


def _places(x: Float[Tensor, "n d"], bound: float | Tensor) -> Int[Tensor, " n_above"]:
    """Where the flattened x exceeds the bound (a number, or one for each column), ascending.

    NumPy finds them 4 times as fast as torch does on a CPU.
    """
    if x.device.type != "cpu" or x.dtype == torch.bfloat16:  # which NumPy has not
        return (x > bound).view(-1).nonzero().squeeze(1)
    limit = bound.detach().numpy() if isinstance(bound, Tensor) else x.new_tensor(bound).numpy()
    return torch.from_numpy(np.flatnonzero(x.detach().numpy() > limit))


def _sampled_bound(flat: Float[Tensor, " n_entries"], want: int) -> float:
    """A value that surely (not certainly) at least `want` entries exceed; never below 0."""
    stride = max(1, flat.numel() // SAMPLE)
    stride += 1 - stride % 2  # odd, so that it walks through all columns
    sample = flat[::stride]
    share = min(1.0, 1.3 * want / flat.numel() + 1e-4)
    return max(0.0, float(sample.kthvalue(max(1, int((1 - share) * sample.numel()))).values))


def from_flat(at: Int[Tensor, " n_entries"], values: Float[Tensor, " n_entries"], shape: tuple[int, ...]) -> SparseCode:
    """A code from ascending positions in its flattened dense form."""
    n, d_sae = shape
    rows = torch.div(at, d_sae, rounding_mode="floor")
    if static_shapes(at):
        offsets = torch.searchsorted(rows, torch.arange(n + 1, device=at.device))
    else:
        offsets = torch.zeros(n + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return SparseCode(values, at - rows * d_sae, offsets, d_sae)
