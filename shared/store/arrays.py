"""The arrays of a store that is being written, and what their splits are stored as."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Shaped
from numpy import ndarray
from zarr.abc.codec import ArrayArrayCodec
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.codecs import EXACT, encode, eval_codec, fit, representation, stored_width
from tcsae.shared.store.format import PER_TOKEN, TOKEN_DTYPES, HookRecipe, Layout, Recipe
from tcsae.shared.store.journal import CODEC, Journal
from tcsae.shared.store.places.base import Objects

COMPACT_BLOCK_BYTES = 1 << 17


class StoreArrays:
    """The arrays of a store that is being written, by path: made on first use, grown when their split grows.

    For `layout`, of sequences of `length` positions. The root group has to exist when an array is asked for.
    """

    def __init__(self, store: ZarrStore, layout: Layout, length: int) -> None:
        self._store = store
        self._layout = layout
        self._length = length
        self._arrays: dict[str, zarr.Array] = {}

    def tokens(self, split: str, name: str) -> zarr.Array:
        """`tokens`, `lengths`, `documents`, `starts` or `roles` of a split; new with no rows."""
        dtype = np.dtype(TOKEN_DTYPES.get(name, "int32"))
        rows, rest = self._layout.sequences_per_token_chunk, (self._length,) if name in PER_TOKEN else ()
        fill = np.iinfo(dtype).max
        return self._array(f"{split}/{name}", (0, *rest), (rows, *rest), dtype, fill, ZstdCodec(level=1))

    def activations(self, split: str, hook: HookRecipe, codec: str, n_sequences: int) -> zarr.Array:
        """A split's activations of a hook, stored as `codec`, with `n_sequences` rows."""
        width, stored = stored_width(codec, hook.d_model), representation(codec)
        shape = (n_sequences, self._length, width)
        chunks = (self._layout.sequences_per_chunk, self._length, width)
        codecs = compact_codecs() if codec == "compact" else ()
        array = self._array(f"{split}/activations/{hook.requested}", shape, chunks, stored.dtype, stored.fill, *codecs)
        if array.shape != shape:
            array.resize(shape)
        return array

    def whole(
        self, path: str, values: np.ndarray, fill: object = 0, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Write an array that is one object."""
        shape = values.shape
        self._array(path, shape, shape, values.dtype, fill, attributes=attributes)[:] = values

    def _array(
        self,
        path: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        fill: object,
        *codecs: Any,
        attributes: Mapping[str, Any] | None = None,
    ) -> zarr.Array:
        if path not in self._arrays:
            self._arrays[path] = open_or_create(self._store, path, shape, chunks, dtype, fill, codecs, attributes)
        return self._arrays[path]


def compact_codecs() -> tuple[Any, ...]:
    """One dimension's coefficients side by side, bytes of equal weight side by side; zstd 1 then comes within 3% of
    the entropy, and higher levels do worse: the data are near random.
    """
    blosc = BloscCodec(typesize=4, cname="zstd", clevel=1, shuffle="shuffle", blocksize=COMPACT_BLOCK_BYTES)
    return TransposeCodec(order=(2, 0, 1)), blosc


class CodecRecord:
    """The codec of a store that is being written: its parameters below codec/ and its record in the journal.

    Computed once; any writer that finds the record goes on with it.
    """

    def __init__(self, recipe: Recipe, objects: Objects, arrays: StoreArrays, journal: Journal) -> None:
        self._recipe, self._objects, self._arrays, self._journal = recipe, objects, arrays, journal
        self._parameters: dict[str, dict[str, ndarray]] = {}

    @property
    def fitted(self) -> bool:
        """Whether the parameters are recorded, or the codec has none: shards can be written."""
        return self._recipe.codec in EXACT or self._journal.has(CODEC)

    def fit(self, samples: Mapping[str, Float[ndarray, "n d_model"]]) -> None:
        """Compute and record the parameters from every hook's tokens."""
        digests = {}
        for hook, x in samples.items():
            for name, values in fit(self._recipe.codec, x, self._recipe.codec_error).items():
                path = f"codec/{hook}/{name}"
                self._arrays.whole(path, values, np.nan)
                key = f"{path}/c/{'/'.join('0' * values.ndim)}"
                digests[key] = self._objects.stamp(key).digest
        evals = {hook: eval_codec(self._recipe.codec, x) for hook, x in samples.items()}
        self._journal.write(CODEC, {"eval": evals, "objects": digests})

    def name(self, split: str, hook: str) -> str:
        """What a hook of a split is stored as."""
        if split == "train" or self._recipe.codec in EXACT:
            return self._recipe.codec
        record = self._journal.read(CODEC)
        if record is None:
            raise self._gone()
        return record["eval"][hook]

    def encode(self, split: str, hook: str, x: Float[ndarray, "n d_model"]) -> Shaped[ndarray, "n d_stored"]:
        """Stored rows. Raises DataError where a value does not fit."""
        codec = self.name(split, hook)
        names = representation(codec).parameters
        if names and hook not in self._parameters:
            if not self.fitted:
                raise self._gone()
            group = zarr.open_group(self._objects.zarr_store(), path=f"codec/{hook}", mode="r", zarr_format=3)
            self._parameters[hook] = {name: np.asarray(group[name][:]) for name in names}  # type: ignore[index]
        return encode(x, codec, self._parameters.get(hook))

    def _gone(self) -> StoreError:
        """Parameters are fitted before the first shard; who seals the store clears their record away."""
        return StoreError(
            f"{self._objects.location}: the codec's parameters are not recorded any more, as another process sealed or "
            "cleared the store. Start the same command again."
        )

    def objects(self) -> dict[str, str]:
        """Keys of the parameters' chunks, and their digests as they were written."""
        return dict((self._journal.read(CODEC) or {}).get("objects", {}))


def open_or_create(
    store: ZarrStore,
    path: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype,
    fill: object,
    codecs: tuple[Any, ...] = (),
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Array:
    """The array at `path`; if not there yet, made with its parent groups.

    Its codecs: those of `codecs` that rearrange an array, little-endian, the other `codecs`, crc32c.
    """
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    if parent := path.rpartition("/")[0]:
        group.require_group(parent)
    if path in group:
        with zarr.config.set({"array.write_empty_chunks": True}):  # no array remembers that it was created so
            array = group[path]
        assert isinstance(array, zarr.Array)
        return array
    return group.create_array(
        path,
        shape=shape,
        chunks=tuple(max(1, n) for n in chunks),
        dtype=dtype,
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(endian=None),
        filters=tuple(codec for codec in codecs if isinstance(codec, ArrayArrayCodec)),
        compressors=(*(codec for codec in codecs if not isinstance(codec, ArrayArrayCodec)), Crc32cCodec()),
        fill_value=fill,
        attributes=dict(attributes or {}),
        # A missing chunk is damage, not a run of fill values.
        config={"write_empty_chunks": True},
    )
