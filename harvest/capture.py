"""The language model up to the deepest hook: tokens in, activations out."""

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.sources import first_line
from tcsae.shared.errors import ModelError
from tcsae.shared.manifest import HookRecipe
from tcsae.shared.tail import TailError

_FAMILIAR = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
_PROBES = (5, 7)
"""Lengths of the first two passes. What is as long as the sequence must follow both; an attention pattern does not."""


class _AllCaughtError(Exception):
    """Every hook has fired: the rest of the forward pass is not needed."""


class Capture:
    """A language model whose forward pass stops as soon as all hooks have fired.

    Hooks are TransformerLens names; aliases are resolved (`blocks.4.hook_resid_post` is `blocks.4.hook_out`).
    Stopping at the last firing, and not at a layer, makes no assumption about where in a block a hook sits: under
    `stop_at_layer=N`, `blocks.N.hook_resid_pre` never fires, silently.

    Raises ModelError if the model cannot be loaded, if a hook is unknown or does not fire exactly once in a forward
    pass, or if what it sees is not one vector a position.
    """

    def __init__(self, model: LanguageModel, hooks: Sequence[str], batch_size: int, device: str = "cpu") -> None:
        self.model = model
        self.batch_size = batch_size
        self.device = device
        self._bridge = _boot(model, device)
        self._caught: dict[str, Tensor] = {}
        self._stops = False
        points = self._bridge.hook_dict
        for name in hooks:
            if name not in points:
                raise ModelError(_unknown_hook(name, model.name, points, self.n_layers))
            try:
                self._bridge.add_hook(name, self._recorder(name, len(hooks)))
            except ValueError as error:  # a hook that TransformerLens fires only when switched on
                raise ModelError(f"{name} of {model.name} never fires ({first_line(error)})") from error
        widths = self._probe(hooks)
        self.hooks = tuple(
            HookRecipe(requested=name, canonical=points[name].name, d_model=widths[name]) for name in hooks
        )
        self._stops = True

    @property
    def n_layers(self) -> int:
        """Blocks of the whole model."""
        return int(self._bridge.cfg.n_layers)

    def run(
        self, tokens: Int[ndarray, "n sequence_length"], lengths: Int[ndarray, " n"]
    ) -> dict[str, Float[ndarray, "n sequence_length d_model"]]:
        """float32 activations of every hook; heads are flattened; positions beyond a length hold anything finite.

        Sequences go through the model in order of length, `batch_size` at a time, cut to the longest of the batch, so
        that short documents do not pay for padding. Attention is causal: what is cut off changes nothing.
        """
        found = {hook.requested: np.zeros((*tokens.shape, hook.d_model), np.float32) for hook in self.hooks}
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            longest = int(lengths[rows].max())
            for name, values in self._forward(tokens[rows, :longest]).items():
                found[name][rows, :longest] = values.cpu().numpy()
        return found

    def run_whole(
        self, tokens: Int[ndarray, "n position"]
    ) -> tuple[dict[str, Float[Tensor, "n position d_model"]], Float[Tensor, "n position vocabulary"]]:
        """Activations of every hook and the logits, from one pass through the whole model."""
        self._stops = False
        try:
            self._caught = {}
            with torch.inference_mode():
                logits = self._bridge.forward(self._ids(tokens), return_type="logits", use_cache=False)
            return {name: values.clone() for name, values in self._caught.items()}, logits
        finally:
            self._stops = True

    def _forward(self, tokens: Int[ndarray, "n position"]) -> dict[str, Float[Tensor, "n position d_model"]]:
        self._caught = {}
        try:
            with torch.inference_mode():
                self._bridge.forward(self._ids(tokens), return_type=None, use_cache=False)
        except _AllCaughtError:
            pass
        if missing := [hook.requested for hook in self.hooks if hook.requested not in self._caught]:
            raise ModelError(f"{', '.join(missing)} of {self.model.name} did not fire in a batch. Choose another hook.")
        return self._caught

    def _ids(self, tokens: Int[ndarray, "n position"]) -> Int[Tensor, "n position"]:
        return torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(self.device)

    def _recorder(self, name: str, n_hooks: int) -> Callable[..., None]:
        def record(value: Tensor, hook: object) -> None:  # noqa: ARG001
            if name in self._caught:
                raise ModelError(f"{name} of {self.model.name} fires more than once a pass. Choose another hook.")
            # A copy: later layers may work in place.
            self._caught[name] = value.detach().reshape(*value.shape[:2], -1).to(torch.float32, copy=True)
            if self._stops and len(self._caught) == n_hooks:
                raise _AllCaughtError

        return record

    def _probe(self, hooks: Sequence[str]) -> dict[str, int]:
        """Width of each hook's vectors, from two short passes through the whole model."""
        shapes = []
        for length in _PROBES:
            self._caught = {}
            with torch.inference_mode():
                self._bridge.forward(self._ids(np.ones((2, length), np.int64)), return_type=None, use_cache=False)
            shapes.append({name: tuple(value.shape) for name, value in self._caught.items()})
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
        return {name: shapes[0][name][2] for name in hooks}


def load_plain(model: LanguageModel) -> Any:
    """The Hugging Face model itself, in float32 on the CPU, as no bridge has touched it.

    Raises TailError if it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32, **model.options).eval()
    except (OSError, ValueError) as error:
        raise TailError(f"No tail: {model.name} is no causal language model ({first_line(error)}).") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers` from drawing bars and warning on stderr; its switch is global, so it is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _boot(model: LanguageModel, device: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with quiet():
            bridge = TransformerBridge.boot_transformers(
                model.source,
                device=device,
                dtype=torch.float32,
                # Otherwise every layer's attention weights are kept until the pass ends.
                hf_config_overrides={"output_attentions": False},
                **model.options,
            )
            return bridge.eval()
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ModelError(f"TransformerLens cannot load the model {model.name} ({first_line(error)}).") from error


def _unknown_hook(asked: str, model: str, known: Collection[str], n_layers: int) -> str:
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    block = re.match(r"blocks\.(\d+)\.", near[0]) if near else None
    prefix = block[0] if block else f"blocks.{n_layers - 1}."
    names = [prefix + name for name in _FAMILIAR if prefix + name in known]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"Unknown hook {asked!r}.{hint} {model} has blocks 0 to {n_layers - 1}, each with, for example, "
        f"{', '.join(names)}, and what else TransformerLens names in it ({len(known)} hooks in all)."
    )
