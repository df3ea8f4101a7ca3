"""AuxK: dead latents learn to explain what the live ones missed (Gao et al. 2024, arXiv:2406.04093, appendix A.2)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import static_shapes
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.train.batch import Batch

AUX_TOKENS = 1024
"""Tokens of a batch that the term looks at, evenly strided: an unbiased estimate at a fraction of its cost."""
LEAST_COLUMNS = 256
"""Of the matrix products with static shapes, whose width doubles from here on."""


def auxk(
    sae: SparseAutoencoder,
    inputs: Float[Tensor, "n d_model"],
    x: Float[Tensor, "n d_model"],
    x_hat: Float[Tensor, "n d_model"],
    batch: Batch,
    dead: Bool[Tensor, " d_sae"],
    k: int,
    most_dead: int | None = None,
) -> Float[Tensor, ""]:
    """The term at weight 1, this process's share; `inputs` is what the encoder reads before b_dec is taken away.

        e = x - x_hat, held constant;   e_hat = top k of relu(pre), dead latents only, times W_dec
        sum ||e - e_hat||^2 / sum ||e||^2 * mean ||e||^2 = mean ||e - e_hat||^2

    The tokens are the same ones whichever process has them. No decoder bias in e_hat: x_hat already has it. With static
    shapes, `most_dead` is a number that `dead` does not exceed (None: not known); on a CPU the dead are counted.
    """
    if static_shapes(inputs):
        chosen = _columns(dead, most_dead)
        alive = None if chosen is None else ~dead[chosen]
    else:
        chosen, alive = dead.nonzero().squeeze(1), None
    if chosen is None or not len(chosen):
        return torch.zeros((), device=inputs.device, dtype=inputs.dtype)
    stride = max(1, batch.n_whole // AUX_TOKENS)
    n, tokens = len(range(0, batch.n_whole, stride)), slice(-batch.offset % stride, None, stride)
    W_enc, b_enc, W_dec = (one.index_select(0, chosen) for one in (sae.W_enc_rows, sae.b_enc, sae.W_dec))
    # b_dec in the bias: a matrix product less on the way back than in the input.
    pre = F.linear(inputs[tokens], W_enc, b_enc - W_enc @ sae.b_dec)
    if alive is not None:
        pre = pre.masked_fill(alive, -torch.inf)  # below every dead one, and 0 after the relu
    top = pre.topk(min(k, len(chosen)), dim=1, sorted=False)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    error = F.mse_loss(code @ W_dec, x[tokens] - x_hat[tokens], reduction="sum") / n
    return error if alive is None else torch.where(alive.all(), 0.0, error)


def _columns(dead: Bool[Tensor, " d_sae"], most: int | None) -> Int[Tensor, " m"] | None:
    """All dead latents, and others up to a number that follows from `most` alone; None if there can be none dead."""
    if most == 0:
        return None
    n = len(dead)
    if most is not None:
        n = min(n, max(LEAST_COLUMNS, 1 << (most - 1).bit_length()))
    return dead.float().topk(n, sorted=False).indices if n < len(dead) else torch.arange(n, device=dead.device)
