"""One SAE's latents as the report's data: an index of all that are alive, and chunks of what a page shows of each."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tcsae.evaluate.measures.saebench import max_cosines
from tcsae.evaluate.report.features.contexts import Context
from tcsae.evaluate.report.features.feature_pass import MEASURES, Features
from tcsae.evaluate.report.features.lens import Lens
from tcsae.evaluate.report.features.likeness import ByDecoder, ByFiring, Nearest, nearest_by_decoder
from tcsae.evaluate.report.features.shown_feature import LABELS
from tcsae.shared.sae.module import SparseAutoencoder

PER_CHUNK = 64
"""Latents whose data one file holds."""
N_LABELS = 6
"""Tokens that stand for a latent in lists, and that it is found by."""
LABEL_SHARE = 0.25
"""Share of its peak in a sequence from which on a token counts as one that the latent fires on."""
OTHER_MEASURES = {
    "max": "its largest activation",
    "mean": "its mean activation where it is active",
    "sequences": "number of sequences in which it is ever active",
    "decoder_cosine": "largest cosine of its decoder row with that of another latent",
}


class FeatureData(NamedTuple):
    """All of one SAE's features."""

    latents: list[int]
    """Those alive."""
    measures: dict[str, np.ndarray]
    """Of all latents, dead ones included."""
    listing: dict[str, Any]
    """What the browser sorts, filters and searches."""
    chunks: dict[int, dict[int, Any]]
    sequences: set[int]
    """Numbers of the sequences that are shown."""
    tokens: set[int]
    """Ids outside of them whose text is needed."""
    opposite: Nearest
    """By decoder, of all latents."""


def feature_data(
    features: Features,
    sae: SparseAutoencoder,
    lenses: Sequence[Lens] | None,
    tokens: Int[np.ndarray, "n_sequences length"],
    latents: list[int],
) -> FeatureData:
    """The data of some latents that are alive. `lenses` are of the window's positions, the token's last, each with a
    row for every latent; `tokens` are those of the split.
    """
    alive, lens = features.alive, lenses[-1] if lenses else None
    measures = latent_measures(features, sae)
    by_decoder, by_firing = nearest_by_decoder(sae.W_dec, alive), features.firing.nearest(alive)
    rarity = token_rarity(tokens)
    labels = {latent: label_tokens(features.contexts.kept(latent), tokens, rarity) for latent in latents}
    shown: set[int] = set()
    chunks: dict[int, dict[int, Any]] = {}
    for row, latent in enumerate(latents):
        contexts = features.contexts.contexts(latent)
        shown |= {one.sequence for one in contexts}
        chunk = chunks.setdefault(latent // PER_CHUNK, {})
        chunk[latent] = _shown(features, latent, contexts) | _likes(by_decoder, by_firing, latent)
        chunk[latent] |= _lens(lens, row) if lens else {}
        chunk[latent] |= _window(sae, latent, lenses or [], row) if sae.config.window > 1 else {}
    listing: dict[str, Any] = {
        "latents": latents,
        "columns": {name: [_short(values[latent]) for latent in latents] for name, values in measures.items()},
        "fires": [labels[latent] for latent in latents],
        "promotes": lens.promoted[:, :N_LABELS].tolist() if lens else None,
        "per_chunk": PER_CHUNK,
        "n_latents": sae.config.d_sae,
        "n_tokens": features.n_tokens,
        "group": _groups(sae, latents),
    }
    needed = {token for label in labels.values() for token in label}
    for one in lenses or []:
        needed |= set(one.promoted.flatten().tolist()) | set(one.suppressed.flatten().tolist())
    return FeatureData(latents, measures, listing, chunks, shown, needed, by_decoder.opposite)


def _shown(features: Features, latent: int, contexts: Iterable[Context]) -> dict[str, Any]:
    width, counts = features.histogram.of(latent)
    return {
        "contexts": [_context(one) for one in contexts],
        "rho": [_short(value) for value in features.figures.rho[:, latent].tolist()],
        "null": _short(float(features.figures.rho_null[latent])),
        "histogram": [width, counts],
    }


def _likes(by_decoder: ByDecoder, by_firing: ByFiring, latent: int) -> dict[str, Any]:
    """The latents most alike in each way, with how much: cosines, shares of tokens, correlations."""
    return {
        "near": _pairs(by_decoder.near, latent),
        "opposite": [[other, -cosine] for other, cosine in _pairs(by_decoder.opposite, latent)],
        "joint": _pairs(by_firing.joint, latent),
        "correlated": _pairs(by_firing.correlated, latent),
    }


def latent_measures(features: Features, sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    """Every measure of LABELS, of all latents."""
    contexts = features.contexts
    dead = ~features.alive
    values = features.figures.measures | {
        "max": contexts.maximum().double(),
        "mean": contexts.total / contexts.n_active,
        "sequences": contexts.n_sequences.double(),
        "decoder_cosine": max_cosines(sae.W_dec.detach()).double(),
    }
    assert values.keys() == MEASURES.keys() | OTHER_MEASURES.keys() == LABELS.keys()
    measured = ("density", "decoder_cosine")
    return {
        name: (one if name in measured else one.masked_fill(dead, torch.nan)).numpy() for name, one in values.items()
    }


def token_rarity(tokens: Int[np.ndarray, "n_sequences length"]) -> Float64[np.ndarray, " vocabulary"]:
    """log(tokens / tokens of an id), by id: how much it says that a latent fires on it."""
    counts = np.bincount(tokens.ravel())
    return np.log(tokens.size / np.maximum(counts, 1))


def label_tokens(
    contexts: Iterable[Context],
    tokens: Int[np.ndarray, "n_sequences length"],
    rarity: Float64[np.ndarray, " vocabulary"],
) -> list[int]:
    """The token ids that tell most of a latent: its summed share of each sequence's peak, times the token's rarity."""
    total: dict[int, float] = {}
    for one in contexts:
        shares = one.activations / one.activations.max()
        for at in np.flatnonzero(shares >= LABEL_SHARE):
            token = int(tokens[one.sequence, at])
            total[token] = total.get(token, 0.0) + float(shares[at])
    return sorted(total, key=lambda token: (-total[token] * rarity[token], token))[:N_LABELS]


def _context(one: Context) -> list[Any]:
    """[sequence, quantile or null, positions, activations there]."""
    at = np.flatnonzero(one.activations > 0)
    return [one.sequence, one.quantile, at.tolist(), [_short(value) for value in one.activations[at].tolist()]]


def _pairs(nearest: Nearest, latent: int) -> list[list[Any]]:
    pairs = zip(nearest.latents[latent].tolist(), nearest.likeness[latent].tolist(), strict=True)
    return [[other, _short(likeness)] for other, likeness in pairs if likeness > 0]


def _lens(lens: Lens, row: int) -> dict[str, Any]:
    def pairs(tokens: Tensor, changes: Tensor) -> list[list[Any]]:
        changed = zip(tokens[row].tolist(), changes[row].tolist(), strict=True)
        return [[token, _short(change)] for token, change in changed]

    low, high = _short(float(lens.lowest[row])), _short(float(lens.highest[row]))
    return {
        "up": pairs(lens.promoted, lens.gains),
        "down": pairs(lens.suppressed, lens.losses),
        "logits": [low, high, lens.counts[row].tolist()],
    }


def _window(sae: SparseAutoencoder, latent: int, lenses: Sequence[Lens], row: int) -> dict[str, Any]:
    """A crosscoder's latent at each position of its window, the token's last.

    [share of its squared norm, cosine with the last, tokens promoted (empty without a tail)] each.
    """
    rows = sae.window_rows[latent]
    shares = rows.square().sum(1) / rows.square().sum().clamp(min=1e-30)
    cosines = torch.cosine_similarity(rows, rows[-1:])
    promoted = [lens.promoted[row].tolist() for lens in lenses] or [[]] * len(rows)
    columns = zip(shares.tolist(), cosines.tolist(), promoted, strict=True)
    return {"window": [[_short(share), _short(cosine), tokens] for share, cosine, tokens in columns]}


def _groups(sae: SparseAutoencoder, latents: list[int]) -> list[int] | None:
    """Which group each latent is of, from 0; None where there is one group only."""
    ranges = sae.config.group_ranges()
    if len(ranges) == 1:
        return None
    stops = np.array([stop for _, stop in ranges])
    return np.searchsorted(stops, latents, side="right").tolist()


def _short(value: float) -> float | int | None:
    """Three significant digits: what a page shows. None for NaN."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short
