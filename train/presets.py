"""Named settings: ours, and the paper's as written."""

from collections.abc import Callable
from dataclasses import dataclass

from tcsae.shared.errors import ConfigError, unknown
from tcsae.shared.sae import SaeConfig
from tcsae.train.config import DataConfig, OptimizerConfig, TemporalConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A name's settings, for activations of any width."""

    about: str
    make: Callable[[int], TrainConfig]


def _topk(d_model: int) -> TrainConfig:
    return TrainConfig(sae=SaeConfig(d_model=d_model, d_sae=4096, activation="topk", k=32))


def _written_run3(d_model: int) -> TrainConfig:
    return TrainConfig(
        sae=SaeConfig(d_model=d_model, d_sae=512, activation="gelu"),
        data=DataConfig(n_segments=32, segment_length=128, skip_first=1),
        optimizer=OptimizerConfig(lr=3e-4, warmup_steps=1000, decay="cosine"),
        temporal=TemporalConfig(weight=0.01, window=3),
        l1=0.1,
        init="xavier",
        input_norm="none",
    )


PRESETS = {
    "topk": Preset("TopK, 4096 latents, 32 active: the recommended one for now", _topk),
    "written-run3": Preset(
        "the paper's equations 1-4 and hyperparameters of its run 3, trained: GELU, 512 latents, lambda_1 0.1, "
        "lambda_2 0.01, windows of 3, batches of 32 sequences",
        _written_run3,
    ),
}
DEFAULT = "topk"


def preset(name: str, d_model: int) -> TrainConfig:
    """Settings of a preset. Raises ConfigError for an unknown name, with the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name].make(d_model)
