"""Plain chunks straight from their files: the bytes into the caller's buffer, then their crc32c. Zarr is the general
path; this one reads several times as fast and makes no copy.
"""

import google_crc32c
import numpy as np
import zarr
from numpy import ndarray

from tcsae.shared.errors import StoreError
from tcsae.shared.objects import Objects

CRC_BYTES = 4


def is_plain(array: zarr.Array) -> bool:
    """Whether a chunk's file is its numbers, little-endian, then their crc32c, as it is without a compressor."""
    codecs = [codec["name"] for codec in array.metadata.to_dict()["codecs"]]  # type: ignore[index, call-overload, union-attr]
    return codecs == ["bytes", "crc32c"] and array.dtype.byteorder in "<=|"


def read_chunk(objects: Objects, key: str, out: ndarray, chunk_bytes: int) -> None:
    """Fill `out` (contiguous) with the first bytes of the plain chunk `key`, which holds `chunk_bytes` of numbers.

    Raises StoreError, naming the object, if it is missing, of another size, or its checksum does not fit.
    """
    whole = out.reshape(-1).view(np.uint8)
    if len(whole) < chunk_bytes:  # the last chunk of an array is stored whole, too
        whole = np.empty(chunk_bytes, np.uint8)
    trailer = bytearray(CRC_BYTES + 1)
    try:
        n_read = objects.read_into(key, whole.data, memoryview(trailer))
    except OSError as error:
        why = error.strerror or "it is not there"
        raise StoreError(
            f"{objects.name(key)} cannot be read ({why}): the store is damaged. Harvest it again."
        ) from error
    if n_read != chunk_bytes + CRC_BYTES:
        raise StoreError(
            f"{objects.name(key)} is damaged: it is not {chunk_bytes + CRC_BYTES} bytes long. Harvest the store again."
        )
    if google_crc32c.value(whole) != int.from_bytes(trailer[:CRC_BYTES], "little"):
        raise StoreError(f"{objects.name(key)} is damaged: its checksum does not fit. Harvest the store again.")
    if len(whole) > out.nbytes:
        out.reshape(-1).view(np.uint8)[:] = whole[: out.nbytes]
