"""Documents of a planted store: which feature is on where, how strongly, and the activations that they sum to."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.signal import lfilter
from scipy.sparse import csr_array

from tcsae.synthetic.population import Population
from tcsae.synthetic.streams import held, redraws


class Sampled(NamedTuple):
    """One document of n tokens."""

    x: Float[ndarray, "n d_model"]
    tokens: Int[ndarray, " n"]
    """1 + the strongest feature, 0 where none is on: for people who look."""
    features: csr_array
    """[n, n_all] amplitudes; a stored zero: the feature is on but does not show."""


def sample_document(population: Population, number: int, n_tokens: int) -> Sampled:
    """Document `number`, the same whenever it is asked for: each has random numbers of its own."""
    config, n = population.config, population.config.n_features
    rng = np.random.default_rng([config.seed, 2, number])
    token, feature, values = _features(population, rng, n_tokens)
    if config.emission < 1:
        values *= rng.random(len(values), np.float32) < config.emission
    best = np.zeros(n_tokens, np.float32)
    np.maximum.at(best, token, values)
    leads = np.flatnonzero((values == best[token]) & (values > 0))[::-1]
    strongest = np.zeros(n_tokens, np.int64)
    strongest[token[leads]] = feature[leads] + 1
    signed = _signed(population, rng, n_tokens)
    sides = np.stack([np.maximum(signed, 0), np.maximum(-signed, 0)], 2).reshape(n_tokens, -1).astype(np.float32)
    at, side = np.nonzero(sides)
    places = np.concatenate([token, at]), np.concatenate([feature, n + side])
    shape = n_tokens, len(population.directions)
    features = csr_array((np.concatenate([values, sides[at, side]]), places), shape=shape)
    noise = rng.standard_normal((n_tokens, config.d_model), np.float32) * np.float32(config.noise)
    x = features @ population.directions + population.bias.astype(np.float32) + noise
    return Sampled(x, strongest, features)


def _features(
    population: Population, rng: np.random.Generator, n_tokens: int
) -> tuple[Int[ndarray, " m"], Int[ndarray, " m"], Float[ndarray, " m"]]:
    """Token, feature and amplitude wherever a feature is on, in that order."""
    config, n = population.config, population.config.n_features
    law = config.law, config.law_shape
    draws = np.empty((n_tokens, n), np.float32)
    kept: list[tuple[ndarray, ndarray]] = []
    durations = population.durations[:n]
    for duration in np.unique(durations):
        these = np.flatnonzero(durations == duration)
        fresh = rng.standard_normal((n_tokens, len(these)), np.float32)
        if duration > 1:
            drawn = redraws(rng, n_tokens, len(these), law[0], duration, law[1])
            fresh = held(fresh, drawn)
            kept.append((these, held(rng.standard_normal((n_tokens, len(these)), np.float32), drawn)))
        draws[:, these] = fresh
    if config.correlation_rank:
        shared = rng.standard_normal((n_tokens, config.correlation_rank), np.float32)
        drawn = redraws(rng, n_tokens, config.correlation_rank, law[0], config.factor_duration, law[1])
        draws *= population.own
        draws += held(shared, drawn) @ population.loadings.T.astype(np.float32)
    on = draws > population.thresholds
    for siblings in population.levels:
        _gate(population, rng, on, siblings)
    token, feature = np.nonzero(on)
    deviations = rng.standard_normal(len(token), np.float32)
    slot = np.full(n, -1)
    for these, values in kept:  # an amplitude stays as long as the draw that it came with
        slot[:] = -1
        slot[these] = np.arange(len(these))
        mine = np.flatnonzero(slot[feature] >= 0)
        deviations[mine] = values[token[mine], slot[feature[mine]]]
    amplitudes = np.maximum(population.means[feature] + config.amplitude_std * deviations, 0)
    return token, feature, amplitudes.astype(np.float32)


def _gate(
    population: Population, rng: np.random.Generator, on: Bool[ndarray, "n_tokens n"], siblings: Int[ndarray, "m s"]
) -> None:
    """Turn children off where their parent is, then all siblings but one, whose tie-break is a stream, too."""
    config = population.config
    parents = population.parents[siblings[:, 0]]
    alive = on[:, siblings] & on[:, parents][:, :, None] & (siblings >= 0)
    breaks = rng.random((len(on), siblings.size), np.float32)
    drawn = redraws(rng, len(on), siblings.size, config.law, config.child_duration, config.law_shape)
    breaks = held(breaks, drawn).reshape(alive.shape)
    scores = np.where(alive, breaks, -1)
    alive &= scores == scores.max(2, keepdims=True)
    on[:, siblings[siblings >= 0]] = alive[:, siblings >= 0]


def _signed(population: Population, rng: np.random.Generator, n_tokens: int) -> Float[ndarray, "n_tokens n_signed"]:
    """Coordinates along the dense subspace, and the ramp over each sequence's positions."""
    config = population.config
    parts = []
    if config.n_dense:
        memory = config.dense_memory
        start = rng.standard_normal(config.n_dense)
        steps = rng.standard_normal((n_tokens, config.n_dense))
        state, _ = lfilter([np.sqrt(1 - memory**2)], [1, -memory], steps, axis=0, zi=(memory * start)[None])
        parts.append(config.dense_amplitude * state)
    if config.position_amplitude:
        position = np.arange(n_tokens) % config.sequence_length
        parts.append(config.position_amplitude * (2 * position / (config.sequence_length - 1) - 1)[:, None])
    return np.concatenate([np.zeros((n_tokens, 0)), *parts], 1)
