"""From stored rows back to activations: on any device, once per batch for all that use it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from tcsae.shared.codecs import SCALE_BYTES

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
