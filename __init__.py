"""TC-SAE: harvest activations once, train many sparse autoencoders, evaluate without the language model.

    store = tcsae.harvest("data/activations.zarr", tokens="200K")
    runs = tcsae.train(store, preset="topk")
    tcsae.evaluate(store, runs).to_pandas()

Names load on first use, so that `import tcsae` brings in neither torch nor zarr. `harvest`, `train` and `evaluate` are
packages that can be called.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tcsae.api.attach import attach
    from tcsae.api.convert import fold_decoder_norms, to_jumprelu
    from tcsae.api.feature import Feature, feature
    from tcsae.api.returned import Evaluation, Report, Run, Runs
    from tcsae.api.stages import evaluate, harvest, report, train
    from tcsae.api.text import TextActivations, activations
    from tcsae.shared.base.errors import (
        ConfigError,
        DataError,
        DeniedError,
        DiskError,
        InstallError,
        ModelError,
        NoTailError,
        RemoteError,
        RunError,
        Stopped,
        StoreError,
        TcsaeError,
    )
    from tcsae.shared.sae.layout import SaeConfig, SaeMetadata
    from tcsae.shared.sae.module import SparseAutoencoder
    from tcsae.shared.sae.sources import load_sae
    from tcsae.shared.sae.sparse import SparseCode
    from tcsae.shared.store.create import create_store
    from tcsae.shared.store.reader import Store, open_store
    from tcsae.train.config import TrainConfig
    from tcsae.train.loader import iterate_segments, iterate_tokens

__version__ = "0.1.0"

_HOMES = {
    "tcsae.api.attach": ("attach",),
    "tcsae.api.convert": ("fold_decoder_norms", "to_jumprelu"),
    "tcsae.api.feature": ("Feature", "feature"),
    "tcsae.api.text": ("TextActivations", "activations"),
    "tcsae.api.returned": ("Evaluation", "Report", "Run", "Runs"),
    "tcsae.api.stages": ("report",),
    "tcsae.shared.base.errors": (
        "ConfigError",
        "DataError",
        "DeniedError",
        "DiskError",
        "InstallError",
        "ModelError",
        "NoTailError",
        "RemoteError",
        "RunError",
        "Stopped",
        "StoreError",
        "TcsaeError",
    ),
    "tcsae.shared.sae.layout": ("SaeConfig", "SaeMetadata"),
    "tcsae.shared.sae.module": ("SparseAutoencoder",),
    "tcsae.shared.sae.sources": ("load_sae",),
    "tcsae.shared.sae.sparse": ("SparseCode",),
    "tcsae.shared.store.create": ("create_store",),
    "tcsae.shared.store.reader": ("Store", "open_store"),
    "tcsae.train.config": ("TrainConfig",),
    "tcsae.train.loader": ("iterate_segments", "iterate_tokens"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
_ROOMS = ("evaluate", "harvest", "train")

__all__ = [
    "ConfigError",
    "DataError",
    "DeniedError",
    "DiskError",
    "Evaluation",
    "Feature",
    "InstallError",
    "ModelError",
    "NoTailError",
    "RemoteError",
    "Report",
    "Run",
    "RunError",
    "Runs",
    "SaeConfig",
    "SaeMetadata",
    "SparseAutoencoder",
    "SparseCode",
    "Stopped",
    "Store",
    "StoreError",
    "TcsaeError",
    "TextActivations",
    "TrainConfig",
    "__version__",
    "activations",
    "attach",
    "create_store",
    "evaluate",
    "feature",
    "fold_decoder_norms",
    "harvest",
    "iterate_segments",
    "iterate_tokens",
    "load_sae",
    "open_store",
    "report",
    "to_jumprelu",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"tcsae.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'tcsae' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
