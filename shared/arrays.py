"""The arrays of a store that is being written, by path: made on first use, grown when their split grows."""

from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, TransposeCodec, ZstdCodec

from tcsae.shared.codecs import representation, stored_width
from tcsae.shared.manifest import HookRecipe, Layout
from tcsae.shared.storage import open_or_create

COMPACT_BLOCK_BYTES = 1 << 17


class StoreArrays:
    """Arrays for `layout`, of sequences of `length` positions. The root group has to be there when one is asked for."""

    def __init__(self, store: ZarrStore, layout: Layout, length: int) -> None:
        self._store = store
        self._layout = layout
        self._length = length
        self._arrays: dict[str, zarr.Array] = {}

    def tokens(self, split: str, name: str) -> zarr.Array:
        """`tokens`, `lengths`, `documents` or `starts` of a split; new with no rows."""
        dtype = np.dtype("int64" if name == "documents" else "int32")
        rows, rest = self._layout.sequences_per_token_chunk, (self._length,) if name == "tokens" else ()
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

    def whole(self, path: str, values: np.ndarray, fill: object = 0) -> None:
        """Write an array that is one object."""
        self._array(path, values.shape, values.shape, values.dtype, fill)[:] = values

    def _array(
        self, path: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype, fill: object, *codecs: Any
    ) -> zarr.Array:
        if path not in self._arrays:
            self._arrays[path] = open_or_create(self._store, path, shape, chunks, dtype, fill, codecs)
        return self._arrays[path]


def compact_codecs() -> tuple[Any, ...]:
    """One dimension's coefficients side by side, bytes of equal weight side by side; zstd 1 then comes within 3% of
    the entropy, and higher levels do worse: the data are near random.
    """
    blosc = BloscCodec(typesize=4, cname="zstd", clevel=1, shuffle="shuffle", blocksize=COMPACT_BLOCK_BYTES)
    return TransposeCodec(order=(2, 0, 1)), blosc
