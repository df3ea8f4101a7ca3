"""The settings of one training run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SaeConfig

MAX_SEED = 2**63 - 1
"""What torch's generators take."""
MAX_STEPS = 10**12
MAX_BATCH_TOKENS = 1 << 26
"""Tokens of a batch; their activations alone take 128 GiB at width 512."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What a batch is. Runs that agree on this share one pass over the store."""

    hook: str | None = None
    """None: the store's first hook."""
    n_segments: int = 128
    """Segments in a batch."""
    segment_length: int = 16
    """Consecutive positions of one sequence; shorter segments come from more documents."""
    skip_first: int = 1
    """First positions of each sequence that are left out: their norms are outliers in many models."""
    min_sequence_length: int = 1
    """Shorter sequences are left out; sequence_length keeps only those that were cut off, not ended."""
    max_norm: float | None = None
    """Leave out segments that hold a norm above this many times the median; None keeps all."""
    buffer_sequences: int = 2048
    """Segments are shuffled within blocks of this many sequences, from chunks in random order."""
    seed: int = 0
    """Order of the data."""

    def __post_init__(self) -> None:
        _at_least("data.n_segments", self.n_segments, 1)
        _at_least("data.segment_length", self.segment_length, 1)
        _at_least("data.skip_first", self.skip_first, 0)
        _at_least("data.min_sequence_length", self.min_sequence_length, 1)
        _at_least("data.buffer_sequences", self.buffer_sequences, 1)
        if self.n_segments * self.segment_length > MAX_BATCH_TOKENS:
            raise ConfigError(
                f"data.n_segments={self.n_segments} times data.segment_length={self.segment_length} tokens a batch: at "
                f"most {MAX_BATCH_TOKENS:,}, whose activations take {MAX_BATCH_TOKENS * 2048 >> 30} GiB at width 512. "
                "Lower either."
            )
        _at_least("data.seed", self.seed, 0)
        _at_most("data.seed", self.seed, MAX_SEED)
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"data.max_norm={self.max_norm}: must be above 0, or none.")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam, its schedule, and what happens to a gradient before it."""

    lr: float = 4e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 1000
    """Linear from 0; at most a twentieth of the run."""
    decay: Literal["linear", "cosine", "none"] = "linear"
    """linear: to 0 over the last fifth of the run. cosine: to 0 from the end of the warm-up on."""
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    unit_decoder: bool = True
    """Keep decoder rows at norm 1, and take the gradient along them away."""

    def __post_init__(self) -> None:
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        _positive("optimizer.lr", self.lr)
        _positive("optimizer.clip_norm", self.clip_norm)
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
    """The temporal consistency term over sliding windows, and the position penalty."""

    weight: float = 0.0
    """lambda_2; 0 leaves the term out."""
    kind: str = "difference"
    """A name in `tcsae.train.losses.TEMPORAL`. difference: eq. 3. relative: the same over the pairs' squared norms, so
    that shrinking the code gains nothing. gated: eq. 3 with each pair weighted by relu(cos(x_t, x_t+1)). contrastive:
    InfoNCE against other documents."""
    scope: Literal["all", "first"] = "all"
    """Latents it acts on: all, or the first group of sae.groups."""
    window: int = 3
    pairs: Literal["adjacent", "all"] = "adjacent"
    """Pairs within a window."""
    order: Literal["text", "segment", "batch"] = "text"
    """Order of the positions that the term sees, and an SAE that reads neighbours (crosscoder, TFA). As controls:
    shuffled within each segment (its pairs are of one document, but not adjacent), or over the batch (of any
    documents)."""
    warmup: float = 0.0
    """Share of the run over which the weight rises from 0."""
    budget: float = 0.0
    """If above 0, the weight follows: the term's gradient at the code gets this share of the reconstruction's norm."""
    temperature: float = 0.1
    """Of the contrastive kind."""
    position_penalty: float = 0.0
    """Weight of the code's variance between positions (running means), over the same scope."""

    def __post_init__(self) -> None:
        _at_least("temporal.window", self.window, 2)
        _positive("temporal.temperature", self.temperature)
        for name in ("weight", "budget", "position_penalty"):
            _at_least(f"temporal.{name}", getattr(self, name), 0)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"temporal.warmup={self.warmup}: must lie in 0..1, a share of the run.")
        if self.kind == "contrastive" and self.pairs == "all":
            raise ConfigError("temporal.pairs='all' with temporal.kind='contrastive': it takes adjacent pairs only.")

    @property
    def active(self) -> bool:
        return self.weight > 0 or self.budget > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityConfig:
    """What keeps a code sparse where no top-k does."""

    l1: float = 0.0
    """lambda_1: weight of the mean over tokens of sum |f|."""
    l0: float = 0.0
    """Weight of (L0 / sae.k - 1)^2 (jumprelu)."""
    bandwidth: float = 0.05
    """Width of the kernel through which a jumprelu's thresholds learn, in units of the pre-activations."""

    def __post_init__(self) -> None:
        _at_least("sparsity.l1", self.l1, 0)
        _at_least("sparsity.l0", self.l0, 0)
        _positive("sparsity.bandwidth", self.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadConfig:
    """Dead latents, and AuxK, which lets them explain what the live ones missed (Gao et al. 2024, appendix A.2)."""

    aux_weight: float = 1 / 32
    """0 leaves AuxK out."""
    aux_k: int = 256
    """Dead latents that answer for a token."""
    after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for so many tokens, or for `after_share` of the run's if that is less."""
    after_share: float = 0.1

    def __post_init__(self) -> None:
        _at_least("dead.aux_weight", self.aux_weight, 0)
        _at_least("dead.aux_k", self.aux_k, 1)
        _at_least("dead.after_tokens", self.after_tokens, 1)
        if not 0 < self.after_share <= 1:
            raise ConfigError(f"dead.after_share={self.after_share}: must lie in 0..1, above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What counts as instability, and what follows; checkpoints."""

    explode: float = 100.0
    """A loss above so many times its running mean is an instability, as is one that is not finite."""
    action: Literal["end", "restore"] = "end"
    """end: the run ends where it is. restore: weights and optimiser of the last checkpoint come back, and training goes
    on with the next batch; the third time, the run ends."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints; 0 keeps none, so that an interrupted run starts anew."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is a checkpoint in any case, at the latest."""
    keep: int = 1
    """Checkpoints that stay on disk until the run is finished."""

    def __post_init__(self) -> None:
        _at_least("guard.checkpoint_steps", self.checkpoint_steps, 0)
        _at_least("guard.keep", self.keep, 1)
        _positive("guard.checkpoint_minutes", self.checkpoint_minutes)
        if not self.explode > 1:
            raise ConfigError(f"guard.explode={self.explode}: must be above 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """The SAE before its first step."""

    weights: Literal["transpose", "xavier", "zero"] = "transpose"
    """transpose: random unit decoder rows, the encoder their transpose. xavier: Xavier-normal encoder and decoder,
    decoder rows then set to norm 1. zero: nothing but zeros."""
    b_dec: Literal["mean", "median", "zero"] = "mean"
    """Of a sample of the data; median is the geometric one."""
    input_scale: Literal["unit", "none"] = "unit"
    """unit: train on x scaled to a mean square of 1 per dimension; folded back into the weights on save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run: what is trained, on what, and how."""

    sae: SaeConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    dead: DeadConfig = field(default_factory=DeadConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init: InitConfig = field(default_factory=InitConfig)
    init_seed: int = 0
    """Of the initial weights and of whatever a run draws for itself."""
    group_weights: tuple[float, ...] = (1.0,)
    """Weight of each prefix's reconstruction, one for each of sae.groups."""
    steps: int = 2500
    """Optimiser steps."""
    log_every: int = 25
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 0)
        _at_most("steps", self.steps, MAX_STEPS)
        _at_least("log_every", self.log_every, 1)
        _at_least("init_seed", self.init_seed, 0)
        _at_most("init_seed", self.init_seed, MAX_SEED)
        if len(self.group_weights) != len(self.sae.groups) or not min(self.group_weights) >= 0:
            raise ConfigError(
                f"group_weights={self.group_weights}: one weight, at least 0, for each of sae.groups={self.sae.groups}."
            )
        if self.temporal.active and self.data.segment_length < self.temporal.window:
            raise ConfigError(
                f"data.segment_length={self.data.segment_length} holds no window of temporal.window="
                f"{self.temporal.window}. Raise the first or lower the second."
            )
        if self.data.segment_length < self.sae.window:
            raise ConfigError(
                f"data.segment_length={self.data.segment_length} holds no window of sae.window={self.sae.window}. "
                "Raise the first or lower the second."
            )
        self._check_predictor()
        if self.sae.layer_norm != "none" and self.init.input_scale != "none":
            raise ConfigError(
                f"sae.layer_norm={self.sae.layer_norm!r} undoes init.input_scale={self.init.input_scale!r}. "
                "Set init.input_scale=none."
            )
        if self.init.weights == "zero" and self.steps and self.optimizer.unit_decoder:
            raise ConfigError("init.weights='zero' has no decoder row to norm. Set optimizer.unit_decoder=false.")
        if self.sparsity.l0 and KINDS[self.sae.activation].threshold != "learned":
            raise ConfigError(
                f"sparsity.l0={self.sparsity.l0} acts through learned thresholds (jumprelu); sae.activation is "
                f"{self.sae.activation!r}. Set sparsity.l0=0."
            )

    def _check_predictor(self) -> None:
        """Raises ConfigError for what a tied dictionary of free norms, whose rows are its encoder, cannot have."""
        if self.sae.predictor == "none":
            return
        needed = {
            "optimizer.unit_decoder": (self.optimizer.unit_decoder, False),
            "dead.aux_weight": (self.dead.aux_weight, 0),
            "init.weights": (self.init.weights, "transpose"),
        }
        for name, (value, allowed) in needed.items():
            if value != allowed:
                raise ConfigError(
                    f"{name}={value} with sae.predictor={self.sae.predictor!r}: set {name}={str(allowed).lower()}, as "
                    "the decoder's rows, of any norm, are the encoder as well."
                )


def _at_least(name: str, value: float, least: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number.")
    if not value >= least:
        raise ConfigError(f"{name}={value}: must be at least {least}.")


def _at_most(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise ConfigError(f"{name}={value}: must be at most {most}.")


def _positive(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number.")
    if not value > 0:
        raise ConfigError(f"{name}={value}: must be above 0.")
