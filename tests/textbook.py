"""The oracle of a training step: dense codes, windows laid out, torch's autograd. Slow, and plain to read."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.module import layer_normed
from tcsae.shared.sae.sparse import batchtopk_code
from tcsae.train.batch import shuffled
from tcsae.train.losses.auxk import AUX_TOKENS
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.trainer import NO_GRADIENT


class Step(NamedTuple):
    losses: dict[str, float]
    gradients: dict[str, Tensor]
    code: Tensor
    error: Tensor
    l0: float
    temporal_weight: float


def step(trainer, batch) -> Step:
    """What `Trainer.gradients` computes, for a trainer that has not stepped: from its settings and weights alone."""
    config, sae, n = trainer.config, trainer.sae, len(batch.x)
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in sae.named_parameters()}
    x = batch.x * trainer.scale
    inputs, mean, spread = layer_normed(x) if config.sae.layer_norm != "none" else (x, 0.0, 1.0)
    if config.sae.layer_norm != "in_out":
        mean, spread = 0.0, 1.0
    pre = (inputs - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    f = activations(config, pre, weights)

    def decoded(code):
        return (code @ weights["W_dec"] + weights["b_dec"]) * spread + mean

    reconstruction = x.new_zeros(())
    for (_, stop), share in zip(config.sae.group_ranges(), config.group_weights, strict=True):
        prefix = F.pad(f[:, :stop], (0, config.sae.d_sae - stop))
        reconstruction = reconstruction + share * (decoded(prefix) - x).square().sum(1).mean()
    losses = {"reconstruction": reconstruction}
    error = (decoded(f) - x).detach()
    weight = add_temporal(losses, trainer, batch, f)
    if config.sparsity.l1:
        size = f.abs() if config.sae.activation == "gelu" else f  # the others are never below 0
        losses["l1"] = config.sparsity.l1 * size.sum(1).mean()
    if config.sae.activation == "jumprelu":
        l0 = above(pre, weights["threshold"], config.sparsity.bandwidth).sum() / n
        losses["l0_loss"] = config.sparsity.l0 * (l0 / config.sae.k - 1).square()
    if config.dead.aux_weight and config.sae.activation != "gelu":
        losses["aux"] = config.dead.aux_weight * aux(trainer, pre, error, weights)
    learned = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(sum(losses.values()), [weights[name] for name in learned])
    values = {name: value.item() for name, value in losses.items()}
    return Step(values, dict(zip(learned, grads, strict=True)), f.detach(), error, float((f > 0).sum()) / n, weight)


def activations(config, pre, weights):
    match config.sae.activation:
        case "gelu":
            return F.gelu(pre)
        case "relu":
            return pre.relu()
        case "topk":
            top = pre.topk(config.sae.k, dim=1)
            return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        case "batchtopk":
            return torch.where(batchtopk_code(pre.detach(), config.sae.k).dense() > 0, pre, 0.0)
        case "jumprelu":
            return JumpRelu.apply(pre, weights["threshold"], config.sparsity.bandwidth)


def add_temporal(losses, trainer, batch, f) -> float:
    config, temporal, weight = trainer.config, trainer.config.temporal, 0.0
    scope = slice(*trainer.scope)
    if temporal.active:
        seed, seen, of = trainer.step_seed(), f, batch
        if temporal.order != "text":
            moved, of = shuffled(temporal.order, batch, seed)
            seen = f[moved]
        term = contrastive if temporal.kind == "contrastive" else windows
        value = term(temporal, seen[:, scope], of, seed)
        weight = min(1.0, 1 / max(1.0, temporal.warmup * config.steps)) * temporal.weight
        if temporal.budget:
            unit, target = (
                torch.autograd.grad(one, f, retain_graph=True)[0] for one in (value, losses["reconstruction"])
            )
            active = (f != 0)[:, scope]
            target, unit = (target[:, scope] * active).norm().item(), (unit[:, scope] * active).norm().item()
            rounding = unit * f[:, scope].norm().item() <= NO_GRADIENT * abs(value.item())
            risen = min(1.0, 1 / max(1.0, temporal.warmup * config.steps))
            weight = 0.0 if rounding else risen * temporal.budget * target / unit
        losses["temporal"] = weight * value
    if temporal.position_penalty:
        losses["position"] = temporal.position_penalty * between_positions(f[:, scope], batch)
    return weight


def between_positions(f, batch):
    """The code's variance between positions, of the first batch that a penalty sees."""
    position = batch.positions()
    means = torch.stack([f[position == p].mean(0) for p in position.unique()])
    counts = torch.stack([(position == p).sum() for p in position.unique()])
    # The overall mean is held constant, as the running ones are.
    off = means - f.detach().mean(0)
    return (counts[:, None] / len(f) * off.square()).sum()


def windows(config, f, batch, _seed=0):
    """Eq. 3 of the paper and its kin, with every window laid out."""
    starts, offset = [], 0
    for length in map(int, batch.lengths):
        starts += range(offset, offset + length - config.window + 1)
        offset += length
    if not starts:
        return f.sum() * 0
    at = torch.tensor(starts)[:, None] + torch.arange(config.window)
    f, x = f[at], batch.x[at]
    pairs = [(i, j) for i, j in itertools.combinations(range(config.window), 2) if config.pairs == "all" or j == i + 1]
    gates = [F.cosine_similarity(x[:, i], x[:, j], dim=1).clamp(min=0) for i, j in pairs]
    squares = [(f[:, j] - f[:, i]).square().sum(1) for i, j in pairs]
    if config.kind == "gated":
        squares = [gate * square for gate, square in zip(gates, squares, strict=True)]
    loss = torch.stack(squares).mean()
    if config.kind == "relative":
        loss = loss / torch.stack([f[:, i].square().sum(1) + f[:, j].square().sum(1) for i, j in pairs]).mean()
    return loss


def contrastive(config, f, batch, seed):
    """InfoNCE, pair by pair: each one's partner against the partners of pairs from other documents."""
    first, _, others = choose_pairs(config, batch, seed)
    second = first + 1
    losses = []
    for rows, columns in ((f[first], f[second]), (f[second], f[first])):
        for i in range(len(rows)):
            chosen = [i, *others[i].nonzero()[0].tolist()]
            scores = F.cosine_similarity(rows[i][None], columns[chosen], dim=1, eps=1e-12) / config.contrast.temperature
            losses.append(torch.logsumexp(scores, 0) - scores[0])
    return torch.stack(losses).mean() if len(first) > 1 else f.sum() * 0


def aux(trainer, pre, error, weights):
    """AuxK at weight 1: dead latents reconstruct what the live ones missed, on evenly strided tokens."""
    stride, dead = max(1, len(pre) // AUX_TOKENS), trainer.dead()
    candidates, residual = pre[::stride][:, dead], -error[::stride]
    if not candidates.shape[1]:
        return pre.sum() * 0
    top = candidates.topk(min(trainer.config.dead.aux_k, candidates.shape[1]), dim=1)
    code = torch.zeros_like(candidates).scatter(1, top.indices, top.values.relu())
    return (residual - code @ weights["W_dec"][dead]).square().sum(1).mean()


class JumpRelu(torch.autograd.Function):
    """pre above the threshold, which learns through a rectangle around it (arXiv:2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return grad * (pre > threshold), (-threshold / ctx.width * near * grad).sum(0), None


def above(pre, threshold, width):
    """1 where pre exceeds the threshold; its gradient to the threshold is -1 / width within the rectangle (eq. 12)."""
    near = (pre.detach() - threshold.detach()).abs() < width / 2
    linear = -(near * threshold / width)
    return (pre > threshold).to(pre.dtype) + linear - linear.detach()
