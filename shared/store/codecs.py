"""How activations become stored rows. A codec is named in the recipe; `decoding` goes the other way.

A row is one token's d_model numbers in their stored form. Codecs with parameters take them from the first train
sequences (`fit`), the same for whoever computes them. data/README.md states every representation.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, DataError, unknown

# From stored rows back to activations: on any device, once per batch for all that use it.

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}
"""torch computes with few unsigned types; the bits are the same."""


class Decoder:
    """Makes activations of the stored rows of one hook in one split. `codec` is what that split is stored in."""

    def __init__(self, codec: str, parameters: Mapping[str, ndarray], device: torch.device | str = "cpu") -> None:
        self.codec = codec
        tensors = {name: torch.from_numpy(values).to(device) for name, values in parameters.items()}
        self._mean = tensors.get("mean")
        self._scale = tensors.get("scale")
        self._basis = tensors["step"] * tensors["basis"] if codec == "compact" else None

    def __call__(
        self, rows: Shaped[Tensor, "n d_stored"], out: Float[Tensor, "n d_model"] | None = None
    ) -> Float[Tensor, "n d_model"]:
        """float32 activations of rows in the stored dtype; of `compact`, also narrowed to uint16 (see the loader).

        `out` takes the result. A padded position's row is all zero; what it decodes to means nothing.
        """
        rows = rows.view(SIGNED[rows.dtype]) if rows.dtype in SIGNED else rows
        if self.codec == "compact":
            assert self._mean is not None and self._basis is not None
            return torch.addmm(self._mean, _from_zigzag(rows).float(), self._basis, out=out)
        if self.codec == "int8":
            assert self._mean is not None and self._scale is not None
            scales = rows[:, -SCALE_BYTES:].reshape(-1).view(torch.float32)[:, None]
            values = torch.mul(rows[:, :-SCALE_BYTES], scales, out=out)
            return values.mul_(self._scale).add_(self._mean)
        if self.codec == "bfloat16":
            rows = rows.view(torch.bfloat16)
        return rows.float() if out is None else out.copy_(rows)


def _from_zigzag(rows: Shaped[Tensor, "n d_model"]) -> Shaped[Tensor, "n d_model"]:
    """0, 1, 2, 3, 4 ... -> 0, -1, 1, -2, 2 ..., int32."""
    if rows.dtype == torch.int16:
        rows = rows.int().bitwise_and_(0xFFFF)
    sign = (rows & 1).neg_()
    return (rows >> 1).bitwise_xor_(sign)


COMPACT_ERROR = 1e-2
"""Relative squared error of `compact` unless another is asked for."""
FIT_TOKENS = 2**15
"""Positions of the train sequences, from the first on, that parameters are computed from."""
STEP_TOKENS = 8192
"""Of these, how many the step of `compact` is measured on."""
HEADROOM = 2.0
"""The eval split is float16 if this times the largest value among the first train sequences fits."""
SCALE_BYTES = 4
"""At the end of an int8 row: the token's scale, float32, little-endian."""
ZIGZAG_LIMIT = 2**30


class Representation(NamedTuple):
    """What a codec stores."""

    dtype: np.dtype
    fill: float | int
    """Value of a missing chunk; it is never stored."""
    parameters: tuple[str, ...]
    """Arrays below codec/<hook>/."""
    bytes_per_number: int
    """About, for the size of a chunk."""
    extra_columns: int = 0


CODECS = {
    "float16": Representation(np.dtype("<f2"), np.nan, (), 2),
    "float32": Representation(np.dtype("<f4"), np.nan, (), 4),
    "bfloat16": Representation(np.dtype("<u2"), 0xFFFF, (), 2),
    "int8": Representation(np.dtype("i1"), -128, ("mean", "scale"), 1, SCALE_BYTES),
    "compact": Representation(np.dtype("<u4"), 0xFFFFFFFF, ("mean", "basis", "step"), 2),
}
"""float16: relative error up to 2**-11, range up to 65504. float32: exact. The others: see `encode`."""
EXACT = ("float16", "float32")
"""Codecs that the eval split shares with the train split, and that need nothing from the first sequences."""


def representation(codec: str) -> Representation:
    """What `codec` stores. Raises ConfigError for an unknown codec."""
    if codec not in CODECS:
        raise ConfigError(unknown("codec", codec, CODECS))
    return CODECS[codec]


def stored_dtype(codec: str) -> np.dtype:
    """The dtype that a codec stores. Raises ConfigError for an unknown codec."""
    return representation(codec).dtype


def stored_width(codec: str, d_model: int) -> int:
    """Numbers in a stored row."""
    return d_model + representation(codec).extra_columns


def parameter_shapes(codec: str, d_model: int) -> dict[str, tuple[int, ...]]:
    """The arrays below codec/<hook>/, all float32."""
    shapes = {"mean": (d_model,), "scale": (d_model,), "basis": (d_model, d_model), "step": (1,)}
    return {name: shapes[name] for name in representation(codec).parameters}


def check_codec(codec: str, error: float | None) -> float | None:
    """The error that a recipe records: `error` or the default for `compact`, None for the others.

    Raises ConfigError for an unknown codec, an error that no step gives, or one that the codec would ignore.
    """
    representation(codec)
    if codec != "compact":
        if error is not None:
            raise ConfigError(f"--codec-error belongs to --codec compact; {codec} has its own. Leave it out.")
        return None
    error = COMPACT_ERROR if error is None else error
    if not 1e-8 <= error < 1:
        raise ConfigError(f"--codec-error {error:g}: give a relative squared error from 1e-8 to below 1, such as 1e-2.")
    return error


def eval_codec(codec: str, x: Float[ndarray, "n d_model"]) -> str:
    """The eval split's codec: exact, and float16 if the values of the first train sequences leave room."""
    if codec in EXACT:
        return codec
    return "float16" if np.abs(x).max(initial=0.0) * HEADROOM <= np.finfo(np.float16).max else "float32"


def fit(codec: str, x: Float[ndarray, "n d_model"], error: float | None = None) -> dict[str, ndarray]:
    """A codec's parameters, float32, from tokens of the train split; `error` as for `compact`.

    Tokens above the 99th percentile of the norms count for nothing, so that a few massive ones do not drown the rest.
    """
    if codec not in ("int8", "compact"):
        return {}
    d_model = x.shape[1]
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    kept = x[norms <= np.percentile(norms, 99)] if len(x) else np.zeros((1, d_model), np.float32)
    mean = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = kept - mean
    if codec == "int8":
        scale = np.sqrt(np.square(centred, dtype=np.float64).mean(0)).astype(np.float32)
        return {"mean": mean, "scale": np.where(scale > 0, scale, np.float32(1))}
    covariance = (centred.T @ centred).astype(np.float64) / len(centred)
    basis = np.ascontiguousarray(np.linalg.eigh(covariance)[1].T[::-1].astype(np.float32))
    variance = float(np.trace(covariance))
    stride = -(-len(centred) // STEP_TOKENS)
    step = _step(centred[::stride] @ basis.T, (error or COMPACT_ERROR) * variance)
    return {"mean": mean, "basis": basis, "step": np.array([step], np.float32)}


def _step(coefficients: Float[ndarray, "n d_model"], allowed: float) -> float:
    """The largest step whose rounding costs at most `allowed`, a mean squared error per token.

    A small step s costs d s^2 / 12; a step larger than a dimension's spread costs no more than its variance, so the
    step that fits lies above the first guess. Bisected within 3%.
    """
    if not allowed:
        return 1.0
    low = float(np.sqrt(12 * allowed / coefficients.shape[1]))
    high = low * 64
    while high > low * 1.03:
        middle = float(np.sqrt(low * high))
        off = coefficients - np.rint(coefficients / np.float32(middle)) * np.float32(middle)
        if np.square(off, dtype=np.float64).sum() / len(off) <= allowed:
            low = middle
        else:
            high = middle
    return low


def encode(
    values: Float[ndarray, "n d_model"], codec: str, parameters: Mapping[str, ndarray] | None = None
) -> Shaped[ndarray, "n d_stored"]:
    """Tokens, float32 and finite, as stored rows.

    bfloat16  the upper half of the float32, rounded to nearest even, as uint16
    int8      q = round((x - mean) / scale / s), s = max |.| / 127 over the token's numbers; then the 4 bytes of s
    compact   q = round((x - mean) @ basis.T / step), as uint32 by zigzag: 2 q, or -2 q - 1 below zero

    Nothing is clipped. Raises DataError where a value does not fit, with the codec that it does fit.
    """
    if codec in EXACT:
        return _encode_float(values, codec)
    parameters = parameters or {}
    if codec == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        if ((rounded & 0x7F80) == 0x7F80).any():
            raise _too_large(values, codec, "the largest bfloat16")
        return rounded.astype(np.uint16)
    centred = values - parameters["mean"]
    if codec == "int8":
        centred /= parameters["scale"]
        scale = (np.abs(centred).max(axis=1, initial=0.0, keepdims=True) / np.float32(127)).astype("<f4")
        q = np.rint(centred / np.where(scale > 0, scale, np.float32(1)))
        return np.concatenate([q.astype(np.int8), scale.view(np.int8)], axis=1)
    scaled = np.rint((centred @ parameters["basis"].T) / parameters["step"])
    if not (np.abs(scaled) < ZIGZAG_LIMIT).all():
        raise _too_large(values, codec, f"{ZIGZAG_LIMIT} steps of {parameters['step'][0]:.3g}")
    whole = scaled.astype(np.int32)
    return ((whole << 1) ^ (whole >> 31)).view(np.uint32)


def _encode_float(values: ndarray, codec: str) -> ndarray:
    dtype = stored_dtype(codec)
    limit = float(np.finfo(dtype).max)
    if np.abs(values).max(initial=0.0) > limit:
        raise _too_large(values, codec, f"{limit:.4g}")
    return values.astype(dtype)


def _too_large(values: ndarray, codec: str, limit: str) -> DataError:
    largest = float(np.abs(values).max())
    return DataError(f"An activation of {largest:.4g} exceeds {codec}'s {limit}. Harvest with --codec float32.")
