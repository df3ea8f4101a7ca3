"""The settings of one training run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from tcsae.shared.errors import ConfigError
from tcsae.shared.sae import SaeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What a batch is. Runs that agree on this share one pass over the store."""

    hook: str | None = None
    """None: the store's first hook."""
    n_segments: int = 256
    """Segments in a batch."""
    segment_length: int = 16
    """Consecutive positions of one sequence; shorter segments come from more documents."""
    skip_first: int = 1
    """First positions of each sequence that are left out: their norms are outliers in many models."""
    buffer_sequences: int = 2048
    """Segments are shuffled within blocks of this many sequences, from chunks in random order."""
    seed: int = 0
    """Order of the data."""

    def __post_init__(self) -> None:
        _at_least("data.n_segments", self.n_segments, 1)
        _at_least("data.segment_length", self.segment_length, 1)
        _at_least("data.skip_first", self.skip_first, 0)
        _at_least("data.buffer_sequences", self.buffer_sequences, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam, its schedule, and what happens to a gradient before it."""

    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 1000
    """Linear from 0; at most a twentieth of the run."""
    decay: Literal["linear", "cosine", "none"] = "linear"
    """linear: to 0 over the last fifth of the run. cosine: to 0 from the end of the warm-up on."""
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to."""

    def __post_init__(self) -> None:
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: must lie in 0..1, below 1.")

    def learning_rate(self, step: int, steps: int) -> float:
        """Rate of 0-based `step` in a run of `steps`."""
        warmup = min(self.warmup_steps, max(1, steps // 20))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        if self.decay == "linear":
            return self.lr * min(1.0, (steps - step) / max(1.0, steps / 5))
        return self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class TemporalConfig:
    """The temporal consistency loss over sliding windows (the paper's eq. 3)."""

    weight: float = 0.0
    """lambda_2; 0 leaves the term out."""
    window: int = 3

    def __post_init__(self) -> None:
        _at_least("temporal.window", self.window, 2)
        if not self.weight >= 0:
            raise ConfigError(f"temporal.weight={self.weight}: must be at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run: what is trained, on what, and how."""

    sae: SaeConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    steps: int = 1250
    """Optimiser steps."""
    l1: float = 0.0
    """lambda_1: weight of the mean over tokens of sum |f|."""
    init: Literal["transpose", "xavier"] = "transpose"
    """transpose: random unit decoder rows, encoder their transpose, b_dec the data's mean. xavier: Xavier-normal
    encoder and decoder, decoder rows then set to unit norm, zero biases."""
    init_seed: int = 0
    input_norm: Literal["unit", "none"] = "unit"
    """unit: train on x scaled to a mean square of 1 per dimension; folded back into the weights on save."""
    log_every: int = 25
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 0)
        _at_least("log_every", self.log_every, 1)
        if not self.l1 >= 0:
            raise ConfigError(f"l1={self.l1}: must be at least 0.")
        if self.temporal.weight and self.data.segment_length < self.temporal.window:
            raise ConfigError(
                f"data.segment_length={self.data.segment_length} holds no window of temporal.window="
                f"{self.temporal.window}. Raise the first or lower the second."
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value}: must be at least {least}.")
