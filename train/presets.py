"""Named settings: ours, and the paper's in two families.

`logged-run*` are what the paper's printed figures are: networks that took no optimiser step. `written-run*` are the
paper's equations and hyperparameters, trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.module import SaeConfig
from tcsae.train.config import (
    DataConfig,
    DeadConfig,
    InitConfig,
    OptimizerConfig,
    SparsityConfig,
    TemporalConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Preset:
    """A name's settings, for activations of any width."""

    about: str
    make: Callable[[int], TrainConfig]


D_SAE, K = 4096, 32
TFA_D_SAE = 1024
PAPER_INIT = InitConfig(weights="xavier", b_dec="zero", input_scale="none")
PAPER_DATA = DataConfig(n_segments=32, segment_length=128)


def _ours(activation: Any, sae: dict[str, Any] | None = None, **settings: Any) -> Callable[[int], TrainConfig]:
    def make(d_model: int) -> TrainConfig:
        shape = SaeConfig(**{"d_model": d_model, "d_sae": D_SAE, "activation": activation, "k": K} | (sae or {}))
        return TrainConfig(sae=shape, **settings)

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


def _written(lambda_2: float, decay: Any = "cosine", layer_norm: Any = "none") -> Callable[[int], TrainConfig]:
    def make(d_model: int) -> TrainConfig:
        return TrainConfig(
            sae=SaeConfig(d_model=d_model, d_sae=512, activation="gelu", layer_norm=layer_norm),
            data=PAPER_DATA,
            optimizer=OptimizerConfig(lr=3e-4, warmup_steps=1000, decay=decay),
            temporal=TemporalConfig(weight=lambda_2, window=3),
            sparsity=SparsityConfig(l1=0.1),
            init=PAPER_INIT,
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
        "TopK whose adjacent codes are contrasted with other documents'; recommended",
        _ours("topk", temporal=TemporalConfig(kind="contrastive", weight=3.0, temperature=0.3)),
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
    "crosscoder-3": Preset("temporal crosscoder: a TopK code for 3 positions, 32 active a position", _crosscoder(3)),
    "crosscoder-5": Preset("the same for 5 positions", _crosscoder(5)),
    "tfa": Preset(
        "temporal feature analysis: attention over past codes and a TopK code of the rest", _tfa("attention")
    ),
    "tfa-past": Preset("the same, predicted from the past alone", _tfa("past")),
    "logged-run0": Preset("the paper's run 0 as logged: all weights zero, no step", _logged(weights="zero")),
    "logged-run2": Preset("its run 2 as logged: Xavier, ReLU, 512 latents, no step", _logged()),
    "logged-run3": Preset("its run 3 as logged: the same network as run 2, no step", _logged()),
    "logged-run4": Preset("its run 4 as logged: layer norm before the encoder, no step", _logged(layer_norm="in")),
    "logged-run5": Preset("its unreported run 5 as logged: GELU, no step", _logged(activation="gelu")),
    "written-run0": Preset("equations 1-2 and 4 trained, without the temporal term", _written(0.0)),
    "written-run2": Preset("equations 1-4 trained, lambda_2 = 0.1, no cosine decay", _written(0.1, decay="none")),
    "written-run3": Preset("equations 1-4 trained, lambda_2 = 0.01, cosine decay", _written(0.01)),
    "written-run4": Preset("run 3 with a layer norm before the encoder, trained", _written(0.01, layer_norm="in")),
}
DEFAULT = "temporal-topk"
"""By docs/results: what the temporal term costs is within the budget of 0.01, in explained variance and in CE score."""


def preset(name: str, d_model: int) -> TrainConfig:
    """Settings of a preset. Raises ConfigError for an unknown name, with the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name].make(d_model)
