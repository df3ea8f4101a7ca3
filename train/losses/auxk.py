"""AuxK: dead latents learn to explain what the live ones missed (Gao et al. 2024, arXiv:2406.04093, appendix A.2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.train.batch import Batch

AUX_TOKENS = 1024
"""Tokens of a batch that the term looks at, evenly strided: an unbiased estimate at a fraction of its cost."""


def auxk(
    sae: SparseAutoencoder,
    inputs: Float[Tensor, "n d_model"],
    x: Float[Tensor, "n d_model"],
    x_hat: Float[Tensor, "n d_model"],
    batch: Batch,
    dead: Bool[Tensor, " d_sae"],
    k: int,
) -> Float[Tensor, ""]:
    """The term at weight 1, this process's share; `inputs` is what the encoder reads before b_dec is taken away.

        e = x - x_hat, held constant;   e_hat = top k of relu(pre), dead latents only, times W_dec
        sum ||e - e_hat||^2 / sum ||e||^2 * mean ||e||^2 = mean ||e - e_hat||^2

    The tokens are the same ones whichever process has them. No decoder bias in e_hat: x_hat already has it.
    """
    latents = dead.nonzero().squeeze(1)
    if not len(latents):
        return torch.zeros((), device=inputs.device, dtype=inputs.dtype)
    stride = max(1, batch.n_whole // AUX_TOKENS)
    n, tokens = len(range(0, batch.n_whole, stride)), slice(-batch.offset % stride, None, stride)
    W_enc, b_enc, W_dec = (one.index_select(0, latents) for one in (sae.W_enc_rows, sae.b_enc, sae.W_dec))
    # b_dec in the bias: a matrix product less on the way back than in the input.
    pre = F.linear(inputs[tokens], W_enc, b_enc - W_enc @ sae.b_dec)
    top = pre.topk(min(k, len(latents)), dim=1, sorted=False)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return F.mse_loss(code @ W_dec, x[tokens] - x_hat[tokens], reduction="sum") / n
