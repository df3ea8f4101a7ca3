"""Sparse codes: which latents are active at each token, selected exactly and decoded without a dense matrix.

All on float32 tensors of one device. The fast paths were chosen by measurement on a CPU; see tests/bench/.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

SELECT_GROUPS = 16


class SparseCode(NamedTuple):
    """The code of n tokens, row by row: token i has entries offsets[i] : offsets[i + 1].

    An entry may be an explicit zero (a top-k that found fewer than k positive pre-activations).
    """

    values: Float[Tensor, " n_entries"]
    latents: Int[Tensor, " n_entries"]
    offsets: Int[Tensor, " n_tokens_plus_1"]
    d_sae: int

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> Int[Tensor, " n_entries"]:
        """Token of each entry."""
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(tokens, self.offsets.diff(), output_size=len(self.values))

    def dense(self) -> Float[Tensor, "n_tokens d_sae"]:
        """The same code as a matrix."""
        return self.values.new_zeros(self.n_tokens, self.d_sae).index_put_((self.rows, self.latents), self.values)


def select_topk(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest entries of each row, exactly, in no particular order: (values, latents).

    In two stages where that is faster: the k best of the maxima over strided groups hold all of the k best entries,
    since an entry of another group is beaten by k maxima.
    """
    n, d_sae = pre.shape
    n_groups, left = divmod(d_sae, SELECT_GROUPS)
    if left or n_groups < 2 * k:
        values, latents = pre.topk(k, dim=-1, sorted=False)
        return values, latents
    grouped = pre.view(n, SELECT_GROUPS, n_groups)
    best = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, best.unsqueeze(1).expand(n, SELECT_GROUPS, k)).view(n, SELECT_GROUPS * k)
    values, at = candidates.topk(k, dim=-1, sorted=False)
    return values, torch.div(at, k, rounding_mode="floor") * n_groups + best.gather(1, at % k)


def topk_code(pre: Float[Tensor, "n d_sae"], k: int) -> SparseCode:
    """TopK (Gao et al. 2024, arXiv:2406.04093): relu of the k largest pre-activations of each token."""
    values, latents = select_topk(pre, k)
    offsets = torch.arange(0, values.numel() + 1, k, device=pre.device)
    return SparseCode(values.relu().flatten(), latents.flatten(), offsets, pre.shape[1])


def positive_code(activations: Float[Tensor, "n d_sae"]) -> SparseCode:
    """The non-zero entries of a dense code."""
    rows, latents = activations.nonzero(as_tuple=True)
    offsets = torch.zeros(len(activations) + 1, dtype=torch.int64, device=activations.device)
    offsets[1:] = torch.bincount(rows, minlength=len(activations)).cumsum(0)
    return SparseCode(activations[rows, latents], latents, offsets, activations.shape[1])


def decode(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_tokens d_model"]:
    """The reconstruction sum_j f_j W_dec[j] + b_dec, reading only the rows of active latents."""
    out = F.embedding_bag(
        code.latents, W_dec, code.offsets, per_sample_weights=code.values, mode="sum", include_last_offset=True
    )
    return out.add_(b_dec)
