"""Dense codes (relu, gelu), forward and back: by slices of rows that stay in cache, all that a slice needs at once.

A pass of its own over a code costs as much as 1% of a step, and there would be eight.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.shared.sae.sparse import ROWS

Dense = Literal["relu", "gelu"]


class Activity(NamedTuple):
    """What a dense code is like."""

    n_active: int
    """Entries above 0."""
    fired: Bool[Tensor, " d_sae"]
    """Latents above 0 at some token."""
    total: float
    """sum |f|"""


def activate(
    kind: Dense, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"], code: Float[Tensor, "n d_sae"]
) -> Activity:
    """Add the bias to `pre`, and write the activation into `code`; a relu's code may be `pre` itself."""
    n_active, total = 0, 0.0
    fired, scratch = torch.zeros_like(bias, dtype=torch.bool), torch.empty_like(pre[: _rows(pre)])
    for z, f in zip(pre.split(_rows(pre)), code.split(_rows(pre)), strict=True):
        z.add_(bias)
        if kind == "relu":
            torch.clamp(z, min=0, out=f)
            total += float(f.sum())
        else:
            torch.ops.aten.gelu.out(z, out=f)
            total += float(torch.abs(f, out=scratch[: len(f)]).sum())
        n, some = _positive(z)  # z > 0 where gelu(z) > 0
        n_active += n
        fired |= some
    return Activity(n_active, fired, total)


def activation_backward_(
    kind: Dense, grad: Float[Tensor, "n d_sae"], pre: Float[Tensor, "n d_sae"], l1: float
) -> Float[Tensor, " d_sae"]:
    """From d loss / d code to d loss / d pre, in place, with `l1` times the gradient of sum |f|; returns column sums.

    `pre` as `activate` left it (a relu's may be its code). gelu is the exact one, not tanh's.
    """
    sums, ones, scratch = torch.zeros_like(pre[0]), grad.new_ones(_rows(pre)), torch.empty_like(pre[: _rows(pre)])
    for g, z in zip(grad.split(_rows(pre)), pre.split(_rows(pre)), strict=True):
        if kind == "relu":
            torch.ops.aten.threshold_backward.grad_input(g.add_(l1) if l1 else g, z, 0.0, grad_input=g)
        else:
            if l1:
                g.add_(torch.sign(z, out=scratch[: len(z)]), alpha=l1)  # gelu(z) has the sign of z
            torch.ops.aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=g)
        sums.addmv_(g.T, ones[: len(g)])  # as a product: several times as fast as sum(0)
    return sums


def _rows(x: Tensor) -> int:
    """Rows of a slice: on a GPU all, as there launches cost more than passes."""
    return ROWS if x.device.type == "cpu" else len(x)


def _positive(x: Float[Tensor, "n d"]) -> tuple[int, Bool[Tensor, " d"]]:
    """How many entries are above 0, and in which columns. NumPy is 10 times as fast as torch there, on a CPU."""
    if x.device.type != "cpu":
        positive = x > 0
        return int(positive.sum()), positive.any(0)
    above = x.detach().numpy() > 0
    return int(np.count_nonzero(above)), torch.from_numpy(np.logical_or.reduce(above, axis=0))
