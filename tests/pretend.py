"""A second device for machines that have none: "pretend", whose tensors lie in this machine's memory all the same.

An operation that mixes its tensors with the CPU's fails, as on a GPU; only copies (`to`, `copy_`) and CPU scalars pass.
Stricter than a GPU, which also takes an index from the CPU, at the price of a copy and a wait. No test itself; loaded
by path, as nothing below tests/ is a package. Importing it registers the device, which can be done once a process.
"""

from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPIES = ("aten::copy_", "aten::_to_copy")


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class FarTensor(torch.Tensor):
    """A tensor on the pretended device; what it holds is the CPU tensor `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "FarTensor":
        layout = {}
        if held.layout is torch.strided:
            layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=f"{NAME}:0", **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"FarTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(op, args, kwargs or {})


def carry_out(op: Any, args: Any, kwargs: Any) -> Any:
    """Do `op` on what the tensors hold; results are far unless it is a copy to the CPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, FarTensor)}
    near = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.dim()]
    copies = op._schema.name in COPIES
    if far and near and not copies:
        raise MixedDevicesError(f"{op}: tensors of {NAME} and of the CPU, the latter {near}")
    out = op(*tree_map(_near, args), **tree_map(_near, kwargs))
    if torch.Tag.inplace_view in op.tags:  # squeeze_ and its like: the shape of the wrapper has to follow
        _follow(op, args, kwargs)
    to = kwargs.get("device")
    stays = copies and (to.type == "cpu" if to is not None else not isinstance(args[0], FarTensor))
    return out if stays else tree_map(lambda leaf: _far(op, leaf, far), out)


def _follow(op: Any, args: Any, kwargs: Any) -> None:
    """Do `op` on the wrapper's shape alone, as torch's own wrappers do (return_and_correct_aliasing)."""
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with no_dispatch():
            op(*args, **kwargs)
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def _near(leaf: Any) -> Any:
    if isinstance(leaf, FarTensor):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _far(op: Any, leaf: Any, known: dict[int, FarTensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    tensor = known[id(leaf)] if id(leaf) in known else FarTensor(leaf)
    assert tensor.shape == leaf.shape, f"{op} resizes: it needs an implementation of its own below"
    return tensor


if torch._C._get_privateuse1_backend_name() != NAME:
    _setup_privateuseone_for_python_backend(NAME)
    EVERYTHING, FACTORIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    # Of tensors made on the device from nothing; whatever has an input arrives through FarTensor.
    EVERYTHING.fallback(lambda op, *args, **kwargs: carry_out(op, args, kwargs), "PrivateUse1")
    OWN = (torch.ops.aten.arange, ("default", "start", "start_step")), (torch.ops.aten.eye, ("default", "m"))
    for op in (getattr(packet, overload) for packet, overloads in OWN for overload in overloads):
        # Elsewhere it is an empty tensor, resized.
        FACTORIES.impl(op, lambda *args, op=op, **kwargs: carry_out(op, args, kwargs), "PrivateUse1")
