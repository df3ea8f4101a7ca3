"""Where each latent lies on a map: decoder rows in two dimensions, and which of them are opposite."""

import importlib.util
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from tcsae.evaluate.report.features.likeness import Nearest, unit_rows

OPPOSITE_FROM = 0.5
"""Minus the cosine from which on two latents are joined on the map."""
MAX_PAIRS = 400
UMAP_NEIGHBOURS = 15


class DecoderMap(NamedTuple):
    """The latents that are alive, on one or more maps."""

    places: dict[str, Float32[np.ndarray, "n_alive 2"]]
    """By method; both axes within [-1, 1]."""
    explained: float
    """Share of the variance of the rows that the two principal components hold."""
    pairs: list[tuple[int, int, float]]
    """(latent, latent, cosine) of opposite latents, most opposite first."""


def decoder_map(W_dec: Float[Tensor, "d_sae d_model"], alive: Bool[Tensor, " d_sae"], opposite: Nearest) -> DecoderMap:
    """Principal components of the unit rows; UMAP by cosine as well where umap-learn is installed."""
    rows = unit_rows(W_dec)[alive]
    if len(rows) < 3:
        return DecoderMap({"PCA": np.zeros((len(rows), 2), dtype=np.float32)}, 0.0, [])
    centred = rows - rows.mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)
    first_two = axes[:, -2:].flip(1)
    # The sign of an axis is arbitrary: its largest component is positive, so that a rerun draws the same map.
    largest = first_two.gather(0, first_two.abs().argmax(0, keepdim=True))
    places = {"PCA": _fit(centred @ (first_two * largest.sign()))}
    if importlib.util.find_spec("umap") and len(rows) > UMAP_NEIGHBOURS:
        places["UMAP"] = _fit(torch.from_numpy(_umap(rows.numpy())))
    return DecoderMap(places, float(variances[-2:].sum() / variances.sum().clamp(min=1e-30)), _pairs(alive, opposite))


def _umap(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n 2"]:
    import umap

    return umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1).fit_transform(rows)


def _fit(places: Float[Tensor, "n 2"]) -> Float32[np.ndarray, "n 2"]:
    """Centred, the longer side of the map from -1 to 1."""
    low, high = places.amin(0), places.amax(0)
    return ((places - (low + high) / 2) / ((high - low).max() / 2).clamp(min=1e-12)).float().numpy()


def _pairs(alive: Tensor, opposite: Nearest) -> list[tuple[int, int, float]]:
    if not opposite.latents.shape[1]:
        return []
    other, likeness = opposite.latents[:, 0], opposite.likeness[:, 0]
    far = (alive & (likeness >= OPPOSITE_FROM)).nonzero().squeeze(1).tolist()
    cosines = {tuple(sorted((one, int(other[one])))): -float(likeness[one]) for one in far}
    ordered = sorted(cosines.items(), key=lambda pair: (pair[1], pair[0]))[:MAX_PAIRS]
    return [(a, b, cosine) for (a, b), cosine in ordered]
