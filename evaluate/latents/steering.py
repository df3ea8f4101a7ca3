"""Steering: a latent's decoder row added to one token, and what the language model says of it there and after.

Latents are compared at equal KL: the strength is searched at which the predictions at the token itself have moved by
STEER_KL nats. All latents are added at the same tokens, whether on or off there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.latents.ablation import LAGS
from tcsae.evaluate.latents.material import Sequences
from tcsae.evaluate.latents.patched import compared
from tcsae.shared.lm.tail import Tail

STEER_KL = 0.5
"""Nats at the token itself: the most likely next token is then often another one."""
STEPS, CLOSE = 10, 0.05
"""Of the search; relative distance from STEER_KL at which it ends."""
N_PROMOTED = 5

DEFINITIONS = {
    "steer_strength": f"norm added at one token, over the median norm of x, for a KL divergence of {STEER_KL} nats at "
    "that token; smaller: the model listens to this direction",
    "steer_later_share": f"share of the KL of the token and the {LAGS} after it that lies after it",
    "steer_side_effect": f"rise of the cross-entropy of the text's own next tokens over the {LAGS} predictions after "
    "that token, in nats a prediction",
    "steer_kl": "the KL divergence that was reached at the token itself, mean over the tokens steered",
    "promoted": "tokens whose probability rises most at the steered token",
    "promoted_after": f"the same over the {LAGS} tokens after it",
}


class Steered(NamedTuple):
    """What steering along each direction did."""

    strength: Float[ndarray, " n"]
    """Norm added, over the median norm of x."""
    kl: Float[ndarray, "n lags_plus_1"]
    """Mean over places."""
    side_effect: Float[ndarray, " n"]
    """Nats a prediction after the steered token."""
    promoted: Int[ndarray, "n 2 n_promoted"]
    """Token ids: at the token, and after it."""


def places(sequences: Sequences, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """(sequence, position) of at most n tokens in different sequences, with LAGS and one more after them.

    Where fewer than n sequences are so long, tokens with any other after them.
    """
    first, lengths = sequences.tokens.skip_first, sequences.lengths
    after = LAGS + 1 if (lengths - first > LAGS + 1).sum() >= n else 1
    able = np.flatnonzero(lengths - first > after)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(able)[:n])
    return [(int(one), int(rng.integers(first, lengths[one] - after))) for one in chosen]


def steered(
    sequences: Sequences, tail: Tail, directions: Float[ndarray, "n d_model"], at: Sequence[tuple[int, int]]
) -> Steered:
    """Add each direction at each place, as strongly as it takes; directions of zeros are not moved (NaN)."""
    median = float(np.median(torch.linalg.vector_norm(sequences.x, dim=1)))
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    units = torch.from_numpy(directions / np.maximum(norms, 1e-12))
    strength = _search(sequences, tail, units, at, median)
    n = len(units)
    kl, counts = np.zeros((2, n, LAGS + 1))
    side, n_side = np.zeros((2, n))
    gain = torch.zeros(2, n, tail.vocabulary, device=tail.device)
    for sequence, position in at:
        x, targets = sequences.activations(sequence), sequences.targets(sequence)
        first = torch.full((n,), position)
        deltas = _added(x, position, units * torch.from_numpy(strength * median).float()[:, None])
        for block in compared(tail, x, deltas, first, (first + LAGS + 1).clamp(max=len(x))):
            row, lag = block.row.cpu().numpy(), (block.position - position).cpu().numpy()
            np.add.at(kl, (row, lag), block.kl.double().cpu().numpy())
            np.add.at(counts, (row, lag), 1)
            change = np.where(lag > 0, block.ce_change(targets).double().cpu().numpy(), 0)
            np.add.at(side, row, change)
            np.add.at(n_side, row, (lag > 0) & (block.position.cpu().numpy() < len(targets)))
            after = (block.position > position).long()
            gain.view(2 * n, -1).index_add_(0, after * n + block.row, block.gain)
    with np.errstate(invalid="ignore"):
        promoted = gain.topk(min(N_PROMOTED, tail.vocabulary)).indices.transpose(0, 1).cpu().numpy()
        moved = norms[:, 0] > 1e-12
        return Steered(
            np.where(moved, strength, np.nan),
            np.where(moved[:, None], kl / counts, np.nan),
            np.where(moved, side / n_side, np.nan),
            promoted,
        )


def _search(
    sequences: Sequences,
    tail: Tail,
    units: Float[Tensor, "n d_model"],
    at: Sequence[tuple[int, int]],
    median: float,
) -> Float[ndarray, " n"]:
    """Strengths at which the mean KL over the places is STEER_KL. KL grows with the square of a small change."""
    strength, left = np.full(len(units), 0.5), np.flatnonzero(units.any(1).numpy())
    for _ in range(STEPS):
        now, size = np.zeros(len(left)), torch.from_numpy(strength[left] * median).float()[:, None]
        for sequence, position in at:
            x = sequences.activations(sequence)[: position + 1]
            first = torch.full((len(left),), position)
            for block in compared(tail, x, _added(x, position, units[left] * size), first, first + 1):
                now[block.row.cpu().numpy()] += block.kl.double().cpu().numpy() / len(at)
        ratio = STEER_KL / np.maximum(now, 1e-9)
        strength[left] = (strength[left] * np.sqrt(ratio).clip(0.25, 4)).clip(1e-4, 1e3)
        left = left[abs(np.log(ratio)) >= CLOSE]
        if not len(left):
            break
    return strength


def _added(
    x: Float[Tensor, "length d_model"], position: int, steps: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n length d_model"]:
    deltas = torch.zeros(len(steps), *x.shape)
    deltas[:, position] = steps
    return deltas
