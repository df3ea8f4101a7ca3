"""What a code does, whichever way it is held: sparse (entries) or dense (a gelu, where next to no entry is zero)."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tcsae.shared.codes import SparseCode

Code = SparseCode | Float[Tensor, "_ d_sae"]


def token_activity(code: Code | None, n: int) -> Float64[Tensor, "4 n"]:
    """Of each token: latents with f > 0, latents with f != 0, sum |f|, sum f. Zeros for a system without latents."""
    if code is None:
        return torch.zeros(4, n, dtype=torch.float64)
    values = code.values if isinstance(code, SparseCode) else code
    # A topk or relu code is never negative, so two of the four sums do for all.
    signed = bool((values < 0).any())
    terms = (values > 0, values != 0, values.abs(), values) if signed else (values > 0, values)
    sums = [row_sums(code, term) for term in terms]
    return torch.stack(sums if signed else [sums[0], sums[0], sums[1], sums[1]])


def row_sums(code: Code, terms: Tensor) -> Float64[Tensor, " n"]:
    """Sum of each row's `terms`, which stand where the code's values do."""
    if not isinstance(code, SparseCode):
        return terms.sum(1, dtype=torch.float64)
    per_row, left = divmod(len(terms), max(code.n_tokens, 1))
    if not left and bool((code.offsets.diff() == per_row).all()):  # topk
        return terms.view(code.n_tokens, per_row).sum(1, dtype=torch.float64)
    return torch.zeros(code.n_tokens, dtype=torch.float64).index_add_(0, code.rows, terms.double())


def firing_counts(code: Code, sequence: Int[Tensor, " n"], n_sequences: int) -> Int[Tensor, "2 d_sae"]:
    """Of each latent: tokens at which it is active, and sequences in which it ever is.

    `sequence` numbers each token's sequence, 0 to n_sequences - 1.
    """
    if isinstance(code, SparseCode):
        on = code.values > 0
        keys = sequence.index_select(0, code.rows[on]) * code.d_sae + code.latents[on]
        counts = torch.bincount(keys, minlength=n_sequences * code.d_sae).view(n_sequences, code.d_sae)
    else:
        counts = torch.zeros(n_sequences, code.shape[1], dtype=torch.int64)
        counts.index_add_(0, sequence, (code > 0).long())
    return torch.stack((counts.sum(0), (counts > 0).sum(0)))


def join_codes(parts: list[Code]) -> Code:
    """The codes of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    sparse = [part for part in parts if isinstance(part, SparseCode)]
    if not sparse:
        return torch.cat([part for part in parts if torch.is_tensor(part)])
    ends = torch.tensor([0, *(len(part.values) for part in sparse)]).cumsum(0)
    offsets = [part.offsets[:-1] + end for part, end in zip(sparse, ends, strict=False)]
    return SparseCode(
        torch.cat([part.values for part in sparse]),
        torch.cat([part.latents for part in sparse]),
        torch.cat([*offsets, ends[-1:]]),
        sparse[0].d_sae,
    )


def n_latents(code: Code) -> int:
    return code.d_sae if isinstance(code, SparseCode) else code.shape[1]
