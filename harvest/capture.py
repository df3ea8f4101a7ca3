"""The language model up to the deepest hook: tokens in, activations out."""

import contextlib
import difflib
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.harvest.assumptions import TOLERANCE, is_causal
from tcsae.harvest.language_model import LanguageModel, load_bridge, load_plain, tail_parameters
from tcsae.harvest.revisions import first_line
from tcsae.shared.base.device import Readout, to_device
from tcsae.shared.base.errors import ModelError
from tcsae.shared.lm.tail import TailError, tail_start
from tcsae.shared.store.format import HookRecipe


class _AllCaughtError(Exception):
    """Every hook has fired: the rest of the forward pass is not needed."""


class Forward:
    """A forward pass that ends when all hooks have fired: [n, position] ids in, one [n, position, d_model] a hook out.

    Through TransformerLens' bridge, or through the modules of the Hugging Face model that the bridge wraps, which is
    faster and holds wherever a hook is a module's input or output.

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
        output = model(input_ids=ids, use_cache=False)
        return output.logits if logits else None

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
        part, module = bridge, ""
        for step in path.split("."):
            part = part.get_submodule(step)
            if (name := getattr(part, "name", None)) is not None:
                module = f"{module}.{name}" if module else name
        if side not in ("hook_in", "hook_out") or not module:
            return None
        places[hook] = (module, side)
    return places


_FAMILIAR = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
IN_FLIGHT = 3
"""Batches whose activations are not read yet: of 32 sequences at width 2304, 57 MB each in bfloat16."""
_PROBES = (5, 7)
"""Lengths of the first two passes. What is as long as the sequence must follow both; an attention pattern does not."""


class Capture:
    """A language model whose forward pass stops as soon as all hooks have fired.

    Hooks are TransformerLens names; aliases are resolved (`blocks.4.hook_resid_post` is `blocks.4.hook_out`). Where all
    hooks are inputs or outputs of modules of the Hugging Face model, that model runs by itself, with the attention that
    `transformers` prefers (`attention` says which), once its activations have proved equal to the bridge's. Else the
    bridge runs. Either way the weights are loaded once, where `transformers` has a causal model for them.

    Raises ModelError if the model cannot be loaded, if a hook is unknown or does not fire exactly once in a forward
    pass, if what it sees is not one vector a position, or if that vector depends on other sequences.
    """

    def __init__(
        self, model: LanguageModel, hooks: Sequence[str], batch_size: int, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.plain: Any = None
        """The Hugging Face model, in `dtype` on `device`; None where there is no causal one."""
        with contextlib.suppress(TailError):
            self.plain = load_plain(model, device, dtype)
        versions = self._weight_versions()
        bridge = load_bridge(model, device, dtype, self.plain)
        if self._weight_versions() != versions:  # the bridge has worked in place on weights that both hold
            self.plain = load_plain(model, device, dtype)
        self.n_layers = int(bridge.cfg.n_layers)
        """Blocks of the whole model."""
        points = bridge.hook_dict
        for name in hooks:
            if name not in points:
                raise ModelError(_unknown_hook(name, model.name, points, self.n_layers))
            check_reads_text(name, bridge, model.name)
        self._forward = through_bridge(bridge, model.name, hooks)
        n_vocabulary = int(bridge.cfg.d_vocab)
        widths, ids, expected = self._probe(hooks, n_vocabulary)
        self.hooks = tuple(
            HookRecipe(requested=name, canonical=points[name].name, d_model=widths[name]) for name in hooks
        )
        places = module_places(bridge, hooks)
        if places and self.plain is not None:
            self._forward = self._without_bridge(places, ids, expected) or self._forward
        self.causal = is_causal(
            lambda ids: self._forward(self._ids(ids), stops=False), model.name, n_vocabulary, batch_size, dtype
        )
        """Whether sequences can be padded; else those of one length are a batch."""

    @property
    def attention(self) -> str:
        """The attention implementation that runs, as `transformers` names it."""
        return self._forward.attention

    def widen(self) -> None:
        """Bring the weights to float32, in place: tails are made and checked in it, of the weights as they ran."""
        for model in (self._forward.model, self.plain):
            if model is not None:
                model.float()
        self.dtype = "float32"

    def tail_bytes(self) -> int:
        """About what the tails of all hooks take on disk (float32)."""
        model, total = getattr(self._forward.model, "original_model", self._forward.model), 0
        for hook in self.hooks:
            with contextlib.suppress(TailError):
                total += 4 * tail_parameters(model, tail_start(hook.canonical, self.n_layers))
        return total

    def run(
        self, tokens: Int[ndarray, "n sequence_length"], lengths: Int[ndarray, " n"]
    ) -> dict[str, Float[ndarray, "n sequence_length d_model"]]:
        """float32 activations of every hook; heads are flattened; positions beyond a length hold anything finite.

        Sequences go through the model in order of length, in equal batches of at most `batch_size`, cut to the longest
        of the batch, so that short documents do not pay for padding. Attention is causal: what is cut off changes
        nothing. Where it is not, no batch holds two lengths. A GPU is handed IN_FLIGHT batches before the first is
        waited for, so that it always has the next one.
        """
        activations = {hook.requested: np.zeros((*tokens.shape, hook.d_model), np.float32) for hook in self.hooks}
        waiting: deque[_OnTheWay] = deque()
        for rows in self._batches(lengths):
            longest = int(lengths[rows].max())
            waiting.append(_OnTheWay(rows, self._batch(tokens[rows, :longest])))
            if len(waiting) == IN_FLIGHT:
                waiting.popleft().into(activations)
        for sent in waiting:
            sent.into(activations)
        return activations

    def _batches(self, lengths: Int[ndarray, " n"]) -> Iterator[Int[ndarray, " batch"]]:
        """Rows of sequences that go through the model at once."""
        order = np.argsort(lengths, kind="stable")
        groups = [order] if self.causal else np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
        for group in groups:
            yield from np.array_split(group, max(1, -(-len(group) // self.batch_size)))

    def run_whole(
        self, tokens: Int[ndarray, "n position"]
    ) -> tuple[dict[str, Float[Tensor, "n position d_model"]], Float[Tensor, "n position vocabulary"]]:
        """Activations of every hook and the logits, from one pass through the whole model."""
        return self._forward.whole(self._ids(tokens))

    def _batch(self, tokens: Int[ndarray, "n position"]) -> dict[str, Float[Tensor, "n position d_model"]]:
        caught = self._forward(self._ids(tokens))
        if missing := [hook.requested for hook in self.hooks if hook.requested not in caught]:
            raise ModelError(f"{', '.join(missing)} of {self.model.name} did not fire in a batch. Choose another hook.")
        return caught

    def _ids(self, tokens: Int[ndarray, "n position"]) -> Int[Tensor, "n position"]:
        return to_device(np.ascontiguousarray(tokens, np.int64), torch.device(self.device))

    def _weight_versions(self) -> list[int]:
        return [] if self.plain is None else [weight._version for weight in self.plain.parameters()]

    def _probe(self, hooks: Sequence[str], n_vocabulary: int) -> tuple[dict[str, int], ndarray, dict[str, Tensor]]:
        """Width of each hook's vectors, from two short passes through the whole model; tokens and activations of the
        second.
        """
        shapes, ids = [], np.zeros((2, 0), np.int64)
        caught: dict[str, Tensor] = {}
        for length in _PROBES:
            ids = np.random.default_rng(0).integers(0, n_vocabulary, (2, length))
            caught = self._forward(self._ids(ids), stops=False)
            shapes.append({name: tuple(value.shape) for name, value in caught.items()})
        for name in hooks:
            seen = [shape.get(name) for shape in shapes]
            if None in seen:
                raise ModelError(f"{name} of {self.model.name} does not fire in a forward pass. Choose another hook.")
            widths = {shape[2] for shape in seen if shape is not None}
            if [shape[:2] for shape in seen if shape is not None] != [(2, n) for n in _PROBES] or len(widths) != 1:
                raise ModelError(
                    f"{name} of {self.model.name} is not one vector a position: its shape is {seen[0]} for 2 sequences "
                    f"of {_PROBES[0]}. Choose another hook, for example blocks.{self.n_layers - 1}.hook_resid_post."
                )
        return {name: shapes[0][name][2] for name in hooks}, ids, caught

    def _without_bridge(
        self, places: dict[str, tuple[str, str]], ids: ndarray, expected: dict[str, Tensor]
    ) -> Forward | None:
        """The plain model with hooks at `places`, if it catches what the bridge did."""
        try:
            forward = through_modules(self.plain, self.model.name, places)
            caught = forward(self._ids(ids))
        except (ModelError, AttributeError, KeyError):  # another structure than guessed
            return None
        for name, value in expected.items():
            scale = float(value.abs().max())
            other = caught.get(name)
            if other is None or other.shape != value.shape:
                return None
            if not float((other.float() - value.float()).abs().max()) <= TOLERANCE[self.dtype] * scale:
                return None
        return forward


class _OnTheWay:
    """A batch's activations, being copied to where NumPy can read them."""

    def __init__(self, rows: ndarray, values: dict[str, Tensor]) -> None:
        self._rows = rows
        self._values = {name: Readout(value, "capture") for name, value in values.items()}

    def into(self, activations: dict[str, ndarray]) -> None:
        """Wait for the copy, then put each sequence into its row."""
        for name, readout in self._values.items():
            value = readout.values()
            activations[name][self._rows, : value.shape[1]] = value.float().numpy()


def check_reads_text(hook: str, bridge: Any, model: str) -> None:
    """Raises ModelError for a hook in the decoder of an encoder-decoder: its input would have to be made up."""
    config = getattr(bridge.original_model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hook.startswith("decoder"):
        raise ModelError(
            f"{hook} of {model} is in the decoder of an encoder-decoder model, which reads the answer, not the text. "
            f"Give a hook of its encoder: {hook.replace('decoder', 'encoder', 1)}."
        )


def _unknown_hook(asked: str, model: str, known: Collection[str], n_layers: int) -> str:
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    blocks = sorted({match[1] for name in known if (match := re.match(r"(\w*blocks)\.\d+\.", name))})
    block = re.match(r"(\w*blocks)\.\d+\.", near[0]) if near else None
    stack = block[1] if block else (blocks or ["blocks"])[0]
    last = max((int(name.split(".")[1]) for name in known if name.startswith(f"{stack}.")), default=n_layers - 1)
    prefix = block[0] if block else f"{stack}.{last}."
    inside = [name for name in known if name.startswith(prefix)]
    names = [name for familiar in _FAMILIAR if (name := prefix + familiar) in known] or inside[:6]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    called = "blocks" if stack == "blocks" else f"{' and '.join(blocks)}, each with blocks"
    return (
        f"Unknown hook {asked!r}.{hint} {model} has {called} 0 to {last}, each with, for example, "
        f"{', '.join(names)}, and what else TransformerLens names in it ({len(known)} hooks in all)."
    )
