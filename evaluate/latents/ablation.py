"""Ablation of latents: what reconstruction and language model lose without one, or without several at once.

An ablated latent's contribution, its code times its decoder row, is taken from x itself, so what the SAE does not
reconstruct stays (the error term of sparse feature circuits, arXiv:2403.19647): the loss is of the latent alone.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.latents.material import Coded
from tcsae.evaluate.latents.patched import compared
from tcsae.shared.lm.tail import Tail

LAGS = 16
"""Positions after a change that are looked at, besides its own."""
ONE, SPAN, RANDOM = "one_token", "span", "random_direction"
KINDS = (ONE, SPAN, RANDOM)

DEFINITIONS = {
    "ev_lost": "explained variance lost without the latent, exact on the tokens looked at; below 0: it harms",
    "ce_lost": "rise of the language model's cross-entropy, in nats a prediction, with the latent's contribution taken "
    "from x on every token; below 0: it harms",
    "ce_lost_per_firing": "the same sum over the tokens on which the latent is on, in nats a firing",
    "kl": "KL divergence of those predictions from the clean ones, in nats a token",
    "sequences_seen": "sequences that the tail ran, of all in which the latent is on; of fewer, ce_lost and kl are "
    "scaled up",
    "kl_one_token": f"KL divergence at a token and the {LAGS} after it, in nats, with the latent taken from x at that "
    "token alone; mean over tokens on which it is on",
    "kl_span": f"the same with the latent taken away wherever it is on at those {LAGS + 1} tokens",
    "kl_random_direction": "the null: the same norm taken away at the one token in a random direction",
    "later_share": f"share of the KL of the {LAGS + 1} tokens that lies after the first, ablated at that one alone",
}

Latents = Sequence[int]


def ev_lost(coded: Coded) -> Float[ndarray, " d_sae"]:
    """Of every latent: (sum |x - xhat + f d|^2 - sum |x - xhat|^2) / sum |x - mean|^2, d its decoder row."""
    along = (coded.added.T @ coded.error.astype(np.float64) * coded.rows).sum(1)
    squares = coded.added.power(2).sum(0) * np.square(coded.rows, dtype=np.float64).sum(1)
    return (2 * along + squares) / coded.sequences.total_variation


class Ablated(NamedTuple):
    """Losses of the language model without each item (one latent, or several together)."""

    ce: Float[ndarray, " n_items"]
    """Nats a prediction."""
    ce_per_firing: Float[ndarray, " n_items"]
    """NaN for what is never on."""
    kl: Float[ndarray, " n_items"]
    """Nats a counted token."""
    n_sequences: Int[ndarray, " n_items"]
    """In which any of its latents is on."""
    n_seen: Int[ndarray, " n_items"]
    """Of those, run through the tail."""


def ablated(coded: Coded, tail: Tail, items: Sequence[Latents], most: int) -> Ablated:
    """Ablate each item on all tokens. At most `most` sequences of an item are run, evenly spaced among those in which
    it is on: elsewhere nothing changes.
    """
    sequences = coded.sequences
    sums = np.zeros((3, len(items)))  # cross-entropy, KL, firings
    n_sequences, n_seen = np.zeros((2, len(items)), np.int64)
    of_sequence: dict[int, list[int]] = {}
    for item, latents in enumerate(items):
        held = np.unique(sequences.sequence[coded.firing(latents)])
        chosen = evenly(held, most)
        n_sequences[item], n_seen[item] = len(held), len(chosen)
        for one in chosen.tolist():
            of_sequence.setdefault(one, []).append(item)
    for sequence, here in sorted(of_sequence.items()):
        deltas, first = _taken_away(coded, sequence, [items[item] for item in here])
        x, targets = sequences.activations(sequence), sequences.targets(sequence)
        number = np.array(here)
        for block in compared(tail, x, deltas, first, torch.full_like(first, len(x))):
            at = number[block.row.cpu().numpy()]
            for total, values in zip(sums, (block.ce_change(targets), block.kl), strict=False):
                np.add.at(total, at, values.double().cpu().numpy())
        sums[2, number] += (deltas != 0).any(2).sum(1).numpy()
    scale = n_sequences / np.maximum(n_seen, 1)
    return Ablated(
        ce=sums[0] * scale / max(1, sequences.n_predictions),
        ce_per_firing=np.where(sums[2] > 0, sums[0] / np.maximum(sums[2], 1), np.nan),
        kl=sums[1] * scale / max(1, len(sequences.sequence)),
        n_sequences=n_sequences,
        n_seen=n_seen,
    )


def _taken_away(
    coded: Coded, sequence: int, items: Sequence[Latents]
) -> tuple[Float[Tensor, "m length d_model"], Int[Tensor, " m"]]:
    """Each item's contribution to a sequence, negative; and the first position where it has one."""
    sequences = coded.sequences
    start, stop = sequences.starts[sequence : sequence + 2].tolist()
    deltas = torch.zeros(len(items), int(sequences.lengths[sequence]), coded.rows.shape[1])
    first = torch.zeros(len(items), dtype=torch.int64)
    skipped = sequences.tokens.skip_first
    for i, latents in enumerate(items):
        added = coded.contribution(latents, start, stop)
        deltas[i, skipped:] = torch.from_numpy(-added)
        on = np.flatnonzero(added.any(1))
        first[i] = skipped + (int(on[0]) if len(on) else 0)
    return deltas, first


def evenly(values: Int[ndarray, " n"], most: int) -> Int[ndarray, " m"]:
    """At most so many of them, evenly spaced."""
    if len(values) <= most:
        return values
    return values[((np.arange(most) + 0.5) * len(values) / most).astype(np.int64)]


EVENTS_AT_ONCE = 16
"""Of one sequence: each takes three sequences of memory."""


class Event(NamedTuple):
    """A token on which an item is on, and that is followed by another of its sequence."""

    item: int
    sequence: int
    position: int


def kl_after(
    coded: Coded, tail: Tail, items: Sequence[Latents], n_events: int, seed: int = 0
) -> Float[ndarray, "n_items 3 lags_plus_1"]:
    """Mean KL at each lag after a token on which an item is on, for each of KINDS; NaN where no event reaches."""
    sequences = coded.sequences
    totals = np.zeros((2, len(items), len(KINDS), LAGS + 1))  # sums, numbers
    rng = np.random.default_rng(seed)
    events = [event for item, latents in enumerate(items) for event in _events(coded, item, latents, n_events)]
    events.sort(key=lambda event: event.sequence)
    for sequence, grouped in itertools.groupby(events, key=lambda event: event.sequence):
        here, x = list(grouped), sequences.activations(sequence)
        for start in range(0, len(here), EVENTS_AT_ONCE):
            part = here[start : start + EVENTS_AT_ONCE]
            deltas = torch.cat([_event_deltas(coded, event, items[event.item], rng) for event in part])
            first = torch.tensor([event.position for event in part]).repeat_interleave(len(KINDS))
            item_of = np.array([event.item for event in part])
            for block in compared(tail, x, deltas, first, (first + LAGS + 1).clamp(max=len(x))):
                row, position = block.row.cpu().numpy(), block.position.cpu().numpy()
                at = item_of[row // len(KINDS)], row % len(KINDS), position - first.numpy()[row]
                np.add.at(totals[0], at, block.kl.double().cpu().numpy())
                np.add.at(totals[1], at, 1)
    with np.errstate(invalid="ignore"):
        return totals[0] / totals[1]


def _events(coded: Coded, item: int, latents: Latents, n_events: int) -> list[Event]:
    sequences, on = coded.sequences, coded.firing(latents)
    followed = on[sequences.position[on] + 1 < sequences.lengths[sequences.sequence[on]]]
    chosen = evenly(followed, n_events)
    return [Event(item, int(sequences.sequence[one]), int(sequences.position[one])) for one in chosen]


def _event_deltas(
    coded: Coded, event: Event, latents: Latents, rng: np.random.Generator
) -> Float[Tensor, "3 length d_model"]:
    """One row for each of KINDS."""
    whole = _taken_away(coded, event.sequence, [latents])[0][0]
    at, stop = event.position, event.position + LAGS + 1
    rows = torch.zeros(len(KINDS), *whole.shape)
    rows[0, at] = whole[at]
    rows[1, at:stop] = whole[at:stop]
    direction = torch.from_numpy(rng.standard_normal(whole.shape[1], np.float32))
    rows[2, at] = direction * (whole[at].norm() / direction.norm())
    return rows


def later_share(kl: Float[ndarray, "*axes lags_plus_1"]) -> Float[ndarray, "*axes"]:
    """Share that lies after the first token; NaN where there is none at all."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(kl[..., 1:], -1) / np.nansum(kl, -1)
