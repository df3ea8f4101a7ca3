"""What the splits of a store that is being written are stored as: the codec's parameters, once they are computed."""

from collections.abc import Mapping

import numpy as np
import zarr
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray

from tcsae.shared.arrays import StoreArrays
from tcsae.shared.codecs import EXACT, encode, eval_codec, fit, representation
from tcsae.shared.errors import DataError
from tcsae.shared.journal import Journal
from tcsae.shared.manifest import Recipe
from tcsae.shared.objects import Objects

RECORD = "codec"


class CodecRecord:
    """The journal's record of the codec, and the arrays below codec/; any writer that finds them goes on with them."""

    def __init__(self, recipe: Recipe, objects: Objects, arrays: StoreArrays, journal: Journal) -> None:
        self._recipe, self._objects, self._arrays, self._journal = recipe, objects, arrays, journal
        self._parameters: dict[str, dict[str, ndarray]] = {}

    @property
    def fitted(self) -> bool:
        """Whether the parameters are recorded, or the codec has none: shards can be written."""
        return self._recipe.codec in EXACT or self._journal.has(RECORD)

    def fit(self, samples: Mapping[str, Float[ndarray, "n d_model"]]) -> None:
        """Compute and record the parameters from every hook's tokens."""
        objects = {}
        for hook, x in samples.items():
            for name, values in fit(self._recipe.codec, x, self._recipe.codec_error).items():
                path = f"codec/{hook}/{name}"
                self._arrays.whole(path, values, np.nan)
                key = f"{path}/c/{'/'.join('0' * values.ndim)}"
                objects[key] = self._objects.digest(key)
        evals = {hook: eval_codec(self._recipe.codec, x) for hook, x in samples.items()}
        self._journal.write(RECORD, {"eval": evals, "objects": objects})

    def name(self, split: str, hook: str) -> str:
        """What a hook of a split is stored as."""
        if split == "train" or self._recipe.codec in EXACT:
            return self._recipe.codec
        record = self._journal.read(RECORD)
        assert record is not None, "fit comes before the first shard"
        return record["eval"][hook]

    def encode(self, split: str, hook: str, x: Float[ndarray, "n d_model"]) -> Shaped[ndarray, "n d_stored"]:
        """Stored rows. Raises DataError where a value does not fit."""
        codec = self.name(split, hook)
        names = representation(codec).parameters
        if names and hook not in self._parameters:
            assert self.fitted, "fit comes before the first shard"
            group = zarr.open_group(
                self._objects.zarr_store(read_only=True), path=f"codec/{hook}", mode="r", zarr_format=3
            )
            self._parameters[hook] = {name: np.asarray(group[name][:]) for name in names}  # type: ignore[index]
        return encode(x, codec, self._parameters.get(hook))

    def objects(self) -> dict[str, str]:
        """Keys of the parameters' chunks, and their digests as they were written."""
        return dict((self._journal.read(RECORD) or {}).get("objects", {}))


def check_finite(
    values: Float[ndarray, "n sequence_length d_model"],
    valid: Bool[ndarray, "n sequence_length"],
    split: str,
    first: int,
    hook: str,
) -> None:
    """Raises DataError, naming the place, if a valid position of sequences `first`, ... holds NaN or infinity."""
    bad = ~np.isfinite(values).all(axis=-1) & valid
    if bad.any():
        row, position = np.argwhere(bad)[0]
        where = f"{split} sequence {first + row}, position {position}"
        raise DataError(f"{hook} is NaN or infinite at {where}. Nothing of this shard was stored; look at the model.")
