"""A linear part of the activations, a baseline for temporal terms: m slow or wide directions beside an SAE of the rest.

s = (x - mu) W is taken as it is, dense and signed; the SAE reads what a regression on s leaves, (x - mu)(I - W R). SFA
(Wiskott & Sejnowski 2002) takes the m directions whose adjacent values differ least for their variance, PCA the widest.
The two fold into one SAE with thresholds: a signed scalar is two relu latents, of which one is on.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.reader import Store
from tcsae.train.config import TrainConfig
from tcsae.train.loader import SegmentLoader

FIT_TOKENS = 500_000
"""Train tokens that the moments are taken from, from the first batch of the run's order on."""
NULL_VARIANCE = 1e-6
"""Directions of less than this share of the mean variance are left out: whitening would blow them up."""


class LinearPart(NamedTuple):
    """mu, W and R in the units of the data."""

    mu: Float[Tensor, " d_model"]
    W: Float[Tensor, "d_model m"]
    R: Float[Tensor, "m d_model"]

    def to(self, x: Tensor) -> "LinearPart":
        """With the device and dtype of x."""
        return LinearPart(*(one.to(x) for one in self))

    def rest(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """What the SAE reads."""
        centred = x - self.mu
        return centred - (centred @ self.W) @ self.R

    @torch.no_grad()
    def folded(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """One SAE of x: latents 0..m-1 are s where positive, m..2m-1 are -s where negative; then those of `sae`."""
        config, m = sae.config, self.W.shape[1]
        kind = "relu" if config.activation == "relu" else "jumprelu"
        k = min(config.k + m, config.d_sae + 2 * m)
        whole = SparseAutoencoder(SaeConfig(d_model=config.d_model, d_sae=config.d_sae + 2 * m, activation=kind, k=k))
        mu, W, R = (one.double() for one in self)
        b_dec, W_enc = sae.b_dec.double(), sae.W_enc_rows.double()
        shift = b_dec @ W
        # (x - mu)(I - W R) - b_dec = (x - mu - b_dec)(I - W R) - b_dec W R
        whole.W_enc_rows.copy_(torch.cat([W.T, -W.T, W_enc - (W_enc @ R.T) @ W.T]))
        whole.b_enc.copy_(torch.cat([shift, -shift, sae.b_enc.double() - W_enc @ (shift @ R)]))
        whole.W_dec.copy_(torch.cat([R, -R, sae.W_dec.double()]))
        whole.b_dec.copy_(mu + b_dec)
        if whole.threshold is not None:
            whole.threshold.copy_(torch.cat([torch.zeros(2 * m), sae.learned_threshold.detach()]))
        return whole.eval()


class _Moments:
    """First and second moments of x and of its adjacent differences, around their means at each position: else the
    slowest direction is the position.
    """

    def __init__(self, n_positions: int, d: int) -> None:
        self.n, self.pairs = np.zeros(n_positions), np.zeros(n_positions)
        self.total, self.moved = (np.zeros((n_positions, d)) for _ in range(2))
        self.second, self.difference = (np.zeros((d, d)) for _ in range(2))

    def add(self, x: Float64[ndarray, "n d"], lengths: ndarray, starts: ndarray) -> None:
        position = positions(lengths) + np.repeat(starts, lengths)
        segment = np.repeat(np.arange(len(lengths)), lengths)
        inside = np.flatnonzero(segment[1:] == segment[:-1])
        steps = x[inside + 1] - x[inside]
        for n, total, rows, at in (
            (self.n, self.total, x, position),
            (self.pairs, self.moved, steps, position[inside]),
        ):
            n += np.bincount(at, minlength=len(n))
            np.add.at(total, at, rows)
        self.second += x.T @ x
        self.difference += steps.T @ steps

    def around_means(self) -> tuple[Float64[ndarray, " d"], Float64[ndarray, "d d"], Float64[ndarray, "d d"]]:
        """(mean, covariance, mean square of differences)."""
        means, moves = (one / np.maximum(n, 1)[:, None] for one, n in ((self.total, self.n), (self.moved, self.pairs)))
        covariance = (self.second - (means.T * self.n) @ means) / self.n.sum()
        difference = (self.difference - (moves.T * self.pairs) @ moves) / max(1, self.pairs.sum())
        return self.total.sum(0) / self.n.sum(), covariance, difference


def fit_linear(store: Store, config: TrainConfig) -> LinearPart | None:
    """The part that `config.linear` asks for, from the train split, the same in every process; None if for none.

    Raises ConfigError if there are fewer directions than it asks for.
    """
    chosen = config.linear
    if chosen.kind == "none":
        return None
    loader = SegmentLoader(store, config.data)
    moments, n_tokens = _Moments(store.sequence_length, config.sae.d_model), 0
    for batch in loader:
        moments.add(batch.x.double().numpy(), batch.lengths, batch.starts)
        n_tokens += len(batch.x)
        if n_tokens >= min(FIT_TOKENS, loader.n_tokens):
            break
    mean, covariance, difference = moments.around_means()
    values, vectors = np.linalg.eigh(covariance)
    keep = values > NULL_VARIANCE * max(values.mean(), 0.0)
    if keep.sum() < chosen.n:
        raise ConfigError(
            f"linear.n={chosen.n}: {store.location} varies in {keep.sum()} directions of {len(values)}. Lower it."
        )
    values, vectors = values[keep], vectors[:, keep]
    if chosen.kind == "pca":
        W = vectors[:, ::-1][:, : chosen.n]
        R = W.T
    else:
        white = vectors / np.sqrt(values)
        _, slowest = np.linalg.eigh(white.T @ difference @ white)
        W = white @ slowest[:, : chosen.n]
        R = W.T @ covariance
    return LinearPart(*(torch.from_numpy(np.ascontiguousarray(one)).float() for one in (mean, W, R)))
