"""Named settings: ours, and the paper's in two families.

`logged-run*` are what the paper's printed figures are: networks that took no optimiser step. `written-run*` are the
paper's equations and hyperparameters, trained: what each run adds to the one before is docs/faithfulness.md's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.module import SaeConfig
from tcsae.train.config import (
    DataConfig,
    DeadConfig,
    GuardConfig,
    InitConfig,
    LinearConfig,
    OptimizerConfig,
    SparsityConfig,
    TrainConfig,
)
from tcsae.train.settings.temporal_settings import ContrastConfig, TemporalConfig


@dataclass(frozen=True)
class Preset:
    """A name's settings, for activations of any width."""

    about: str
    make: Callable[[int], TrainConfig]


D_SAE, K = 4096, 32
TFA_D_SAE = 1024
PAPER_INIT = InitConfig(weights="xavier", b_dec="zero", input_scale="none")
PAPER_DATA = DataConfig(n_segments=32, segment_length=128)
WARMUP_STEPS, WRITTEN_STEPS = 1000, 3000
"""Of the paper's runs: the warm-up is the paper's, which does not say how long it trained."""
NO_CLIPPING = 1e9
CORRELATION_FALL = 0.5
"""Of the adjacent correlation, at which the paper's runs with a tracked correlation end."""
WHOLE = DataConfig(n_segments=16, segment_length=128)
"""As many tokens as by default, in segments long enough for pairs that are far apart."""


def _ours(activation: Any, sae: dict[str, Any] | None = None, **settings: Any) -> Callable[[int], TrainConfig]:
    def make(d_model: int) -> TrainConfig:
        shape = SaeConfig(**{"d_model": d_model, "d_sae": D_SAE, "activation": activation, "k": K} | (sae or {}))
        return TrainConfig(sae=shape, **settings)

    return make


def _contrast(
    kind: str, data: DataConfig | None = None, penalty: float = 0.0, **contrast: Any
) -> Callable[[int], TrainConfig]:
    """TopK with a contrastive term."""
    chosen = ContrastConfig(temperature=0.3, **contrast)
    temporal = TemporalConfig(kind=kind, weight=3.0, position_penalty=penalty, contrast=chosen)
    return _ours("topk", temporal=temporal, data=data or DataConfig())


def _t_sae(partner: Any, data: DataConfig, per_segment: int) -> Callable[[int], TrainConfig]:
    """As the published code trains it (tcsae.train.losses.t_sae)."""

    def make(d_model: int) -> TrainConfig:
        return TrainConfig(
            sae=SaeConfig(d_model=d_model, d_sae=D_SAE, activation="batchtopk", k=20, groups=(0.2, 0.8)),
            data=data,
            optimizer=OptimizerConfig(lr=3e-4, warmup_steps=1000, decay="none"),
            temporal=TemporalConfig(
                kind="t-sae",
                scope="first",
                weight=0.1,
                contrast=ContrastConfig(partner=partner, per_segment=per_segment),
            ),
            sparsity=SparsityConfig(threshold="average"),
            dead=DeadConfig(aux_k=0, aux_relative=True, after_share=1.0),
            init=InitConfig(b_dec="median", input_scale="none"),
            group_weights=(0.1, 0.4),  # the mean over two prefixes of .2 and .8 times their errors
        )

    return make


def _crosscoder(window: int) -> Callable[[int], TrainConfig]:
    """The window's code has `window` times the latents that a token's has: the same budget a token."""
    return _ours("topk", {"window": window, "k": window * K})


def _tfa(predictor: Any) -> Callable[[int], TrainConfig]:
    """The published rates (warm-up aside), on whole sequences, one attention layer of 4 heads."""

    def make(d_model: int) -> TrainConfig:
        # Attention has 4 d_sae^2 weights: 1024 latents, four times the width of the embedded model and more.
        return TrainConfig(
            sae=SaeConfig(d_model=d_model, d_sae=TFA_D_SAE, k=K, predictor=predictor),
            data=DataConfig(n_segments=16, segment_length=128),
            optimizer=OptimizerConfig(lr=1e-3, beta2=0.95, unit_decoder=False),
            dead=DeadConfig(aux_weight=0.0),
        )

    return make


def _linear(kind: Any, n: int = 4) -> Callable[[int], TrainConfig]:
    """BatchTopK beside linear directions, as many active scalars as the others."""

    def make(d_model: int) -> TrainConfig:
        sae = SaeConfig(d_model=d_model, d_sae=D_SAE, activation="batchtopk", k=K - n)
        return TrainConfig(sae=sae, linear=LinearConfig(kind=kind, n=n))

    return make


def _logged(
    activation: Any = "relu", layer_norm: Any = "none", weights: Any = "xavier"
) -> Callable[[int], TrainConfig]:
    def make(d_model: int) -> TrainConfig:
        return TrainConfig(
            sae=SaeConfig(d_model=d_model, d_sae=512, activation=activation, layer_norm=layer_norm),
            data=PAPER_DATA,
            # The logged code normed its decoder only after a step, and took none.
            optimizer=OptimizerConfig(lr=3e-4, decay="cosine", unit_decoder=False),
            init=replace(PAPER_INIT, weights=weights),
            steps=0,
        )

    return make


def _untrained(make: Callable[[int], TrainConfig]) -> Callable[[int], TrainConfig]:
    return lambda d_model: replace(make(d_model), steps=0)


def _written(
    lambda_2: float, decay: Any = "cosine", layer_norm: Any = "none", plain: bool = False, phase: float = 0.0
) -> Callable[[int], TrainConfig]:
    """`plain`: before Xavier and clipping. `phase`: share of the run in which the temporal term rises."""
    init, clip_norm = (replace(PAPER_INIT, weights="uniform"), NO_CLIPPING) if plain else (PAPER_INIT, 1.0)

    def make(d_model: int) -> TrainConfig:
        return TrainConfig(
            sae=SaeConfig(d_model=d_model, d_sae=512, activation="gelu", layer_norm=layer_norm),
            data=PAPER_DATA,
            # 1,000 steps as written, however short the run.
            optimizer=OptimizerConfig(
                lr=3e-4, warmup_steps=WARMUP_STEPS, warmup_share=1.0, decay=decay, clip_norm=clip_norm
            ),
            temporal=TemporalConfig(weight=lambda_2, window=3, warmup=phase),
            sparsity=SparsityConfig(l1=0.1),
            guard=GuardConfig(correlation=0.0 if plain else CORRELATION_FALL),
            init=init,
            steps=WRITTEN_STEPS,
        )

    return make


PRESETS = {
    "topk": Preset("TopK, 4096 latents, 32 active", _ours("topk")),
    "batchtopk": Preset("BatchTopK, 32 active on average", _ours("batchtopk")),
    "jumprelu": Preset(
        "JumpReLU, thresholds learned for about 32 active", _ours("jumprelu", sparsity=SparsityConfig(l0=30.0))
    ),
    "relu-l1": Preset("ReLU with an L1 penalty", _ours("relu", sparsity=SparsityConfig(l1=1.5))),
    "temporal-topk": Preset(
        "TopK whose adjacent codes are contrasted with other documents'",
        _contrast("contrastive"),
    ),
    "temporal-matryoshka": Preset(
        "T-SAE-like: matryoshka BatchTopK, the first fifth contrasted with other documents",
        _ours(
            "batchtopk",
            {"groups": (0.2, 0.8)},
            group_weights=(0.2, 0.8),
            temporal=TemporalConfig(kind="contrastive", scope="first", weight=1.0),
        ),
    ),
    "temporal-topk-penalised": Preset("temporal-topk with the position penalty", _contrast("contrastive", penalty=1.0)),
    "temporal-topk-centred": Preset(
        "temporal-topk on codes less their mean at each position", _contrast("contrastive", centred=True)
    ),
    "temporal-topk-positions": Preset(
        "temporal-topk against other documents' pairs at the same position",
        _contrast("contrastive", negatives="position"),
    ),
    "local-contrast": Preset(
        "TopK whose adjacent codes are contrasted with far ones of the same sequence, position penalty",
        _contrast("local", WHOLE, penalty=1.0),
    ),
    "local-contrast-batch": Preset(
        "local-contrast, against other documents as well", _contrast("local", WHOLE, penalty=1.0, negatives="batch")
    ),
    "direction": Preset(
        "TopK that tells the next token from the one before, by a bilinear score",
        _contrast("direction", WHOLE, penalty=1.0),
    ),
    "topic": Preset(
        "TopK whose codes of one document's far tokens are contrasted with those of documents of similar words",
        _contrast("topic", DataConfig(document_segments=4), penalty=1.0),
    ),
    "local-topic": Preset(
        "local contrast and topic, half of each",
        _contrast("local-topic", DataConfig(n_segments=32, segment_length=64, document_segments=2), penalty=1.0),
    ),
    "t-sae": Preset(
        "T-SAE (arXiv 2511.05541) as its code trains it, partners one token before",
        _t_sae("previous", DataConfig(n_segments=2048, segment_length=2), 1),
    ),
    "t-sae-past": Preset(
        "T-SAE with partners from anywhere before, eight pairs a sequence",
        _t_sae("past", DataConfig(n_segments=256, segment_length=128), 8),
    ),
    "slow-linear": Preset(
        "baseline: the 4 slowest linear directions (SFA) and BatchTopK on the rest, 32 active in all",
        _linear("sfa"),
    ),
    "wide-linear": Preset(
        "baseline: the 4 widest linear directions (PCA) and BatchTopK on the rest, 32 active in all", _linear("pca")
    ),
    "crosscoder-3": Preset("temporal crosscoder: a TopK code for 3 positions, 32 active a position", _crosscoder(3)),
    "crosscoder-5": Preset("the same for 5 positions", _crosscoder(5)),
    "untrained-crosscoder-3": Preset("baseline: crosscoder-3 at its first weights", _untrained(_crosscoder(3))),
    "tfa": Preset(
        "temporal feature analysis: attention over past codes and a TopK code of the rest", _tfa("attention")
    ),
    "tfa-past": Preset("the same, predicted from the past alone", _tfa("past")),
    "persistent": Preset(
        "persistent SAE: each latent keeps a learned share of its state from token to token, TopK adds to it",
        _ours("topk", {"predictor": "decay"}, data=WHOLE),
    ),
    "logged-run0": Preset("the paper's run 0 as logged: all weights zero, no step", _logged(weights="zero")),
    "logged-run2": Preset("its run 2 as logged: Xavier, ReLU, 512 latents, no step", _logged()),
    "logged-run3": Preset("its run 3 as logged: the same network as run 2, no step", _logged()),
    "logged-run4": Preset("its run 4 as logged: layer norm before the encoder, no step", _logged(layer_norm="in")),
    "logged-run5": Preset("its unreported run 5 as logged: GELU, no step", _logged(activation="gelu")),
    "written-run0": Preset(
        "equations 1-2 and 4 trained, without temporal term, Xavier, clipping and decay",
        _written(0.0, decay="none", plain=True),
    ),
    "written-run1": Preset("the same with the temporal term, lambda_2 = 0.1", _written(0.1, decay="none", plain=True)),
    "written-run2": Preset("equations 1-4 trained, lambda_2 = 0.1, no cosine decay", _written(0.1, decay="none")),
    "written-run3": Preset("equations 1-4 trained, lambda_2 = 0.01, cosine decay", _written(0.01)),
    "written-run4": Preset("run 3 with a layer norm before the encoder, trained", _written(0.01, layer_norm="in")),
    "written-two-phase": Preset(
        "run 3 in two phases: the temporal term rises with the warm-up",
        _written(0.01, phase=WARMUP_STEPS / WRITTEN_STEPS),
    ),
}


def _shuffled(name: str) -> Preset:
    """The control of a temporal preset: it sees each segment's tokens in random order."""

    def make(d_model: int) -> TrainConfig:
        config = PRESETS[name].make(d_model)
        data, temporal = config.data, config.temporal
        if temporal.kind == "t-sae" and data.segment_length == 2:  # a pair's two would only change places
            data = replace(data, segment_length=128, n_segments=256)
            temporal = replace(temporal, contrast=replace(temporal.contrast, per_segment=8))
        return replace(config, data=data, temporal=replace(temporal, order="segment"))

    return Preset(f"control: {name} on shuffled positions", make)


def _is_temporal(config: TrainConfig) -> bool:
    return config.temporal.kind != "difference" or config.sae.reads_neighbours


TEMPORAL_PRESETS = [name for name in PRESETS if _is_temporal(PRESETS[name].make(8))]
"""Those with a twin, NAME-shuffled, whose neighbours are of one document but not adjacent."""
PRESETS |= {f"{name}-shuffled": _shuffled(name) for name in TEMPORAL_PRESETS}
DEFAULT = "temporal-topk-centred"
"""What the rule of `tcsae real-lm` decides (docs/results/real-lm.md)."""


def preset(name: str, d_model: int) -> TrainConfig:
    """Settings of a preset. Raises ConfigError for an unknown name, with the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name].make(d_model)
