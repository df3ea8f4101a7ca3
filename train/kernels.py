"""Gradients of a sparse code without a dense matrix, in closed form; tests hold them against autograd.

With code f (sparse), reconstruction x_hat = f W_dec + b_dec and G = d loss / d x_hat:

    d loss / d f_ij    = G_i . W_dec_j          only at the code's entries
    d loss / d W_dec_j = sum_i f_ij G_i         and likewise d loss / d W_enc_j = sum_i (d loss / d f_ij) (x - b_dec)_i
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.sparse import SparseCode

ENTRIES = 16_384
"""Of a code, at a time, where rows have to be gathered for each."""
# Said once a process by torch, to people who never asked for a sparse tensor.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def entry_gradients(
    code: SparseCode, grad_x_hat: Float[Tensor, "n d_model"], W_dec: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, " n_entries"]:
    """G_i . W_dec_j for every entry (i, j) of the code, zeros included."""
    if grad_x_hat.device.type == "mps":  # has no sparse matrices
        pairs = zip(code.rows.split(ENTRIES), code.latents.split(ENTRIES), strict=True)
        return torch.cat([(grad_x_hat[rows] * W_dec[latents]).sum(1) for rows, latents in pairs])
    pattern = torch.sparse_csr_tensor(
        code.offsets,
        code.latents,
        torch.zeros_like(code.values),
        size=(code.n_tokens, code.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, grad_x_hat, W_dec.T, beta=0.0).values()


class LatentOrder:
    """The entries of a code sorted by latent, found once and used for every weight's gradient."""

    def __init__(self, code: SparseCode) -> None:
        self.order = torch.argsort(code.latents, stable=True)
        self.counts: Int[Tensor, " d_sae"] = torch.bincount(code.latents, minlength=code.d_sae)
        self._starts = self.counts.cumsum(0) - self.counts
        self._tokens = code.rows[self.order]

    def weighted_rows(
        self, values: Float[Tensor, " n_entries"], rows: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """For each latent, the sum over its entries of value times the token's row."""
        return F.embedding_bag(self._tokens, rows, self._starts, per_sample_weights=values[self.order], mode="sum")
