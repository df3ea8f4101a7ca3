"""The settings of one training run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import check_least, check_most, check_positive
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.store.counted import SPECIAL, CountingRules
from tcsae.train.settings.temporal_settings import CONTRASTIVE, SINGLE_TOKENS, TemporalConfig

FOLDABLE = ("batchtopk", "jumprelu", "relu")
"""Activations that a linear part folds into: a latent is on by its own value alone, once trained."""
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
    exclude_tokens: tuple[str, ...] = ()
    """Token ids that are left out wherever they stand, or special: all special tokens of the store's tokenizer.
    Segments are cut there, so that no window spans one."""
    positions: tuple[str, ...] = ()
    """Roles of a conversation whose tokens are trained on, as harvest --roles marked them; empty: everybody's. Segments
    are cut at the others."""
    max_norm: float | None = None
    """Leave out tokens whose norm is above this many times the median (attention sinks), and cut segments there; None
    keeps all."""
    document_segments: int = 1
    """Segments of one document that come one after the other, at most, drawn from all over it: for terms that compare
    far parts of a document."""
    buffer_sequences: int = 2048
    """Segments are shuffled within blocks of this many sequences, from chunks in random order."""
    seed: int = 0
    """Order of the data."""

    def __post_init__(self) -> None:
        check_least("data.n_segments", self.n_segments, 1)
        check_least("data.segment_length", self.segment_length, 1)
        check_least("data.skip_first", self.skip_first, 0)
        check_least("data.min_sequence_length", self.min_sequence_length, 1)
        check_least("data.document_segments", self.document_segments, 1)
        check_least("data.buffer_sequences", self.buffer_sequences, 1)
        if self.n_segments * self.segment_length > MAX_BATCH_TOKENS:
            raise ConfigError(
                f"data.n_segments={self.n_segments} times data.segment_length={self.segment_length} tokens a batch: at "
                f"most {MAX_BATCH_TOKENS:,}, whose activations take {MAX_BATCH_TOKENS * 2048 >> 30} GiB at width 512. "
                "Lower either."
            )
        check_least("data.seed", self.seed, 0)
        check_most("data.seed", self.seed, MAX_SEED)
        for name in self.exclude_tokens:
            if name != SPECIAL and not name.isdecimal():
                given = ",".join(self.exclude_tokens)
                raise ConfigError(f"data.exclude_tokens={given!r}: give token ids with commas between, or {SPECIAL}.")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"data.max_norm={self.max_norm}: must be above 0, or none.")

    @property
    def rules(self) -> CountingRules:
        """Which positions are trained on."""
        return CountingRules(
            skip_first=self.skip_first,
            exclude_tokens=self.exclude_tokens,
            positions=self.positions,
            max_norm=self.max_norm,
            hook=self.hook,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Adam, its schedule, and what happens to a gradient before it."""

    lr: float = 4e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 1000
    """Linear from 0; at most `warmup_share` of the run."""
    warmup_share: float = 0.05
    """1: the warm-up takes its steps, whatever the run's length."""
    decay: Literal["linear", "cosine", "none"] = "linear"
    """linear: to 0 over the last fifth of the run. cosine: to 0 from the end of the warm-up on."""
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    unit_decoder: bool = True
    """Keep decoder rows at norm 1, and take the gradient along them away."""

    def __post_init__(self) -> None:
        check_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(f"optimizer.warmup_share={self.warmup_share}: must lie in 0..1, a share of the run.")
        check_positive("optimizer.lr", self.lr)
        check_positive("optimizer.clip_norm", self.clip_norm)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: must lie in 0..1, below 1.")

    def learning_rate(self, step: int, steps: int) -> float:
        """Rate of 0-based `step` in a run of `steps`."""
        warmup = min(self.warmup_steps, max(1, int(self.warmup_share * steps)))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        if self.decay == "linear":
            return self.lr * min(1.0, (steps - step) / max(1.0, steps / 5))
        return self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityConfig:
    """What keeps a code sparse where no top-k does."""

    l1: float = 0.0
    """lambda_1: weight of the mean over tokens of sum |f|."""
    l0: float = 0.0
    """Weight of (L0 / sae.k - 1)^2 (jumprelu)."""
    bandwidth: float = 0.05
    """Width of the kernel through which a jumprelu's thresholds learn, in units of the pre-activations."""
    threshold: Literal["sample", "average"] = "sample"
    """A batchtopk's at the end of training. sample: that gives sae.k active latents on a sample. average: running mean
    of the smallest activation kept in a batch (T-SAE)."""

    def __post_init__(self) -> None:
        check_least("sparsity.l1", self.l1, 0)
        check_least("sparsity.l0", self.l0, 0)
        check_positive("sparsity.bandwidth", self.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadConfig:
    """Dead latents, and AuxK, which lets them explain what the live ones missed (Gao et al. 2024, appendix A.2)."""

    aux_weight: float = 1 / 32
    """0 leaves AuxK out."""
    aux_k: int = 256
    """Dead latents that answer for a token; 0: half as many as sae.d_model."""
    aux_relative: bool = False
    """Divide the term by the residual's variance, so that its weight does not depend on the activations' scale."""
    after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for so many tokens, or for `after_share` of the run's if that is less."""
    after_share: float = 0.1

    def __post_init__(self) -> None:
        check_least("dead.aux_weight", self.aux_weight, 0)
        check_least("dead.aux_k", self.aux_k, 0)
        check_least("dead.after_tokens", self.after_tokens, 1)
        if not 0 < self.after_share <= 1:
            raise ConfigError(f"dead.after_share={self.after_share}: must lie in 0..1, above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Directions that are taken as they are, beside the SAE of what they leave; a baseline for temporal terms."""

    kind: Literal["none", "sfa", "pca"] = "none"
    """sfa: the slowest ones (slow feature analysis). pca: the widest ones."""
    n: int = 4
    """How many. Each is two latents of the finished SAE, of which one is on: L0 is so much more than sae.k."""

    def __post_init__(self) -> None:
        check_least("linear.n", self.n, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What counts as instability, and what follows; checkpoints."""

    explode: float = 100.0
    """A loss above so many times its running mean is an instability, as is one that is not finite."""
    correlation: float = 0.0
    """If above 0, so is a fall of the code's adjacent correlation by more than this below its running mean, as read
    with the lines of metrics.jsonl; weights have moved by then."""
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
        check_least("guard.checkpoint_steps", self.checkpoint_steps, 0)
        check_least("guard.keep", self.keep, 1)
        check_positive("guard.checkpoint_minutes", self.checkpoint_minutes)
        check_least("guard.correlation", self.correlation, 0)
        if not self.explode > 1:
            raise ConfigError(f"guard.explode={self.explode}: must be above 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """The SAE before its first step."""

    weights: Literal["transpose", "xavier", "uniform", "zero"] = "transpose"
    """transpose: random unit decoder rows, the encoder their transpose. xavier: Xavier-normal encoder and decoder,
    decoder rows then set to norm 1. uniform: as torch.nn.Linear draws its weights, decoder rows then set to norm 1.
    zero: nothing but zeros."""
    b_dec: Literal["mean", "median", "zero"] = "mean"
    """Of a sample of the data; median is the geometric one."""
    input_scale: Literal["unit", "none"] = "unit"
    """unit: train on x scaled to a mean square of 1 per dimension; folded back into the weights on save."""
    decay: float = 0.1
    """Share of its state that every latent of a persistent SAE keeps at first (after 500 steps on the embedded model
    .1, .5 and .9 gave an explained variance of .781, .773 and .652)."""

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ConfigError(f"init.decay={self.decay}: must lie between 0 and 1.")


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
    linear: LinearConfig = field(default_factory=LinearConfig)
    init_seed: int = 0
    """Of the initial weights and of whatever a run draws for itself."""
    group_weights: tuple[float, ...] = (1.0,)
    """Weight of each prefix's reconstruction, one for each of sae.groups."""
    steps: int = 2500
    """Optimiser steps."""
    log_every: int = 25
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_least("steps", self.steps, 0)
        check_most("steps", self.steps, MAX_STEPS)
        check_least("log_every", self.log_every, 1)
        check_least("init_seed", self.init_seed, 0)
        check_most("init_seed", self.init_seed, MAX_SEED)
        if len(self.group_weights) != len(self.sae.groups) or not min(self.group_weights) >= 0:
            raise ConfigError(
                f"group_weights={self.group_weights}: one weight, at least 0, for each of sae.groups={self.sae.groups}."
            )
        if self.data.segment_length < self.sae.window:
            raise ConfigError(
                f"data.segment_length={self.data.segment_length} holds no window of sae.window={self.sae.window}. "
                "Raise the first or lower the second."
            )
        self._check_segments()
        self._check_predictor()
        if self.sae.layer_norm != "none" and self.init.input_scale != "none":
            raise ConfigError(
                f"sae.layer_norm={self.sae.layer_norm!r} undoes init.input_scale={self.init.input_scale!r}. "
                "Set init.input_scale=none."
            )
        if self.init.weights == "zero" and self.steps and self.optimizer.unit_decoder:
            raise ConfigError("init.weights='zero' has no decoder row to norm. Set optimizer.unit_decoder=false.")
        self._check_linear()
        if self.sparsity.l0 and KINDS[self.sae.activation].threshold != "learned":
            raise ConfigError(
                f"sparsity.l0={self.sparsity.l0} acts through learned thresholds (jumprelu); sae.activation is "
                f"{self.sae.activation!r}. Set sparsity.l0=0."
            )

    def _check_linear(self) -> None:
        if self.linear.kind == "none":
            return
        what = f"linear.kind={self.linear.kind!r}"
        if self.sae.activation not in FOLDABLE:
            raise ConfigError(
                f"{what} folds into an SAE whose latents do not compete: sae.activation={self.sae.activation!r} has no "
                f"such form. There is: {', '.join(FOLDABLE)}."
            )
        if self.sae.layer_norm != "none" or len(self.sae.groups) > 1 or self.sae.window > 1:
            raise ConfigError(
                f"{what} takes sae.layer_norm=none, one group and sae.window=1; they are {self.sae.layer_norm!r}, "
                f"sae.groups={self.sae.groups} and {self.sae.window}. Set linear.kind=none."
            )

    def _check_segments(self) -> None:
        temporal, length = self.temporal, self.data.segment_length
        alone = temporal.active and temporal.kind in SINGLE_TOKENS
        if alone and (self.sae.reads_neighbours or self.linear.kind != "none"):
            raise ConfigError(
                f"temporal.kind={temporal.kind!r} picks single tokens: it takes sae.window=1, sae.predictor=none and "
                f"linear.kind=none, and they are {self.sae.window}, {self.sae.predictor!r} and {self.linear.kind!r}."
            )
        if temporal.order == "document" and (self.sae.reads_neighbours or temporal.kind in SINGLE_TOKENS):
            raise ConfigError(
                "temporal.order='document' is for terms over adjacent tokens of a code that reads single ones: "
                f"temporal.kind={temporal.kind!r}, sae.window={self.sae.window} and sae.predictor="
                f"{self.sae.predictor!r} are not such. Set temporal.order=segment or batch."
            )
        self._check_places()
        if temporal.active and temporal.contrasts_documents and self.data.n_segments < 2:
            raise ConfigError(
                f"data.n_segments={self.data.n_segments}: temporal.kind={temporal.kind!r} tells pairs from those of "
                "other documents, and a batch of one segment has none. Set data.n_segments=2 or more."
            )
        if not temporal.active or length >= temporal.n_positions:
            return
        if temporal.kind not in CONTRASTIVE:
            raise ConfigError(
                f"temporal.kind={temporal.kind!r}: data.segment_length={length} holds no window of "
                f"temporal.window={temporal.window}. Raise the first or lower the second."
            )
        what = f"temporal.kind={temporal.kind!r}"
        if temporal.n_positions > 2:
            contrast = temporal.contrast
            what += f" at temporal.contrast.gap={contrast.gap}"
            what += f" and temporal.contrast.min_negatives={contrast.min_negatives}" * (contrast.min_negatives > 1)
        raise ConfigError(
            f"data.segment_length={length}: {what} takes segments of {temporal.n_positions} positions, and finds no "
            "pair to compare in shorter ones. Raise data.segment_length (whole sequences are best)."
        )

    def _check_places(self) -> None:
        """Raises ConfigError for pairs at the same position of codes that are of no position of the text."""
        temporal, sae = self.temporal, self.sae
        moved = temporal.order == "document" or (temporal.order != "text" and sae.reads_neighbours)
        if temporal.active and temporal.negatives == "position" and moved:
            raise ConfigError(
                f"temporal.contrast.negatives='position' with temporal.order={temporal.order!r}, sae.window="
                f"{sae.window} and sae.predictor={sae.predictor!r}: a token has no place of its own there. Set "
                "temporal.contrast.negatives=documents or temporal.order=text."
            )

    def _check_predictor(self) -> None:
        """Raises ConfigError for what a tied dictionary of free norms, whose rows are its encoder, cannot have."""
        if not self.sae.attends:
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
