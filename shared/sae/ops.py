"""Differentiable operations on codes: what every loss is written in. Closed-form gradients, never a dense matrix where
the code is sparse; tests/test_gradients.py holds each against autograd on dense tensors.

A code is a SparseCode or, where next to no entry is zero, a matrix [n_tokens, d_sae]; each operation takes both. With
sparse f, x_hat = f W_dec + b_dec and G = d loss / d x_hat:

    d loss / d f_ij    = G_i . W_dec_j          only at the code's entries
    d loss / d W_dec_j = sum_i f_ij G_i         and likewise d loss / d W_enc_j = sum_i (d loss / d f_ij) (x - b_dec)_i

Kernels: on a CPU embedding_bag and sampled_addmm (chosen by tests/bench/step.py). Elsewhere embedding_bag and gathered
rows with a batched product: cuSPARSE takes sorted rows alone, MPS has no sparse matrices. Nothing there has a shape
that depends on values (`static_shapes`), so a GPU's host never waits for one.
"""

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tcsae.shared.base.device import matmuls, static_shapes, sum_dtype
from tcsae.shared.sae.sparse import ROWS, SparseCode, decode

Code = SparseCode | Float[Tensor, "_n _d_sae"]
"""Sparse (entries) or dense (a gelu, where next to no entry is zero)."""
Dense = Literal["relu", "gelu"]
GATHERED = 1 << 25
"""Numbers of rows gathered at a time: 128 MB."""
# Said once a process by torch, to people who never asked for a sparse tensor.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class EncoderWeights(NamedTuple):
    """What a code's gradient reaches."""

    W_enc_rows: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]
    """Taken from the encoder's input, so its gradient follows from b_enc's."""


class Activity(NamedTuple):
    """How much of a code is active."""

    fired: Bool[Tensor, " d_sae"]
    """Latents above 0 at some token."""
    n_active: int | Tensor
    """Entries above 0."""


def attach_entries(code: SparseCode, centred: Float[Tensor, "n d_model"], weights: EncoderWeights) -> SparseCode:
    """The code of selected pre-activations with a gradient: to both biases and to the selected latents' encoder rows.

    `centred` is the encoder's input less b_dec, without a gradient: b_dec's is worked out from b_enc's.
    """
    _fill(code)
    return code.with_values(_AttachEntries.apply(*weights, centred, code))


def _fill(code: SparseCode) -> None:
    """Derive what the backward pass takes: a compiler lets that fill no cache. On a CPU it may not be needed."""
    if static_shapes(code.values) and torch.is_grad_enabled():
        _ = code.by_latent


class _AttachEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, _b_enc: Tensor, _b_dec: Tensor, centred: Tensor, code: SparseCode) -> Tensor:
        ctx.save_for_backward(W, centred)
        ctx.code = code
        return code.values.view_as(code.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (W, centred), code = grads, ctx.saved_tensors, ctx.code
        b_enc = torch.zeros_like(W[:, 0]).index_add_(0, code.columns, grad)
        return code.by_latent.weighted_rows(grad, centred), b_enc, -(b_enc @ W), None, None


def decode_code(
    code: Code, W_dec: Float[Tensor, "d_sae d_model"], b_dec: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "n d_model"]:
    """f W_dec + b_dec (if any), with gradients to the code's entries and both weights."""
    if isinstance(code, Tensor):
        with matmuls(code.device):
            x_hat = code @ W_dec if b_dec is None else torch.addmm(b_dec, code, W_dec)
        return x_hat.to(code.dtype)
    _fill(code)
    return _Decode.apply(code.values, W_dec, b_dec, code)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _values: Tensor, W_dec: Tensor, b_dec: Tensor | None, code: SparseCode) -> Tensor:
        ctx.code = code.detached()
        ctx.save_for_backward(W_dec)
        return decode(ctx.code, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec,), grad = ctx.saved_tensors, grads[0].contiguous()
        entries, weights, bias, _ = ctx.needs_input_grad
        return (
            entry_gradients(ctx.code, grad, W_dec) if entries else None,
            ctx.code.by_latent.weighted_rows(ctx.code.values, grad) if weights else None,
            grad.sum(0) if bias else None,
            None,
        )


def entry_gradients(
    code: SparseCode, grad_x_hat: Float[Tensor, "n d_model"], W_dec: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, " n_entries"]:
    """G_i . W_dec_j for every entry (i, j) of the code, zeros included."""
    if static_shapes(grad_x_hat):
        return _gathered_dots(code, grad_x_hat, W_dec)
    pattern = torch.sparse_csr_tensor(
        code.offsets,
        code.latents,
        torch.zeros_like(code.values),
        size=(code.n_tokens, code.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, grad_x_hat, W_dec.T, beta=0.0).values()


def _gathered_dots(code: SparseCode, grad_x_hat: Tensor, W_dec: Tensor) -> Tensor:
    """`entry_gradients` by rows of W_dec gathered for every entry, some tokens at a time."""
    size = max(1, GATHERED // W_dec.shape[1])
    if k := code.per_token:
        tokens = max(1, size // k)
        parts = zip(code.columns.view(-1, k).split(tokens), grad_x_hat.split(tokens), strict=True)
        return torch.cat([torch.bmm(W_dec[latents], grad[:, :, None]).flatten() for latents, grad in parts])
    pairs = zip(code.rows.split(size), code.columns.split(size), strict=True)
    return torch.cat([(grad_x_hat[rows] * W_dec[latents]).sum(1) for rows, latents in pairs])


def through_threshold(
    pre: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"], width: float
) -> Float[Tensor, "*shape"]:
    """JumpReLU entry by entry: pre above its threshold, else 0 (Rajamanoharan et al. 2024, arXiv:2407.14435).

    The threshold learns through a rectangle of this width around it (eq. 11): d f / d threshold = -threshold / width.
    """
    return _JumpRelu.apply(pre, threshold, width)


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return grad * (pre > threshold), -threshold / ctx.width * near * grad, None


def above_threshold(
    pre: Float[Tensor, "*shape"], threshold: Float[Tensor, "*shape"], width: float
) -> Float[Tensor, "*shape"]:
    """1 where pre exceeds its threshold, else 0; d / d threshold = -1 / width within the rectangle (eq. 12)."""
    return _Step.apply(pre, threshold, width)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return None, -grad / ctx.width * near, None


def activate(
    kind: Dense, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"], code: Float[Tensor, "n d_sae"]
) -> tuple[Activity, Float[Tensor, ""]]:
    """Add the bias to `pre`, and write the activation into `code` (a relu's may be `pre` itself); returns sum |f| too.

    By slices of rows that stay in cache: a pass of its own over a code costs 1% of a step, and there would be eight.
    gelu is the exact one, not tanh's.
    """
    n_active: int | Tensor = 0
    total = bias.new_zeros((), dtype=sum_dtype(bias.device))
    fired, scratch = torch.zeros_like(bias, dtype=torch.bool), torch.empty_like(pre[: row_block(pre)])
    for z, f in zip(pre.split(row_block(pre)), code.split(row_block(pre)), strict=True):
        z.add_(bias)
        if kind == "relu":
            torch.clamp(z, min=0, out=f)
            total += f.sum()
        else:
            torch.ops.aten.gelu.out(z, out=f)
            total += torch.abs(f, out=scratch[: len(f)]).sum()
        some, n = _positive(z)  # z > 0 where gelu(z) > 0
        n_active += n
        fired |= some
    return Activity(fired, n_active), total


def _positive(x: Float[Tensor, "n d"]) -> tuple[Bool[Tensor, " d"], int | Tensor]:
    """In which columns entries are above 0, and how many. NumPy is 10 times as fast as torch there, on a CPU."""
    if static_shapes(x):
        positive = x > 0
        return positive.any(0), positive.sum()
    above = x.detach().numpy() > 0
    return torch.from_numpy(np.logical_or.reduce(above, axis=0)), int(np.count_nonzero(above))


def attach_dense(
    kind: Dense,
    code: Float[Tensor, "n d_sae"],
    pre: Float[Tensor, "n d_sae"],
    total: Float[Tensor, ""],
    centred: Float[Tensor, "n d_model"],
    weights: EncoderWeights,
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n d_sae"], Float[Tensor, ""]]:
    """(code, tap, sum |f|) of `activate` with a gradient, as `attach_entries`; a relu's `pre` may be its code.

    Code and tap are the same values: decoding reads one, losses of the code the other, so that the two gradients are
    added in slices that stay in cache.
    """
    once = None if pre is code else pre  # a compiler takes no tensor twice
    return _AttachDense.apply(*weights, centred, code, once, total, kind)


class _AttachDense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        _b_enc: Tensor,
        _b_dec: Tensor,
        centred: Tensor,
        code: Tensor,
        pre: Tensor | None,
        total: Tensor,
        kind: Dense,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(W, centred, code if pre is None else pre)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return code.view_as(code), code.view_as(code), total.view_as(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (*code_grads, l1), (W, centred, pre) = grads, ctx.saved_tensors
        out, ones, b_enc = torch.empty_like(pre), pre.new_ones(row_block(pre)), torch.zeros_like(pre[0])
        parts = [one for one in code_grads if one is not None] or [torch.zeros_like(pre)]
        for z, to, *gs in zip(*(one.split(row_block(pre)) for one in (pre, out, *parts)), strict=True):
            g = gs[0] if len(gs) == 1 else gs[0] + gs[1]
            if ctx.kind == "relu":
                torch.ops.aten.threshold_backward.grad_input(g if l1 is None else g + l1.to(g), z, 0.0, grad_input=to)
            else:  # gelu(z) has the sign of z
                g = g if l1 is None else g + torch.sign(z) * l1.to(g)
                torch.ops.aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=to)
            b_enc.addmv_(to.T, ones[: len(to)])  # as a product: several times as fast as sum(0)
        with matmuls(out.device):
            W_enc = out.T @ centred
        return W_enc.to(W.dtype), b_enc, -(b_enc @ W), None, None, None, None, None


def row_block(x: Tensor) -> int:
    """Rows of a slice: on a GPU all, as there launches cost more than passes."""
    return ROWS if x.device.type == "cpu" else max(1, len(x))


def part(code: Code, first: int, stop: int) -> Code:
    """The code of latents first..stop-1 alone."""
    return code.part(first, stop) if isinstance(code, SparseCode) else code[:, first:stop]


def permuted(code: Code, tokens: Int[Tensor, " n"]) -> Code:
    """The code of all its tokens in another order."""
    return code.permuted(tokens) if isinstance(code, SparseCode) else code[tokens]


def dense_rows(code: Code, tokens: Int[Tensor, " m"]) -> Float[Tensor, "m d_sae"]:
    """The code of a few distinct tokens as a matrix."""
    if isinstance(code, Tensor):
        return code[tokens]
    if static_shapes(code.values) and code.per_token is None:
        row_of = torch.full_like(code.offsets[1:], len(tokens))
        row_of[tokens] = torch.arange(len(tokens), device=tokens.device)
        dense = code.values.new_zeros(len(tokens) + 1, code.d_sae)  # the last takes what is of other tokens
        return dense.index_put((row_of[code.rows], code.columns), code.values, accumulate=True)[:-1]
    few = code.take(tokens)[0]
    dense = few.values.new_zeros(len(tokens), few.d_sae)
    return dense.index_put((few.rows, few.columns), few.values, accumulate=few.parked)


def square_norms(code: Code) -> Float[Tensor, " n"]:
    """||f_i||^2 of every token, in the dtype of sums."""
    if isinstance(code, Tensor):
        return torch.linalg.vector_norm(code, dim=1).square().to(sum_dtype(code.device))
    values = code.values.to(sum_dtype(code.values.device))
    return values.new_zeros(code.n_tokens).index_add(0, code.rows, values.square())


def pair_differences(code: Code, lag: int) -> Float[Tensor, " m"]:
    """||f_{i+lag} - f_i||^2 for every token i that has one so far behind it, in the dtype of sums; m = n - lag or 0."""
    if isinstance(code, Tensor):
        return _PairDifferences.apply(code, lag)
    n = max(0, code.n_tokens - lag)
    first, second, met = _matches(code, lag)
    values = code.values.to(sum_dtype(code.values.device))
    products = values.index_select(0, first) * values.index_select(0, second)
    if met is not None:
        products = torch.where(met, products, 0.0)
    squares = values.new_zeros(code.n_tokens).index_add(0, code.rows, values.square())
    dots = values.new_zeros(code.n_tokens).index_add(0, code.rows.index_select(0, first), products)
    return squares[:n] + squares[code.n_tokens - n :] - 2 * dots[:n]


def _matches(code: SparseCode, lag: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Bool[Tensor, " m"] | None]:
    """Entries (first, second) of one latent at tokens i and i + lag: neighbours in the order by latent, at lag 1; with
    static shapes all entries, and which of them have a second.
    """
    order, tokens = code.by_latent.order, code.by_latent.tokens
    key = code.latents[order] * (code.n_tokens + lag) + tokens
    behind = torch.searchsorted(key, key + lag) if lag > 1 else torch.arange(1, len(key) + 1, device=key.device)
    behind = behind.clamp_(max=max(0, len(key) - 1))
    met = key[behind] == key + lag
    if static_shapes(key):
        return order, order[behind], met
    at = met.nonzero().squeeze(1)
    return order[at], order[behind[at]], None


class _PairDifferences(torch.autograd.Function):
    """Of a matrix, by slices of rows that stay in cache."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, lag: int) -> Tensor:
        n = max(0, len(code) - lag)
        norms = code.new_zeros(n, dtype=sum_dtype(code.device))
        for start in range(0, n, row_block(code)):
            stop = min(start + row_block(code), n)
            norms[start:stop] = torch.linalg.vector_norm(code[start + lag : stop + lag] - code[start:stop], dim=1)
        ctx.save_for_backward(code)
        ctx.lag = lag
        return norms.square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (code,), lag, n = ctx.saved_tensors, ctx.lag, len(grads[0])
        if not n:
            return torch.zeros_like(code), None
        slope, grad = 2 * grads[0].to(code.dtype)[:, None], torch.empty_like(code)
        scratch = code.new_empty(row_block(code) + lag, code.shape[1])
        for start in range(0, len(code), row_block(code)):
            # d / d f_i = w_{i-lag} - w_i with w_j = slope_j (f_{j+lag} - f_j), 0 where there is no such pair.
            stop = min(start + row_block(code), len(code))
            first, last = max(0, start - lag), max(0, start - lag, min(stop, n))
            w = scratch[: stop - start + lag]
            skipped, behind = first - start + lag, last - start + lag
            w[:skipped].zero_()
            w[behind:].zero_()
            torch.sub(code[first + lag : last + lag], code[first:last], out=w[skipped:behind]).mul_(slope[first:last])
            torch.sub(w[:-lag], w[lag:], out=grad[start:stop])
        return grad, None


def group_sums(code: Code, group: Int[Tensor, " n"], n_groups: int) -> Float[Tensor, "n_groups d_sae"]:
    """Sum of the code over the tokens of each group; no gradient."""
    if isinstance(code, Tensor):
        return code.new_zeros(n_groups, code.shape[1]).index_add_(0, group, code.detach())
    flat = group[code.rows] * code.d_sae + code.columns
    values = code.values.detach()
    return values.new_zeros(n_groups * code.d_sae).index_add_(0, flat, values).view(n_groups, code.d_sae)


def group_dot(code: Code, table: Float[Tensor, "n_groups d_sae"], group: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """sum_i f_i . table[group_i], with a gradient to the code."""
    if isinstance(code, Tensor):
        return (code * table[group]).sum()
    return (code.values * table.view(-1)[group[code.rows] * code.d_sae + code.columns]).sum()


def activity(code: SparseCode) -> Activity:
    """Of a sparse code's entries."""
    active = code.values.detach() > 0
    counts = code.values.new_zeros(code.d_sae).index_add_(0, code.columns, active.to(code.values.dtype))
    return Activity(counts > 0, active.sum())
