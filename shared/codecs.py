"""How activations become stored numbers, and back. A codec is named in the recipe; readers need not know it."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.errors import ConfigError, DataError, unknown

CODECS: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
"""Name -> stored dtype. float16: relative error up to 2**-11, range up to 65504."""


def stored_dtype(codec: str) -> np.dtype:
    """The dtype that a codec stores. Raises ConfigError for an unknown codec."""
    if codec not in CODECS:
        raise ConfigError(unknown("codec", codec, CODECS))
    return CODECS[codec]


def encode(values: Float[ndarray, "*shape"], codec: str) -> ndarray:
    """Activations as they are stored. Raises DataError where a value does not fit, with the codec that it does fit."""
    dtype = stored_dtype(codec)
    limit = float(np.finfo(dtype).max)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > limit:
        raise DataError(f"An activation of {largest:.4g} exceeds {codec}'s {limit:.4g}. Harvest with --codec float32.")
    return values.astype(dtype)
