"""Settings of a planted store: how many features of which kind, how often, how long, how strong."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.base.settings import with_settings

MAX_DURATION = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedConfig:
    """All that determines a planted store's bytes.

    x = b + sum_i a_i d_i + noise. The first features are Zipf-frequent, the first of these parents and children of a
    hierarchy; the last `n_slow` are rare and slow. Each random draw behind a feature is held for a while, then drawn
    anew, so durations change nothing about a single token. With every duration 1, and no dense subspace, no ramp and
    no noise, this is SynthSAEBench's generator (SAELens, `sae_lens.synthetic`).
    """

    d_model: int = 64
    n_features: int = 256
    """Without the dense subspace and the ramp; above d_model they lie in superposition."""
    sequence_length: int = 128
    n_tokens: int = 500_000
    """Over both splits, at least; documents of sequence_length / 2 to 2 sequence_length tokens."""
    eval_every: int = 10
    """One document in so many is eval."""
    seed: int = 0
    rate_first: float = 0.2
    """Share of tokens at which the most frequent feature is on."""
    rate_last: float = 0.005
    zipf: float = 0.5
    """Rates between fall as rank^-zipf, rescaled to these two."""
    mean_first: float = 1.0
    """Amplitude of the most frequent feature where it is on: mean of a normal distribution, cut off at 0."""
    mean_last: float = 0.8
    amplitude_std: float = 0.1
    n_roots: int = 8
    """Trees of the hierarchy, of the most frequent features."""
    n_children: int = 4
    """Of each root, and of each child above the last level."""
    depth: int = 1
    """Levels of children: one is on only where its parent is, and at most one of siblings."""
    compensated: bool = True
    """Draw children more often, so that the hierarchy takes nothing from their rates (as far as that goes)."""
    correlation_rank: int = 8
    correlation_scale: float = 0.1
    n_slow: int = 32
    """Rare, slow features: the last ones."""
    slow_rate: float = 0.01
    slow_durations: tuple[float, ...] = (16.0,)
    """Mean tokens that a draw is held, taken in turn by the slow features."""
    slow_amplitudes: tuple[float, ...] = (0.7,)
    """Of each of these as many slow features, for every duration."""
    fast_duration: float = 1.0
    parent_duration: float = 16.0
    child_duration: float = 1.0
    factor_duration: float = 16.0
    """Of what correlated features share."""
    law: Literal["geometric", "fixed", "negative_binomial", "pareto"] = "geometric"
    """Of durations."""
    law_shape: float = 2.5
    """negative_binomial: number of failures. pareto: exponent, above 1."""
    n_dense: int = 4
    """Dimensions of the slow dense subspace: each an AR(1) process."""
    dense_amplitude: float = 0.5
    dense_memory: float = 0.95
    """Correlation of neighbouring tokens in it."""
    position_amplitude: float = 0.5
    """Of a ramp from -1 at a sequence's first position to 1 at its last."""
    emission: float = 1.0
    """Share of tokens at which a feature that is on shows."""
    noise: float = 0.05
    """Standard deviation in each dimension."""
    bias: float = 0.2
    """Norm of b."""

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            values = getattr(self, name)
            if values == ():
                raise ConfigError(f"{name}: give at least one number.")
            for value in values if isinstance(values, tuple) else (values,):
                _within(name, value, least, most)
        for name in ("n_roots", "n_children", "depth", "correlation_rank", "n_slow"):
            _within(name, getattr(self, name), 0, self.n_features)
        _within("n_dense", self.n_dense, 0, self.d_model - (self.position_amplitude > 0))
        for name in ("rate_first", "rate_last", "slow_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name):g}: a share of tokens, above 0 and below 1.")
        if self.law == "pareto" and self.law_shape <= 1:
            raise ConfigError(f"law_shape={self.law_shape:g}: of pareto it must be above 1, or durations have no mean.")


BOUNDS = {
    "d_model": (1, 1 << 16),
    "n_features": (1, 1 << 20),
    "n_tokens": (1, 1 << 40),
    "sequence_length": (4, 1 << 20),
    "eval_every": (2, 1 << 40),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(
        ("zipf", "amplitude_std", "correlation_scale", "noise", "bias", "mean_first", "mean_last"), (0, 1e4)
    ),
    **dict.fromkeys(("dense_amplitude", "position_amplitude", "slow_amplitudes"), (0, 1e4)),
    **dict.fromkeys(("fast_duration", "parent_duration", "child_duration", "factor_duration"), (1, MAX_DURATION)),
    "slow_durations": (1, MAX_DURATION),
    "law_shape": (1e-3, 1e3),
    "dense_memory": (0, 0.9999),
    "emission": (0, 1),
}
"""Least and most of each setting."""


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}={value:g}: must lie in {least:g}..{most:g}.")


SMALL = PlantedConfig()
LARGE = PlantedConfig(
    d_model=768,
    n_features=16_384,
    n_tokens=10_000_000,
    eval_every=50,
    rate_first=0.4,
    rate_last=5e-4,
    mean_first=5.0,
    mean_last=4.0,
    amplitude_std=0.5,
    n_roots=128,
    n_children=4,
    depth=3,
    correlation_rank=25,
    n_slow=1024,
    slow_rate=0.002,
    slow_amplitudes=(3.0,),
    n_dense=16,
    dense_amplitude=1.0,
    position_amplitude=1.0,
    noise=0.1,
    bias=1.0,
)
SIZES = {"small": SMALL, "large": LARGE}
"""large: the shape of SynthSAEBench-16k (features, width, rates, trees, correlation), with a sequence axis."""
STILL = (
    "slow_durations=1", "fast_duration=1", "parent_duration=1", "child_duration=1", "factor_duration=1", "n_dense=0",
    "position_amplitude=0",
)  # fmt: skip
"""Settings of the null: single tokens as they are, but no memory."""


def planted_config(size: str, settings: tuple[str, ...] = ()) -> PlantedConfig:
    """A size with settings as "key=value". Raises ConfigError for an unknown size or key, or a value out of range."""
    if size not in SIZES:
        raise ConfigError(unknown("size", size, SIZES))
    return with_settings(SIZES[size], settings)


def described(config: PlantedConfig) -> str:
    """What differs from the small size, as "key=value" in one line."""
    values = dataclasses.asdict(config)
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items() if value != getattr(SMALL, key))


def _text(value: object) -> str:
    return ",".join(f"{one:g}" for one in value) if isinstance(value, tuple) else str(value)
