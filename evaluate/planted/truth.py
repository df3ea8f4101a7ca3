"""The truth of a planted store, in one file beside it: the features, and which are on at each token of the eval split.

A safetensors file, STORE.truth.safetensors, whose metadata names the store's content and the settings it was made by.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Int
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import json_digest, write_atomic

if TYPE_CHECKING:
    from tcsae.shared.store.reader import Store

SLOW_RARE, SLOW_DENSE, FAST, POSITION, PARENT, CHILD = "slow_rare", "slow_dense", "fast", "position", "parent", "child"
CLASSES = (SLOW_RARE, SLOW_DENSE, FAST, POSITION, PARENT, CHILD)
MODEL = "planted features"
"""Name of the model in the recipe of a planted store."""
SUFFIX = ".truth.safetensors"
VERSION = 1
ABOUT = "truth"
"""The metadata's one key: version, content of the store, settings, digest."""


@dataclass(frozen=True, eq=False)
class Truth:
    """n features of a store, and what they do on its eval split, whose valid tokens are laid end to end."""

    directions: Float[ndarray, "n d_model"]
    """Unit vectors, float32."""
    kinds: Int[ndarray, " n"]
    """Place in CLASSES."""
    durations: Float[ndarray, " n"]
    """Mean tokens that a draw is held."""
    amplitudes: Float[ndarray, " n"]
    """Mean where the feature is on, as planted."""
    parents: Int[ndarray, " n"]
    """-1: none."""
    offsets: Int[ndarray, " n_tokens_plus_1"]
    """Token t has entries offsets[t] : offsets[t + 1]."""
    features: Int[ndarray, " n_entries"]
    values: Float[ndarray, " n_entries"]
    """0: on, but it does not show."""

    @property
    def n_features(self) -> int:
        return len(self.directions)


DTYPES = {
    "directions": np.float32,
    "kinds": np.int32,
    "durations": np.float64,
    "amplitudes": np.float64,
    "parents": np.int32,
    "offsets": np.int64,
    "features": np.int32,
    "values": np.float32,
}


def truth_path(location: str) -> Path | None:
    """Where the truth of the store at `location` lies; None if that is not on a local disk."""
    path = location.removeprefix("file://").rstrip("/")
    return None if "://" in path else Path(f"{path}{SUFFIX}")


def save_truth(location: str, truth: Truth, content: str, settings: Mapping[str, Any]) -> None:
    """Write the truth beside the store of this content."""
    path = truth_path(location)
    assert path is not None, "checked before anything is made"
    tensors = {name: np.ascontiguousarray(getattr(truth, name), kind) for name, kind in DTYPES.items()}
    about = {"version": VERSION, "content": content, "settings": dict(settings)}
    about["digest"] = _digest(about, tensors)
    # One key: safetensors writes several in an order of its own, which differs from time to time.
    write_atomic(path, safetensors.numpy.save(tensors, {ABOUT: json.dumps(about, sort_keys=True)}))


def load_truth(store: "Store") -> Truth | None:
    """The truth beside a store; None if there is none, as beside any store that is not planted.

    Raises StoreError if the file is damaged, or is of another store.
    """
    path = truth_path(store.location)
    if store.manifest.recipe.model.name != MODEL or path is None or not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}). {AGAIN}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise StoreError(f"{path} has version {version!r:.40}; this program reads {VERSION}. {AGAIN}")
    if about.get("content") != store.content:
        raise StoreError(f"{path} is the truth of another store than {store.location}. {AGAIN}")
    if tensors.keys() != DTYPES.keys() or about.get("digest") != _digest(about, tensors):
        raise StoreError(f"{path} is damaged: its digest does not fit. {AGAIN}")
    return Truth(**tensors)


AGAIN = "Delete it and start the same tcsae synthetic again: it writes the truth anew, and the store stays."


def _digest(about: Mapping[str, Any], tensors: Mapping[str, ndarray]) -> str:
    """Of everything in the file but the digest itself."""
    values = {
        name: [one.dtype.str, one.shape, hashlib.sha256(one.tobytes()).hexdigest()] for name, one in tensors.items()
    }
    return json_digest({"about": {name: about[name] for name in about if name != "digest"}, "values": values})
