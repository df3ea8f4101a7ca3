"""What temporal measures do with codes, sparse or dense: take tokens, add up by label, compare pairs, lag products.

Sparse codes are held by latent, then token (`by_latent`): a latent's next firing is its next entry, and sums per latent
walk through their tables in order, which is several times as fast as by token.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tcsae.evaluate.measures.core import row_sums
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode

BLOCK_ENTRIES = 1 << 18
"""Of dense codes compared at a time: 1 MB, which stays in cache."""
SMALL_KEYS = 1 << 16
DENSE_COLUMNS = 128
"""Latents of a dense code whose spectra are taken at a time."""


class Entries(NamedTuple):
    """The entries of a sparse code, sorted by latent, then token."""

    values: Float[Tensor, " n_entries"]
    latents: Int[Tensor, " n_entries"]
    tokens: Int[Tensor, " n_entries"]
    n_tokens: int
    d_sae: int


Held = Entries | Float[Tensor, "_ d_sae"]
"""A code as the sums take it."""


class Cells(NamedTuple):
    """Where a code's entries (of a dense code: its rows) go in a table with one row a label."""

    chosen: Int[Tensor, " m"] | None
    """Those whose token has a label; None: all."""
    rows: Int[Tensor, " m"]
    latents: Int[Tensor, " m"] | None
    """None: a dense code."""

    def add(self, table: Float[Tensor, "n_labels d_sae"], values: Tensor) -> None:
        """Add `values`, which stand where the code's values do."""
        values = (values if self.chosen is None else values.index_select(0, self.chosen)).to(table.dtype)
        if self.latents is None:
            table.index_add_(0, self.rows, values)
        else:
            table.view(-1).index_add_(0, self.rows * table.shape[1] + self.latents, values)

    def look_up(self, table: Float[Tensor, "n_labels d_sae"]) -> Tensor:
        """What the table holds there."""
        if self.latents is None:
            return table.index_select(0, self.rows)
        return table.view(-1).index_select(0, self.rows * table.shape[1] + self.latents)


def take(code: Code, tokens: Int[Tensor, " m"]) -> Code:
    """The code of the given tokens, in that order; a token may be taken twice."""
    if not isinstance(code, SparseCode):
        return code.index_select(0, tokens)
    return code.take(tokens)[0]


def columns(code: Code, latents: Int[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """The code of the given latents as a matrix, on the CPU."""
    if not isinstance(code, SparseCode):
        return code[:, latents]
    place = torch.full((code.d_sae,), -1)
    place[latents] = torch.arange(len(latents))
    at = (place[code.latents] >= 0).nonzero().squeeze(1)
    made = torch.zeros(code.n_tokens, len(latents))
    made.view(-1)[code.rows[at] * len(latents) + place[code.latents[at]]] = code.values[at]
    return made


def by_latent(code: Code) -> Held:
    """The same code, as the sums take it."""
    if not isinstance(code, SparseCode):
        return code
    if code.latents.device.type == "cpu":
        keys = code.latents.numpy()
        # NumPy sorts 16-bit integers by radix, some ten times faster.
        keys = keys.astype(np.uint16) if code.d_sae <= SMALL_KEYS else keys
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
    else:
        order = torch.argsort(code.latents, stable=True)
    values, latents, tokens = (one.index_select(0, order) for one in (code.values, code.latents, code.rows))
    return Entries(values, latents, tokens, code.n_tokens, code.d_sae)


def entry_values(code: Code | Entries) -> Tensor:
    return code if isinstance(code, Tensor) else code.values


def cells(held: Held, labels: Int[Tensor, " n"]) -> Cells:
    """Where to add, by the label of each token; -1: nowhere."""
    rows = labels.index_select(0, held.tokens) if isinstance(held, Entries) else labels
    latents = held.latents if isinstance(held, Entries) else None
    if bool((labels >= 0).all()):
        return Cells(None, rows, latents)
    chosen = where(rows >= 0)
    return Cells(chosen, rows.index_select(0, chosen), None if latents is None else latents.index_select(0, chosen))


def where(mask: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    """The places of what is true. NumPy finds them 4 times as fast as torch does on a CPU."""
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


class TokenSums(NamedTuple):
    """Of each token: |f|^2, |f|_1, number of active latents."""

    energy: Float64[Tensor, " n"]
    magnitude: Float64[Tensor, " n"]
    active: Float64[Tensor, " n"]

    def at(self, tokens: Int[Tensor, " m"]) -> "TokenSums":
        return TokenSums(*(one.index_select(0, tokens) for one in self))


def token_sums(code: Code) -> TokenSums:
    values = entry_values(code)
    return TokenSums(*(row_sums(code, one) for one in (values.square(), values.abs(), values > 0)))


class Pairs(NamedTuple):
    """What m pairs of tokens have in common, f and f'."""

    dots: Float64[Tensor, " m"]
    both: Float64[Tensor, " m"]
    """Latents active in both."""
    energy: Float64[Tensor, " m"]
    """|f|^2 + |f'|^2."""
    active: Float64[Tensor, " m"]
    """Latents active in the one, and in the other: counted twice where in both."""


def compare_pairs(code: Code, first: Int[Tensor, " m"], second: Int[Tensor, " m"]) -> Pairs:
    """Any two tokens a pair."""
    ours, theirs = take(code, first), take(code, second)
    dots, both = torch.zeros(2, len(first), dtype=torch.float64, device=first.device)
    if isinstance(ours, SparseCode) and isinstance(theirs, SparseCode):
        _compare_sparse(ours, theirs, dots, both)
    else:
        _compare_rows(entry_values(ours), entry_values(theirs), dots, both)
    one, other = token_sums(ours), token_sums(theirs)
    return Pairs(dots, both, one.energy + other.energy, one.active + other.active)


def compare_neighbours(held: Held, of_tokens: TokenSums, adjacent: Bool[Tensor, " n_minus_1"]) -> Pairs:
    """The pairs of each token and the next, where they are `adjacent`."""
    at = where(adjacent)
    dots, both = torch.zeros(2, len(of_tokens.energy), dtype=torch.float64, device=at.device)
    if isinstance(held, Entries):
        next_to = (held.tokens[1:] == held.tokens[:-1] + 1) & (held.latents[1:] == held.latents[:-1])
        one = where(next_to)
        token, f, f_next = (part.index_select(0, one) for part in (held.tokens, held.values, held.values[1:]))
        dots.index_add_(0, token, (f * f_next).double())
        both.index_add_(0, token, ((f > 0) & (f_next > 0)).double())
    else:
        _compare_rows(held[:-1], held[1:], dots, both)
    here, there = of_tokens.at(at), of_tokens.at(at + 1)
    return Pairs(dots[at], both[at], here.energy + there.energy, here.active + there.active)


def _compare_sparse(ours: SparseCode, theirs: SparseCode, dots: Tensor, both: Tensor) -> None:
    """Row by row, into `dots` and `both`; one side dense, a few rows at a time."""
    size = max(1, BLOCK_ENTRIES // ours.d_sae)
    dense = ours.values.new_zeros(size * ours.d_sae)  # wiped after each block
    rows, their_rows = ours.rows, theirs.rows
    for start in range(0, len(dots), size):
        stop = min(start + size, len(dots))
        one, other = (slice(int(side.offsets[start]), int(side.offsets[stop])) for side in (ours, theirs))
        keys = (their_rows[other] - start) * ours.d_sae + theirs.latents[other]
        dense.index_copy_(0, keys, theirs.values[other])
        met = dense.index_select(0, (rows[one] - start) * ours.d_sae + ours.latents[one])
        dense.index_fill_(0, keys, 0.0)
        dots.index_add_(0, rows[one], (met * ours.values[one]).double())
        both.index_add_(0, rows[one], ((met > 0) & (ours.values[one] > 0)).double())


def _compare_rows(ours: Tensor, theirs: Tensor, dots: Tensor, both: Tensor) -> None:
    """The same of dense rows, a block at a time."""
    size = max(1, BLOCK_ENTRIES // max(1, ours.shape[1]))
    for start in range(0, len(ours), size):
        part = slice(start, min(start + size, len(ours)))
        a, b = ours[part], theirs[part]
        dots[part] = (a * b).sum(1, dtype=torch.float64)
        both[part] = ((a > 0) & (b > 0)).sum(1).double()


def add_lag_products(
    products: Float64[Tensor, "n_groups n_lags d_sae"],
    persisting: Float64[Tensor, "n_groups d_sae"],
    held: Held,
    sequence: Int[Tensor, " n"],
    group: Int[Tensor, " n"],
) -> None:
    """Add sum f_t f_(t+k) to `products`[:, k - 1] and, for k = 1, how often a latent is active at both to `persisting`.

    Over pairs of tokens of one sequence, whose tokens are consecutive; `group` is that of a sequence's document.
    """
    if isinstance(held, Entries):
        _add_sparse_products(products, persisting, held, sequence, group)
    elif len(held):
        _add_dense_products(products, held, sequence, group)
        met = (held[1:] > 0) & (held[:-1] > 0) & (sequence[1:] == sequence[:-1])[:, None]
        persisting.index_add_(0, group[:-1], met.double())


def _add_dense_products(products: Tensor, code: Tensor, sequence: Tensor, group: Tensor) -> None:
    """All lags at once, by the power spectrum of each sequence; padded, so that no end meets the beginning."""
    n_groups, n_lags, width = products.shape
    _, row, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    offset = torch.arange(len(code), device=code.device) - starts[row]
    size = _fast_size(int(counts.max()) + n_lags)
    for first in range(0, width, DENSE_COLUMNS):
        part = slice(first, first + DENSE_COLUMNS)
        values = code[:, part]
        padded = values.new_zeros(len(counts), size, values.shape[1])
        padded[row, offset] = values
        # Time last and contiguous: 15 times as fast as along a strided axis.
        spectrum = torch.fft.rfft(padded.transpose(1, 2).contiguous().double(), dim=2)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        total = power.new_zeros(n_groups, *power.shape[1:]).index_add_(0, group[starts], power)
        lags = torch.fft.irfft(total.to(torch.complex128), n=size, dim=2)
        products[:, :, part] += lags[:, :, 1 : n_lags + 1].transpose(1, 2)


def _fast_size(size: int) -> int:
    """The next size of factors 2, 3 and 5: a transform of 159 takes ten times as long as one of 160."""
    left = size
    for factor in (2, 3, 5):
        while left % factor == 0:
            left //= factor
    return size if left == 1 else _fast_size(size + 1)


def _add_sparse_products(products: Tensor, persisting: Tensor, held: Entries, sequence: Tensor, group: Tensor) -> None:
    """One key for latent and position, apart by more than all lags between latents and between sequences."""
    _, n_lags, width = products.shape
    device = sequence.device
    position = torch.arange(held.n_tokens, device=device) + sequence * n_lags
    stride = int(position[-1]) + n_lags + 1 if held.n_tokens else 1
    keys = held.latents * stride + position.index_select(0, held.tokens)
    cell = (group * n_lags - 1).index_select(0, held.tokens) * width + held.latents
    at, value = torch.arange(len(keys), device=device), held.values
    for step in range(1, n_lags + 1):
        at = at[: int(torch.searchsorted(at, len(keys) - step))]
        lag = keys.index_select(0, at + step) - keys.index_select(0, at)
        near = where(lag <= n_lags)
        at, lag = at.index_select(0, near), lag.index_select(0, near)  # what is too far stays so at the next step
        if not len(at):
            break
        ours, theirs, into = value.index_select(0, at), value.index_select(0, at + step), cell.index_select(0, at)
        products.view(-1).index_add_(0, into + lag * width, (ours * theirs).double())
        if step == 1:  # no firing lies between two at lag 1
            next_to = at.index_select(0, where((lag == 1) & (ours > 0) & (theirs > 0)))
            rows = group.index_select(0, held.tokens.index_select(0, next_to))
            persisting.view(-1).index_add_(
                0, rows * width + held.latents.index_select(0, next_to), torch.ones_like(rows, dtype=torch.float64)
            )
