"""TC-SAE: harvest activations once, train many sparse autoencoders, evaluate without the language model.

    store = tcsae.open_store("data/activations.zarr")
    sae = tcsae.load_sae("data/runs/topk")

Names load on first use, so that `import tcsae` brings in neither torch nor zarr.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tcsae.shared.sae.module import SparseAutoencoder
    from tcsae.shared.sae.sources import load_sae
    from tcsae.shared.store.create import create_store
    from tcsae.shared.store.reader import Store, open_store
    from tcsae.train.loader import iterate_segments, iterate_tokens

__version__ = "0.1.0"

_HOMES = {
    "Store": "tcsae.shared.store.reader",
    "open_store": "tcsae.shared.store.reader",
    "create_store": "tcsae.shared.store.create",
    "SparseAutoencoder": "tcsae.shared.sae.module",
    "load_sae": "tcsae.shared.sae.sources",
    "iterate_segments": "tcsae.train.loader",
    "iterate_tokens": "tcsae.train.loader",
}

__all__ = [
    "SparseAutoencoder",
    "Store",
    "__version__",
    "create_store",
    "iterate_segments",
    "iterate_tokens",
    "load_sae",
    "open_store",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcsae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
