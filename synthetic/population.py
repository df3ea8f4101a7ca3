"""The features of a planted store: rates, amplitudes, durations, hierarchy, correlation, directions. Drawn once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import ndtri

from tcsae.evaluate.planted.truth import CHILD, FAST, PARENT, POSITION, SLOW_DENSE, SLOW_RARE
from tcsae.synthetic.planting import PlantedConfig

FRAME_STEPS = 5
"""The squared overlap is then within 1e-6 of the least."""
MOST_SHARED = 0.95
"""Share of a feature's latent variance that correlation takes up, at most."""


@dataclass(frozen=True, eq=False)
class Population:
    """n features, then two for each dimension of the dense subspace and for the ramp: positive and negative side."""

    config: PlantedConfig
    kinds: list[str]
    """Of every feature, the sides included: a name in `truth.CLASSES`."""
    rates: Float[ndarray, " n"]
    """What was asked for."""
    drawn_rates: Float[ndarray, " n"]
    """Share of tokens at which a feature's draw is high enough; the hierarchy then takes children away."""
    means: Float[ndarray, " n"]
    durations: Float[ndarray, " n_all"]
    parents: Int[ndarray, " n_all"]
    """-1: none."""
    levels: list[Int[ndarray, "_ n_siblings"]]
    """Children of each level's parents; -1 beyond the last child."""
    loadings: Float[ndarray, "n rank"]
    directions: Float[ndarray, "n_all d_model"]
    bias: Float[ndarray, " d_model"]

    @cached_property
    def thresholds(self) -> Float[ndarray, " n"]:
        """A feature is on where its draw is above."""
        return ndtri(1 - self.drawn_rates).astype(np.float32)

    @cached_property
    def own(self) -> Float[ndarray, " n"]:
        """Weight of a feature's own draw beside what it shares."""
        return np.sqrt(1 - np.square(self.loadings).sum(1)).astype(np.float32)


def draw_population(config: PlantedConfig) -> Population:
    """The same features for the same config. Everything but the directions and loadings is without chance."""
    rng = np.random.default_rng([config.seed, 0])
    n, n_zipf = config.n_features, config.n_features - config.n_slow
    parents, levels = _hierarchy(config, n_zipf)
    rates = np.append(_zipf_rates(config, n_zipf), np.full(config.n_slow, config.slow_rate))
    is_parent = np.isin(np.arange(n), parents[parents >= 0])
    kinds = np.where(is_parent, PARENT, np.where(parents >= 0, CHILD, FAST)).astype(object)
    kinds[n_zipf:] = SLOW_RARE
    duration_of = {PARENT: config.parent_duration, CHILD: config.child_duration, FAST: config.fast_duration}
    durations = np.array([duration_of.get(kind, 0.0) for kind in kinds])
    turn = np.arange(config.n_slow)
    durations[n_zipf:] = np.array(config.slow_durations)[turn % len(config.slow_durations)]
    means = np.linspace(config.mean_first, config.mean_last, max(1, n_zipf))[:n_zipf]
    amplitudes = np.array(config.slow_amplitudes)[turn // len(config.slow_durations) % len(config.slow_amplitudes)]
    n_sides = 2 * (config.n_dense + (config.position_amplitude > 0))
    sides = [SLOW_DENSE] * (2 * config.n_dense) + [POSITION] * (n_sides - 2 * config.n_dense)
    loadings = rng.standard_normal((n, config.correlation_rank)) * config.correlation_scale
    shared = np.square(loadings).sum(1, keepdims=True)
    loadings *= np.sqrt(np.minimum(1, MOST_SHARED / np.maximum(shared, 1e-12)))
    bias = rng.standard_normal(config.d_model)
    memory = 1 / max(1e-6, 1 - config.dense_memory)  # as many tokens as a hold of this autocorrelation at lag 1
    return Population(
        config,
        [*kinds.tolist(), *sides],
        rates,
        _drawn_rates(rates, parents, levels) if config.compensated else rates,
        np.append(means, amplitudes),
        np.append(durations, [memory if kind == SLOW_DENSE else 1.0 for kind in sides]),
        np.append(parents, np.full(n_sides, -1)),
        levels,
        loadings,
        _directions(rng, config, n_sides // 2),
        bias * (config.bias / np.linalg.norm(bias)),
    )


def _zipf_rates(config: PlantedConfig, n: int) -> Float[ndarray, " n"]:
    """Falling as rank^-zipf, rescaled to rate_first ... rate_last, as SynthSAEBench does."""
    powers = np.arange(1, n + 1, dtype=np.float64) ** -config.zipf
    if n == 0 or powers[0] == powers[-1]:
        return np.full(n, config.rate_first)
    return config.rate_last + (config.rate_first - config.rate_last) * (powers - powers[-1]) / (powers[0] - powers[-1])


def _hierarchy(config: PlantedConfig, n: int) -> tuple[Int[ndarray, " n_features"], list[ndarray]]:
    """Parents and levels, breadth first from the most frequent feature on, until features run out."""
    parents = np.full(config.n_features, -1)
    above, after, levels = np.arange(min(config.n_roots, n)), min(config.n_roots, n), []
    for _ in range(config.depth if config.n_children else 0):
        places = after + np.arange(len(above) * config.n_children).reshape(len(above), -1)
        siblings = np.where(places < n, places, -1)
        siblings = siblings[siblings[:, 0] >= 0]
        if not len(siblings):
            break
        for parent, row in zip(above, siblings, strict=False):
            parents[row[row >= 0]] = parent
        above = siblings[siblings >= 0]
        after += len(above)
        levels.append(siblings)
    return parents, levels


def _drawn_rates(rates: ndarray, parents: ndarray, levels: list[ndarray]) -> Float[ndarray, " n"]:
    """SynthSAEBench's compensation: over the parent's rate, times 1 + the siblings expected beside; at most 1."""
    drawn = rates.copy()
    for siblings in levels:
        for row in siblings:
            row = row[row >= 0]
            above = rates[parents[row[0]]]
            beside = (rates[row].sum() - rates[row]) / above if len(row) > 1 else 0.0
            drawn[row] = rates[row] / above * (1 + beside)
    return np.minimum(drawn, 1 - 1e-9)


def _directions(rng: np.random.Generator, config: PlantedConfig, n_signed: int) -> Float[ndarray, "n_all d_model"]:
    """Unit vectors of the features with the least squared overlap there is, then both sides of signed dimensions.

    A unit-norm tight frame, by alternating projections (Tropp et al. 2005); orthogonal where there is room for it.
    """
    n, d = config.n_features, config.d_model
    rows = rng.standard_normal((n, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for _ in range(FRAME_STEPS if n > d else 1):
        gram = rows.T @ rows if n > d else rows @ rows.T
        values, vectors = np.linalg.eigh(gram)
        root = (vectors / np.sqrt(np.maximum(values, 1e-12))) @ vectors.T
        rows = rows @ root if n > d else root @ rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    signed = np.linalg.qr(rng.standard_normal((d, n_signed)))[0].T if n_signed else np.zeros((0, d))
    return np.concatenate([rows, np.stack([signed, -signed], 1).reshape(-1, d)]).astype(np.float32)
