"""Smoothing a finished SAE's codes along the positions of each sequence: the cheap rival of a temporal loss.

Nothing is trained. Smoothed codes are decoded by the SAE's own decoder and scored as any code is. A sequence's first
counted position has no past: nothing goes from one sequence into the next, nor from the positions that are skipped.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tcsae.evaluate.measures.core import join_codes
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, from_flat

EMA, EMA_TOPK, MEAN, HYSTERESIS, SCALE = "ema", "ema-topk", "mean", "hysteresis", "scale"
DEFINITIONS = {
    EMA: "f'_t = a f'_(t-1) + (1 - a) f_t along a sequence, f' = f at its first counted position; exact, so that a "
    "latent once on stays above zero, and L0 counts it",
    EMA_TOPK: "topk: ema, of which each token keeps its k largest latents, so that L0 stays what it was",
    MEAN: "mean of f over the last w counted positions of the sequence, fewer at its beginning",
    HYSTERESIS: "topk: the latents that were on at t-1 stay on at t while they are among the m k largest "
    "pre-activations and these are positive; the largest others fill up to k. With thresholds: a latent is on above "
    "its threshold, and stays on above threshold / m",
    SCALE: "c f: no smoothing, but the control for what a code gains by being smaller",
}
ALLOWED = {
    EMA: "ema=A, 0 <= A < 1",
    EMA_TOPK: "ema-topk=A, 0 <= A < 1",
    MEAN: "mean=W, a whole number from 1 on",
    HYSTERESIS: "hysteresis=M, M >= 1",
    SCALE: "scale=C, C > 0",
}


class Smoothing(NamedTuple):
    """One way to smooth, as in "ema=0.3"."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={int(self.value) if self.value.is_integer() else self.value}"


def parse_smoothing(text: str) -> Smoothing:
    """ "ema=0.3", "mean=3" or "hysteresis=2". Raises ConfigError, saying what is allowed."""
    kind, _, number = text.partition("=")
    if kind not in ALLOWED:
        raise ConfigError(f"--smooth {text}: {unknown('smoothing', kind, ALLOWED)} Write KIND=VALUE, as in ema=0.3.")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    fits = {
        EMA: 0 <= value < 1,
        EMA_TOPK: 0 <= value < 1,
        MEAN: value >= 1 and value.is_integer(),
        HYSTERESIS: 1 <= value < math.inf,
        SCALE: 0 < value < math.inf,
    }
    if not fits[kind]:
        raise ConfigError(f"--smooth {text}: allowed is {ALLOWED[kind]}.")
    return Smoothing(kind, value)


def split_name(name: str) -> tuple[str, str | None]:
    """ "RUN+ema=0.3" as "RUN" and "ema=0.3"; any other name, and None. Raises ConfigError for a value out of range."""
    run, _, smooth = name.rpartition("+")
    return (run, str(parse_smoothing(smooth))) if run and smooth.partition("=")[0] in ALLOWED else (name, None)


def check_smoothing(smoothing: Smoothing, config: SaeConfig) -> None:
    """Raises ConfigError for a smoothing that an SAE of this activation has no meaning for."""
    if config.reads_neighbours:
        is_what = f"sae.window={config.window}" if config.window > 1 else f"sae.predictor={config.predictor!r}"
        raise ConfigError(
            f"{smoothing} smooths codes of single tokens, and with {is_what} a code is of several. Evaluate it without "
            "--smooth."
        )
    allowed = {
        EMA_TOPK: ("topk",),
        HYSTERESIS: ("topk", *(name for name, kind in KINDS.items() if kind.threshold != "none")),
    }
    if config.activation not in allowed.get(smoothing.kind, (config.activation,)):
        raise ConfigError(
            f"{smoothing} is for {', '.join(allowed[smoothing.kind])} SAEs, and its activation is "
            f"{config.activation}: there is no bound to be kept or lowered. Smooth it by ema=A or mean=W."
        )


# By a kernel


def mean_kernel(n: int, over: int) -> Float[Tensor, "n n"]:
    """Row t: the weights of positions 0 to t in the mean over the last `over`."""
    lag = _lags(n)
    mean = ((lag >= 0) & (lag < over)).float()
    return mean / mean.sum(1, keepdim=True)


def ema_kernel(n: int, decay: float) -> Float[Tensor, "n n"]:
    """Row t: the weights of positions 0 to t in an exponential memory that was empty before."""
    lag = _lags(n)
    return torch.where(lag >= 0, decay ** lag.clamp(min=0).float(), 0.0) * (1 - decay)


def smoothing_kernel(smoothing: Smoothing, n: int) -> Float[Tensor, "n n"]:
    """Of `ema`, `mean` and `scale`, for sequences of up to n positions."""
    if smoothing.kind == SCALE:
        return smoothing.value * torch.eye(n)
    if smoothing.kind == MEAN:
        return mean_kernel(n, int(smoothing.value))
    kernel = ema_kernel(n, smoothing.value)
    kernel[:, :1] /= 1 - smoothing.value  # as if the first code had always been there: an empty memory would shrink it
    return kernel


def filtered(code: Code, lengths: Sequence[int], kernel: Float[Tensor, "longest longest"]) -> Code:
    """The code of consecutive sequences of these lengths, each multiplied by the kernel's beginning."""
    if not isinstance(code, SparseCode):
        return filtered_rows(code, lengths, kernel)
    parts: list[Code] = [code_of_none(code.d_sae)]
    start = 0
    for n in lengths:
        part = slice(int(code.offsets[start]), int(code.offsets[start + n]))
        latents, column = code.latents[part].unique(return_inverse=True)  # only these can be on
        row = torch.repeat_interleave(torch.arange(n), code.offsets[start : start + n + 1].diff())
        dense = torch.zeros(n, len(latents)).index_put_((row, column), code.values[part])
        made = kernel[:n, :n] @ dense
        at = torch.from_numpy(np.flatnonzero(made.numpy()))
        on = from_flat(at, made.view(-1)[at], (n, max(1, len(latents))))
        parts.append(SparseCode(on.values, latents[on.latents], on.offsets, code.d_sae))
        start += n
    return join_codes(parts)


def filtered_rows(
    code: Float[Tensor, "n d_sae"], lengths: Sequence[int], kernel: Float[Tensor, "longest longest"]
) -> Float[Tensor, "n d_sae"]:
    """The same of a dense code."""
    parts = [kernel[: len(part), : len(part)] @ part for part in code.split(list(lengths))]
    return torch.cat([code[:0], *parts])


def keep_largest(code: SparseCode, k: int) -> SparseCode:
    """The k largest entries of each token, all of one that has fewer."""
    rows = code.rows
    order = np.lexsort((-code.values.numpy(), rows.numpy()))
    at = torch.from_numpy(order[np.arange(len(order)) - code.offsets[rows].numpy() < k])
    offsets = torch.zeros_like(code.offsets)
    torch.cumsum(code.offsets.diff().clamp(max=k), 0, out=offsets[1:])
    return SparseCode(code.values[at], code.latents[at], offsets, code.d_sae)


def code_of_none(d_sae: int) -> SparseCode:
    """The code of no token."""
    return SparseCode(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), d_sae)


def _lags(n: int) -> Int[Tensor, "n n"]:
    return torch.arange(n)[:, None] - torch.arange(n)


# By hysteresis


def stay_topk(candidates: SparseCode, lengths: Sequence[int], k: int) -> SparseCode:
    """Hysteresis of a topk SAE, whose `candidates` are the m k largest pre-activations of each token."""
    per_token = len(candidates.values) // max(1, candidates.n_tokens)
    values, order = candidates.values.view(candidates.n_tokens, per_token).sort(1, descending=True)
    latents = candidates.latents.view(candidates.n_tokens, per_token).gather(1, order)
    chosen = torch.zeros(len(values), min(k, per_token), dtype=torch.int64)

    def step(now: Tensor, sequences: Tensor, before: Bool[Tensor, "n_sequences d_sae"]) -> tuple[Tensor, Tensor]:
        stays = before[sequences[:, None], latents[now]] & (values[now] > 0)
        # Those that stay come first, then the largest.
        best = (~stays).long().sort(dim=1, stable=True).indices[:, : chosen.shape[1]]
        chosen[now] = best
        on = values[now].gather(1, best) > 0
        return sequences[:, None].expand_as(best)[on], latents[now].gather(1, best)[on]

    _walk(lengths, candidates.d_sae, step)
    offsets = torch.arange(0, chosen.numel() + 1, max(1, chosen.shape[1]))[: len(chosen) + 1]
    entries = values.gather(1, chosen).relu().flatten(), latents.gather(1, chosen).flatten()
    return SparseCode(*entries, offsets, candidates.d_sae)


def stay_above(candidates: SparseCode, lengths: Sequence[int], threshold: Float[Tensor, " d_sae"]) -> SparseCode:
    """Hysteresis of an SAE with thresholds, whose `candidates` are the pre-activations above the lower ones."""
    strong, counts = candidates.values > threshold[candidates.latents], candidates.offsets.diff()
    on = strong.clone()

    def step(now: Tensor, sequences: Tensor, before: Bool[Tensor, "n_sequences d_sae"]) -> tuple[Tensor, Tensor]:
        n = counts[now]
        first = torch.repeat_interleave(candidates.offsets[now] - (n.cumsum(0) - n), n)
        entries = torch.arange(len(first)) + first
        of, latents = torch.repeat_interleave(sequences, n), candidates.latents[entries]
        on[entries] |= before[of, latents]
        return of[on[entries]], latents[on[entries]]

    _walk(lengths, candidates.d_sae, step)
    at = on.nonzero().squeeze(1)
    per_token = torch.bincount(candidates.rows[at], minlength=candidates.n_tokens)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), per_token.cumsum(0)])
    return SparseCode(candidates.values[at], candidates.latents[at], offsets, candidates.d_sae)


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(tokens of one position, their sequences, what was on before) -> (sequences, latents) of what is on now."""


def _walk(lengths: Sequence[int], d_sae: int, step: Step) -> None:
    """Take all sequences' first tokens, then their second ones, ..."""
    n = torch.tensor(list(lengths), dtype=torch.int64)
    starts = n.cumsum(0) - n
    before = torch.zeros(len(n), d_sae, dtype=torch.bool)
    for position in range(int(n.max()) if len(n) else 0):
        sequences = (n > position).nonzero().squeeze(1)
        on = step(starts[sequences] + position, sequences, before)
        before.zero_()
        before[on] = True
