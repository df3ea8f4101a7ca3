"""What temporal measures do with codes, sparse or dense: take tokens, add up by label, compare pairs, lag products."""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tcsae.evaluate.activity import Code, n_latents
from tcsae.shared.codes import SparseCode

PAIR_BLOCK = 256
"""Pairs compared at a time, one side dense: 4 MB at 4096 latents."""
SMALL_KEYS = 1 << 16
DENSE_COLUMNS = 128
"""Latents of a dense code whose spectra are taken at a time."""


def take(code: Code, tokens: Int[Tensor, " m"]) -> Code:
    """The code of the given tokens, in that order; a token may be taken twice."""
    if not isinstance(code, SparseCode):
        return code[tokens]
    counts = code.offsets.diff()[tokens]
    offsets = torch.zeros(len(tokens) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    shift = code.offsets[tokens] - offsets[:-1]
    at = torch.arange(int(offsets[-1])) + torch.repeat_interleave(shift, counts, output_size=int(offsets[-1]))
    return SparseCode(code.values[at], code.latents[at], offsets, code.d_sae)


def add_by_label(total: Float[Tensor, "n_labels d_sae"], code: Code, values: Tensor, labels: Int[Tensor, " n"]) -> None:
    """Add to `total`, latent by latent, `values` (which stand where the code's values do) by their token's label."""
    values = values.to(total.dtype)
    if isinstance(code, SparseCode):
        total.view(-1).index_add_(0, labels[code.rows] * total.shape[1] + code.latents, values)
    else:
        total.index_add_(0, labels, values)


def sums_by_label(
    code: Code, values: Tensor, labels: Int[Tensor, " n"], n_labels: int
) -> Float64[Tensor, "n_labels d_sae"]:
    """What `add_by_label` adds to zeros."""
    total = torch.zeros(n_labels, n_latents(code), dtype=torch.float64)
    add_by_label(total, code, values, labels)
    return total


def entry_values(code: Code) -> Tensor:
    return code.values if isinstance(code, SparseCode) else code


def pair_stats(
    code: Code, first: Int[Tensor, " m"], second: Int[Tensor, " m"]
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """(f . f', number of latents active in both) of m pairs of tokens."""
    dots, both = (torch.zeros(len(first), dtype=torch.float64) for _ in range(2))
    if not isinstance(code, SparseCode):
        for start in range(0, len(first), PAIR_BLOCK):
            part = slice(start, start + PAIR_BLOCK)
            a, b = code[first[part]], code[second[part]]
            dots[part] = (a * b).sum(1, dtype=torch.float64)
            both[part] = ((a > 0) & (b > 0)).sum(1).double()
        return dots, both
    dense = torch.zeros(min(PAIR_BLOCK, len(first)) * code.d_sae)  # one side, wiped after each block
    for start in range(0, len(first), PAIR_BLOCK):
        part = slice(start, start + PAIR_BLOCK)
        ours, theirs = take(code, first[part]), take(code, second[part])
        assert isinstance(ours, SparseCode) and isinstance(theirs, SparseCode)
        keys, rows = theirs.rows * code.d_sae + theirs.latents, ours.rows
        dense[keys] = theirs.values
        met = dense[rows * code.d_sae + ours.latents]
        dense[keys] = 0.0
        dots[part].index_add_(0, rows, (met * ours.values).double())
        both[part].index_add_(0, rows, ((met > 0) & (ours.values > 0)).double())
    return dots, both


def add_lag_products(
    products: Float64[Tensor, "n_groups n_lags d_sae"],
    persisting: Float64[Tensor, "n_groups d_sae"],
    code: Code,
    sequence: Int[Tensor, " n"],
    group: Int[Tensor, " n"],
) -> None:
    """Add sum f_t f_(t+k) to `products`[:, k - 1] and, for k = 1, how often a latent is active at both to `persisting`.

    Over pairs of tokens of one sequence, whose tokens are consecutive; `group` is that of a sequence's document.
    """
    if isinstance(code, SparseCode):
        _add_sparse_products(products, persisting, code, sequence, group)
    elif len(code):
        _add_dense_products(products, code, sequence, group)
        met = (code[1:] > 0) & (code[:-1] > 0) & (sequence[1:] == sequence[:-1])[:, None]
        persisting.index_add_(0, group[:-1], met.double())


def _add_dense_products(products: Tensor, code: Tensor, sequence: Tensor, group: Tensor) -> None:
    """All lags at once, by the power spectrum of each sequence; padded, so that no end meets the beginning."""
    n_groups, n_lags, width = products.shape
    _, row, counts = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    offset = torch.arange(len(code)) - starts[row]
    size = int(counts.max()) + n_lags
    for first in range(0, width, DENSE_COLUMNS):
        part = slice(first, first + DENSE_COLUMNS)
        values = code[:, part].double()
        padded = torch.zeros(len(counts), size, values.shape[1], dtype=torch.float64)
        padded[row, offset] = values
        power = torch.fft.rfft(padded, dim=1).abs().square()
        total = torch.zeros(n_groups, *power.shape[1:], dtype=torch.float64).index_add_(0, group[starts], power)
        products[:, :, part] += torch.fft.irfft(total.to(torch.complex128), n=size, dim=1)[:, 1 : n_lags + 1]


def _add_sparse_products(
    products: Tensor, persisting: Tensor, code: SparseCode, sequence: Tensor, group: Tensor
) -> None:
    """Entries sorted by latent, then token: a latent's next firings are its next entries."""
    _, n_lags, width = products.shape
    order = _stable_order(code.latents, width)
    token, latent, value = code.rows[order], code.latents[order], code.values[order]
    ours = sequence[token]
    at = torch.arange(len(token))
    for step in range(1, n_lags + 1):
        at = at[at + step < len(token)]
        other = at + step
        lag = token[other] - token[at]
        near = (latent[other] == latent[at]) & (ours[other] == ours[at]) & (lag <= n_lags)
        at, other, lag = at[near], other[near], lag[near]  # what is too far now stays so at the next step
        if not len(at):
            break
        row = group[token[at]]
        keys = (row * n_lags + lag - 1) * width + latent[at]
        products.view(-1).index_add_(0, keys, (value[at] * value[other]).double())
        next_to = (lag == 1) & (value[at] > 0) & (value[other] > 0)
        persisting.view(-1).index_add_(
            0, (row * width + latent[at])[next_to], torch.ones(int(next_to.sum()), dtype=torch.float64)
        )


def _stable_order(latents: Int[Tensor, " n"], width: int) -> Int[Tensor, " n"]:
    keys = latents.numpy()
    # Numpy sorts 16-bit integers by radix, some ten times faster.
    return torch.from_numpy(np.argsort(keys.astype(np.uint16) if width <= SMALL_KEYS else keys, kind="stable"))


def token_energy(code: Code) -> Float64[Tensor, " n"]:
    """|f|^2 of each token."""
    values = entry_values(code).double().square()
    if isinstance(code, SparseCode):
        return torch.zeros(code.n_tokens, dtype=torch.float64).index_add_(0, code.rows, values)
    return values.sum(1)


def active_counts(code: Code) -> Float64[Tensor, " n"]:
    """Active latents of each token."""
    on = (entry_values(code) > 0).double()
    if isinstance(code, SparseCode):
        return torch.zeros(code.n_tokens, dtype=torch.float64).index_add_(0, code.rows, on)
    return on.sum(1)
