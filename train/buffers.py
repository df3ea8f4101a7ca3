"""Code-sized buffers, made once and shared by all runs of a pass: a fresh one costs more than the work on it."""

import torch
from jaxtyping import Float
from torch import Tensor


class Workspace:
    """Named scratch buffers of the default dtype, on one device. Nothing in them outlives a step."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, n: int, width: int) -> Float[Tensor, "n width"]:
        """A contiguous [n, width] view of the buffer `name`, content undefined."""
        if name not in self._buffers or self._buffers[name].numel() < n * width:
            self._buffers[name] = torch.empty(n * width, device=self._device)
        return self._buffers[name][: n * width].view(n, width)

    def zeros(self, n: int, width: int) -> Float[Tensor, "n width"]:
        """An all-zero view; whoever writes to it has to leave it all zero."""
        if "zeros" not in self._buffers or self._buffers["zeros"].numel() < n * width:
            self._buffers["zeros"] = torch.zeros(n * width, device=self._device)
        return self._buffers["zeros"][: n * width].view(n, width)

    def n_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
