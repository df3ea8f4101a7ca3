"""The hand-written forward and backward pass of one batch: losses, and a gradient for every parameter.

With several groups of latents, prefix g reconstructs x_hat_g = sum_{h <= g} f_h W_dec_h + b_dec with loss weight w_g;
a latent of group h then sees G_h = sum_{g >= h} w_g 2 e_g / n. One group is the plain autoencoder.
"""

import itertools
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tcsae.shared.sae.module import SparseAutoencoder, layer_normed
from tcsae.shared.sae.sparse import SparseCode, decode, positive_code, threshold_code, topk_code
from tcsae.train.adder import Adder
from tcsae.train.buffers import Workspace
from tcsae.train.config import TrainConfig
from tcsae.train.dense import Activity, activate, activation_backward_
from tcsae.train.kernels import LatentOrder, entry_gradients

SPARSE_DENSITY = 0.10
"""Below this share of active latents a relu code takes the sparse path (break-even measured at 0.14)."""


@dataclass
class Pass:
    """One batch, or this process's part of it, on its way through an SAE."""

    n: int
    """Tokens of the whole batch, over which the losses are means."""
    adder: Adder
    target: Float[Tensor, "n d_model"]
    """What is to be reconstructed, in the units of training."""
    inputs: Float[Tensor, "n d_model"]
    """What the encoder reads, b_dec taken away."""
    scaling: tuple[Tensor, Tensor] | None
    """([n, 1], [n, 1]): what the decoder's output is multiplied by, and what is added to it (layer_norm in_out)."""
    pre: Float[Tensor, "n d_sae"]
    code: SparseCode | Float[Tensor, "n d_sae"]
    """A matrix where the code is not sparse."""
    activity: Activity | None
    """Of a relu's or gelu's code."""
    error: Float[Tensor, "n d_model"]
    """x_hat - x of the whole SAE, once it is reconstructed."""
    grads: list[Float[Tensor, "n d_model"]] = field(default_factory=list)
    """G_h for the latents of each group."""


def encode(
    sae: SparseAutoencoder,
    x: Float[Tensor, "n d_model"],
    workspace: Workspace,
    margin: float,
    n_whole: int,
    adder: Adder,
) -> Pass:
    """Pre-activations and code of a batch; `margin` is half the bandwidth below a jumprelu's thresholds,
    `n_whole` the tokens of the whole batch.
    """
    n, config = len(x), sae.config
    inputs, scaling = x, None
    if config.layer_norm != "none":
        inputs, mean, spread = layer_normed(x)
        if config.layer_norm == "in_out":
            scaling = spread, mean
    centred = torch.sub(inputs, sae.b_dec, out=workspace.get("centred", n, config.d_model))
    pre, activity = workspace.get("pre", n, config.d_sae), None
    if config.activation in ("relu", "gelu"):
        torch.mm(centred, sae.W_enc_rows.T, out=pre)
        dense = workspace.get("code", *pre.shape) if config.activation == "gelu" else pre
        activity = activate(config.activation, pre, sae.b_enc, dense)
        sparse = config.activation == "relu" and activity.n_active < SPARSE_DENSITY * pre.numel()
        code: SparseCode | Tensor = positive_code(pre) if sparse else dense
    else:
        torch.addmm(sae.b_enc, centred, sae.W_enc_rows.T, out=pre)
        match config.activation:
            case "topk":
                code = topk_code(pre, config.k)
            case "batchtopk":
                code = adder.batch_code(pre, config.k, n_whole)
            case "jumprelu":
                code = threshold_code(pre, sae.threshold, margin)
    return Pass(n_whole, adder, x, centred, scaling, pre, code, activity, workspace.get("error", n, config.d_model))


def reconstruct(sae: SparseAutoencoder, state: Pass, weights: tuple[float, ...], workspace: Workspace) -> float:
    """Decode every prefix; fills error and grads, returns sum_g w_g mean ||x - x_hat_g||^2."""
    shape, loss = state.target.shape, 0.0
    scratch = workspace.get("scratch", *shape)
    partial = torch.empty(0)
    for i, ((first, stop), weight) in enumerate(zip(sae.config.group_ranges(), weights, strict=True)):
        W_dec = sae.W_dec[first:stop]
        if isinstance(state.code, SparseCode):
            part = decode(state.code.part(first, stop)[0], W_dec, sae.b_dec if first == 0 else None)
            partial = part if first == 0 else partial.add_(part)
        elif first == 0:
            partial = torch.addmm(sae.b_dec, state.code[:, :stop], W_dec, out=workspace.get("x_hat", *shape))
        else:
            partial.addmm_(state.code[:, first:stop], W_dec)
        x_hat = partial if state.scaling is None else partial * state.scaling[0] + state.scaling[1]
        error = torch.sub(x_hat, state.target, out=state.error)
        loss += weight * state.adder.number(float(torch.mul(error, error, out=scratch).sum())) / state.n
        grad = torch.mul(error, 2 * weight / state.n, out=workspace.get(f"upstream {i}", *shape))
        state.grads.append(grad if state.scaling is None else grad.mul_(state.scaling[0]))
    for earlier, later in reversed(list(itertools.pairwise(state.grads))):
        earlier.add_(later)
    return loss


def code_gradient(sae: SparseAutoencoder, state: Pass, workspace: Workspace) -> Tensor:
    """d reconstruction / d code: one number an entry of a sparse code (zeros included), or a matrix."""
    ranges = zip(sae.config.group_ranges(), state.grads, strict=True)
    if isinstance(state.code, SparseCode):
        grad = torch.empty_like(state.code.values)
        for (first, stop), upstream in ranges:
            part, at = state.code.part(first, stop)
            grad[at] = entry_gradients(part, upstream, sae.W_dec[first:stop])
        return grad
    grad = workspace.get("grad", *state.code.shape)
    for (first, stop), upstream in ranges:
        torch.mm(upstream, sae.W_dec[first:stop].T, out=grad) if len(state.grads) == 1 else grad[:, first:stop].copy_(
            upstream @ sae.W_dec[first:stop].T
        )
    return grad


def set_gradients(
    sae: SparseAutoencoder, state: Pass, grad: Tensor, threshold_grad: Tensor | None, l1: float
) -> tuple[Bool[Tensor, " d_sae"], int]:
    """Gradients of all parameters from d loss / d code (overwritten), for a dense code with `l1` times that of sum |f|.

    Returns which latents are active somewhere in the batch, and how many entries are.
    """
    if isinstance(state.code, SparseCode):
        active = state.code.values > 0
        grad_b_enc = _sparse_weights(sae, state, state.code, grad.mul_(active))  # explicit zeros do not move
        fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=grad.device)
        fired[state.code.latents[active]] = True
        n_active = int(active.sum())
    else:
        assert state.activity is not None
        fired, n_active = state.activity.fired, state.activity.n_active
        grad_b_enc = _dense_weights(sae, state, state.code, grad, l1)
    sae.b_enc.grad = grad_b_enc
    # b_dec is added to the reconstruction and taken from the encoder's input.
    sae.b_dec.grad = state.grads[0].sum(0) - grad_b_enc @ sae.W_enc_rows
    if threshold_grad is not None:
        sae.threshold.grad = threshold_grad
    return fired, n_active


def _sparse_weights(sae: SparseAutoencoder, state: Pass, code: SparseCode, grad: Tensor) -> Tensor:
    """Gradients of W_dec and W_enc; returns b_enc's."""
    order = LatentOrder(code)
    ranges = sae.config.group_ranges()
    if len(ranges) == 1:
        sae.W_dec.grad = order.weighted_rows(code.values, state.grads[0])
    else:
        sae.W_dec.grad = torch.empty_like(sae.W_dec)
        for (first, stop), upstream in zip(ranges, state.grads, strict=True):
            part, _ = code.part(first, stop)
            sae.W_dec.grad[first:stop] = LatentOrder(part).weighted_rows(part.values, upstream)
    sae.W_enc_rows.grad = order.weighted_rows(grad, state.inputs)
    return torch.zeros_like(sae.b_enc).index_add_(0, code.latents, grad)


def _dense_weights(sae: SparseAutoencoder, state: Pass, code: Tensor, grad: Tensor, l1: float) -> Tensor:
    """Gradients of W_dec and W_enc; returns b_enc's."""
    W_dec_grad = torch.empty_like(sae.W_dec) if sae.W_dec.grad is None else sae.W_dec.grad
    for (first, stop), upstream in zip(sae.config.group_ranges(), state.grads, strict=True):
        torch.mm(code[:, first:stop].T, upstream, out=W_dec_grad[first:stop])
    sae.W_dec.grad = W_dec_grad
    grad_b_enc = activation_backward_("gelu" if sae.config.activation == "gelu" else "relu", grad, state.pre, l1)
    W_enc_grad = torch.empty_like(sae.W_enc_rows) if sae.W_enc_rows.grad is None else sae.W_enc_rows.grad
    sae.W_enc_rows.grad = torch.mm(grad.T, state.inputs, out=W_enc_grad)
    return grad_b_enc


def threshold_gradient(
    sae: SparseAutoencoder, state: Pass, grad: Float[Tensor, " n_entries"], config: TrainConfig
) -> tuple[float, Float[Tensor, " d_sae"]]:
    """(L0 loss, d loss / d threshold) of a jumprelu through a rectangular kernel of width epsilon.

    Rajamanoharan et al. 2024 (arXiv:2407.14435), eqs. 11-12: d f / d theta = -(theta / epsilon) and
    d [pre > theta] / d theta = -1 / epsilon, both where |pre - theta| < epsilon / 2; L0 loss = l0 (L0 / k - 1)^2.
    """
    code, epsilon = state.code, config.sparsity.bandwidth
    assert isinstance(code, SparseCode)
    theta = sae.threshold[code.latents]
    at: Int[Tensor, " n_entries"] = code.rows * code.d_sae + code.latents
    near = (state.pre.view(-1)[at] - theta).abs() < epsilon / 2
    l0 = state.adder.number(float((code.values > 0).sum())) / state.n
    off = l0 / config.sae.k - 1
    slope = 2 * config.sparsity.l0 * off / config.sae.k / state.n
    per_entry = torch.where(near, -(theta * grad + slope) / epsilon, 0.0)
    return config.sparsity.l0 * off * off, torch.zeros_like(sae.threshold).index_add_(0, code.latents, per_entry)
