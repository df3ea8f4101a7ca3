"""The same losses by the textbook: dense codes, windows laid out, torch's autograd. Slow, and plain to read.

`optimizer.gradients = "autograd"` trains by it; the tests hold the hand-written passes against it.
"""

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.module import layer_normed
from tcsae.shared.sae.sparse import batchtopk_code
from tcsae.train.auxk import AUX_TOKENS
from tcsae.train.backward import Pass
from tcsae.train.batch import Batch
from tcsae.train.config import TemporalConfig
from tcsae.train.temporal import partners, shuffled
from tcsae.train.trainer import StepResult, Trainer


def autograd_gradients(trainer: Trainer, batch: Batch) -> StepResult:
    """What `Trainer.gradients` does, by autograd."""
    sae, config, n = trainer.sae, trainer.config, len(batch.x)
    dead = trainer.dead()
    for parameter in trainer.parameters:
        parameter.grad = None
    with torch.enable_grad():
        x = batch.x * trainer.scale
        pre = sae.pre_activations(x)
        code = activations(trainer, pre)
        losses, weight = _code_losses(trainer, batch, x, code)
        error = (sae.decode(code, x) - x).detach()
        if config.sae.activation == "jumprelu":
            l0 = _Step.apply(pre, sae.threshold, config.sparsity.bandwidth).sum() / n
            losses["l0_loss"] = config.sparsity.l0 * (l0 / config.sae.k - 1).square()
        if config.dead.aux_weight and config.sae.activation != "gelu":
            losses["aux"] = config.dead.aux_weight * aux_loss(trainer, pre, error, dead)
        torch.stack(list(losses.values())).sum().backward()
    fired = (code > 0).any(0)
    trainer.tokens_since_fired.add_(n).masked_fill_(fired, 0)
    values = {name: value.item() for name, value in losses.items()}
    inputs = layer_normed(x)[0] if config.sae.layer_norm != "none" else x
    state = Pass(n, trainer.adder, x, (inputs - sae.b_dec).detach(), None, pre.detach(), code.detach(), None, error)
    return StepResult(values, state, float((code > 0).sum()) / n, temporal_weight=weight)


def activations(trainer: Trainer, pre: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
    """The code as a matrix that autograd can follow to `pre`, and to a jumprelu's thresholds."""
    sae = trainer.sae.config
    match sae.activation:
        case "gelu":
            return F.gelu(pre)
        case "relu":
            return pre.relu()
        case "topk":
            top = pre.topk(sae.k, dim=1)
            return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        case "batchtopk":
            return torch.where(batchtopk_code(pre.detach(), sae.k).dense() > 0, pre, 0.0)
        case "jumprelu":
            return _JumpRelu.apply(pre, trainer.sae.threshold, trainer.config.sparsity.bandwidth)


def _code_losses(
    trainer: Trainer, batch: Batch, x: Float[Tensor, "n d_model"], code: Float[Tensor, "n d_sae"]
) -> tuple[dict[str, Tensor], float]:
    """(Losses of the code, the temporal term's weight)."""
    sae, config, temporal = trainer.sae, trainer.config, trainer.config.temporal
    reconstruction, weight = torch.zeros_like(x[0, 0]), 0.0
    for (_, stop), share in zip(config.sae.group_ranges(), config.group_weights, strict=True):
        prefix = F.pad(code[:, :stop], (0, config.sae.d_sae - stop))
        reconstruction = reconstruction + share * (sae.decode(prefix, x) - x).square().sum(1).mean()
    losses = {"reconstruction": reconstruction}
    scope = slice(*trainer.scope)
    if temporal.active:
        seed = trainer.step_seed()
        term = contrastive_loss if temporal.kind == "contrastive" else windows_loss
        seen, of = code, batch
        if temporal.order != "text":
            moved = shuffled(temporal.order, batch, seed)
            seen, of = code[moved], batch._replace(x=batch.x[moved])
        loss = term(temporal, seen[:, scope], of, seed)
        target, unit = (torch.autograd.grad(one, code, retain_graph=True)[0] for one in (reconstruction, loss))
        weight = trainer.temporal_weight(loss.item(), target[:, scope], unit[:, scope], code[:, scope].detach())
        losses["temporal"] = weight * loss
    if trainer.positions is not None:
        part = code[:, scope]
        value, slope = trainer.positions.dense(part.detach(), batch)
        # The running means are constants, so the term is linear in the code.
        linear = (part * slope).sum()
        losses["position"] = temporal.position_penalty * (value + linear - linear.detach())
    if config.sparsity.l1:
        size = code.abs() if config.sae.activation == "gelu" else code
        losses["l1"] = config.sparsity.l1 * size.sum(1).mean()
    return losses, weight


def window_starts(lengths: Any, window: int, device: torch.device) -> Int[Tensor, " n_windows"]:
    """First token of every window, of segments laid end to end."""
    starts: list[int] = []
    offset = 0
    for length in lengths:
        starts += range(offset, offset + int(length) - window + 1)
        offset += int(length)
    return torch.tensor(starts, dtype=torch.int64, device=device)


def windows_loss(config: TemporalConfig, code: Float[Tensor, "n d"], batch: Batch, _seed: int = 0) -> Tensor:
    """Eq. 3 of the paper and its kin, with every window laid out."""
    starts = window_starts(batch.lengths, config.window, code.device)
    if not len(starts):
        return code.sum() * 0
    at = starts[:, None] + torch.arange(config.window, device=code.device)
    f, x = code[at], batch.x[at]
    pairs = [(i, j) for i, j in itertools.combinations(range(config.window), 2) if config.pairs == "all" or j == i + 1]
    gates = [F.cosine_similarity(x[:, i], x[:, j], dim=1).clamp(min=0) for i, j in pairs]
    squares = [(f[:, j] - f[:, i]).square().sum(1) for i, j in pairs]
    if config.kind == "gated":
        squares = [gate * square for gate, square in zip(gates, squares, strict=True)]
    loss = torch.stack(squares).mean()
    if config.kind == "relative":
        loss = loss / torch.stack([f[:, i].square().sum(1) + f[:, j].square().sum(1) for i, j in pairs]).mean()
    return loss


def contrastive_loss(config: TemporalConfig, code: Float[Tensor, "n d"], batch: Batch, seed: int) -> Tensor:
    """InfoNCE, pair by pair: each one's partner against the partners of pairs from other documents."""
    first, second, others = partners(batch, seed)
    losses = []
    for rows, columns in ((code[first], code[second]), (code[second], code[first])):
        for i in range(len(rows)):
            chosen = [i, *others[i].nonzero().flatten().tolist()]
            scores = F.cosine_similarity(rows[i][None], columns[chosen], dim=1, eps=1e-12) / config.temperature
            losses.append(torch.logsumexp(scores, 0) - scores[0])
    return torch.stack(losses).mean() if len(first) > 1 else code.sum() * 0


def aux_loss(
    trainer: Trainer, pre: Float[Tensor, "n d_sae"], error: Float[Tensor, "n d_model"], dead: Bool[Tensor, " d_sae"]
) -> Tensor:
    """AuxK at weight 1: dead latents reconstruct what the live ones missed, on evenly strided tokens."""
    stride = max(1, len(pre) // AUX_TOKENS)
    candidates, residual = pre[::stride][:, dead], -error[::stride]
    if not candidates.shape[1]:
        return pre.sum() * 0
    top = candidates.topk(min(trainer.config.dead.aux_k, candidates.shape[1]), dim=1)
    code = torch.zeros_like(candidates).scatter(1, top.indices, top.values.relu())
    return (residual - code @ trainer.sae.W_dec[dead]).square().sum(1).mean()


class _JumpRelu(torch.autograd.Function):
    """pre above the threshold, which learns through a rectangle around it (arXiv:2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return grad * (pre > threshold), (-threshold / ctx.width * near * grad).sum(0), None


class _Step(torch.autograd.Function):
    """1 where pre exceeds the threshold; likewise (eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return None, (-grad / ctx.width * near).sum(0), None
