"""AuxK: dead latents learn to explain what the live ones missed (Gao et al. 2024, arXiv:2406.04093, appendix A.2)."""

import torch
from jaxtyping import Bool
from torch import Tensor

from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.train.backward import Pass
from tcsae.train.batch import Batch

AUX_TOKENS = 1024
"""Tokens of a batch that the term looks at, evenly strided: an unbiased estimate at a fraction of its cost."""


def auxk(
    sae: SparseAutoencoder,
    state: Pass,
    batch: Batch,
    dead: Bool[Tensor, " d_sae"],
    k: int,
    weight: float,
) -> float:
    """Value of the term; adds its gradients to those of the dead latents' encoder and decoder rows.

        e = x - x_hat, held constant;   e_hat = top k of relu(pre), dead latents only, times W_dec
        weight * sum ||e - e_hat||^2 / sum ||e||^2 * mean ||e||^2 = weight * mean ||e - e_hat||^2

    The tokens are the same ones whichever process has them. No decoder bias in e_hat: x_hat already has it.
    """
    latents = dead.nonzero().squeeze(1)
    if not len(latents):
        return 0.0
    stride = max(1, state.n // AUX_TOKENS)
    n, chosen = len(range(0, state.n, stride)), slice(-batch.offset % stride, None, stride)
    some, residual = state.inputs[chosen], -state.error[chosen]
    W_dec = sae.W_dec[latents]
    candidates = state.pre[chosen][:, latents]
    code = candidates.relu()
    if k < len(latents):
        top = candidates.topk(k, dim=1, sorted=False)
        code = torch.zeros_like(candidates).scatter_(1, top.indices, top.values.relu())
    missed = torch.addmm(residual, code, W_dec, alpha=-1)
    upstream = missed * (-2 * weight / n)
    grad = (upstream @ W_dec.T).mul_(code > 0)
    for parameter, rows in ((sae.W_dec, code.T @ upstream), (sae.W_enc_rows, grad.T @ some), (sae.b_enc, grad.sum(0))):
        assert parameter.grad is not None
        parameter.grad.index_add_(0, latents, rows)
    assert sae.b_dec.grad is not None
    sae.b_dec.grad.sub_(grad.sum(0) @ sae.W_enc_rows[latents])
    return weight * state.adder.number(float(missed.square().sum())) / n
