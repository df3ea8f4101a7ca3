"""One forward pass that ends when all hooks have fired: through TransformerLens' bridge, or through the modules of the
Hugging Face model that the bridge wraps, which is faster and holds wherever a hook is a module's input or output.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.harvest.sources import first_line
from tcsae.shared.errors import ModelError


class _AllCaughtError(Exception):
    """Every hook has fired: the rest of the forward pass is not needed."""


class Forward:
    """A loaded model with its hooks: [n, position] token ids in, one [n, position, d_model] a hook out.

    Stopping at the last firing, and not at a layer, makes no assumption about where in a block a hook sits: under
    `stop_at_layer=N`, `blocks.N.hook_resid_pre` never fires, silently.
    """

    def __init__(
        self, model: Any, name: str, n_hooks: int, call: Callable[[Tensor, bool], Any], attention: str
    ) -> None:
        self.model = model
        self.attention = attention
        self._name = name
        self._n_hooks = n_hooks
        self._call = call
        self._caught: dict[str, Tensor] = {}
        self._stops = True

    def __call__(self, ids: Int[Tensor, "n position"], *, stops: bool = True) -> dict[str, Tensor]:
        """What the hooks that fired saw, in the model's dtype, on its device; heads are flattened."""
        self._stops, self._caught = stops, {}
        try:
            with torch.inference_mode():
                self._call(ids, False)
        except _AllCaughtError:
            pass
        return self._caught

    def whole(self, ids: Int[Tensor, "n position"]) -> tuple[dict[str, Tensor], Float[Tensor, "n position vocabulary"]]:
        """The same without stopping, and the logits."""
        self._stops, self._caught = False, {}
        with torch.inference_mode():
            logits = self._call(ids, True)
        return self._caught, logits

    def record(self, hook: str, value: Tensor) -> None:
        """What a hook calls when it fires. Raises ModelError at the second time in a pass."""
        if hook in self._caught:
            raise ModelError(f"{hook} of {self._name} fires more than once a pass. Choose another hook.")
        # A copy: later layers may work in place.
        self._caught[hook] = value.detach().reshape(*value.shape[:2], -1).clone(memory_format=torch.contiguous_format)
        if self._stops and len(self._caught) == self._n_hooks:
            raise _AllCaughtError


def through_bridge(bridge: Any, name: str, hooks: Sequence[str]) -> Forward:
    """Raises ModelError for a hook that TransformerLens fires only when switched on."""

    def call(ids: Tensor, logits: bool) -> Any:
        return bridge.forward(ids, return_type="logits" if logits else None, use_cache=False)

    forward = Forward(bridge, name, len(hooks), call, "eager")
    for hook in hooks:
        try:
            bridge.add_hook(hook, lambda value, hook, name=hook: forward.record(name, value))  # noqa: ARG005
        except ValueError as error:
            raise ModelError(f"{hook} of {name} never fires ({first_line(error)})") from error
    return forward


def through_modules(model: Any, name: str, places: Mapping[str, tuple[str, str]]) -> Forward:
    """`places`: hook -> (module, "hook_in" or "hook_out"). Raises AttributeError if there is no such module."""

    def call(ids: Tensor, logits: bool) -> Any:
        found = model(input_ids=ids, use_cache=False)
        return found.logits if logits else None

    forward = Forward(model, name, len(places), call, str(model.config._attn_implementation))
    for hook, (path, side) in places.items():
        module = model.get_submodule(path)
        if side == "hook_out":
            module.register_forward_hook(
                lambda module, args, out, name=hook: forward.record(name, out[0] if isinstance(out, tuple) else out)  # noqa: ARG005
            )
        else:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=hook: forward.record(name, (args or (kwargs["hidden_states"],))[0]),  # noqa: ARG005
                with_kwargs=True,
            )
    return forward


def module_places(bridge: Any, hooks: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """Where in the Hugging Face model each hook sits, as `through_modules` takes it; None if one sits inside a module.

    A guess from the names that the bridge gives its parts: compare what it catches.
    """
    places = {}
    for hook in hooks:
        path, _, side = bridge.hook_dict[hook].name.rpartition(".")
        part, found = bridge, ""
        for step in path.split("."):
            part = part.get_submodule(step)
            if (own := getattr(part, "name", None)) is not None:
                found = f"{found}.{own}" if found else own
        if side not in ("hook_in", "hook_out") or not found:
            return None
        places[hook] = (found, side)
    return places
