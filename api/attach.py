"""An SAE in a live model: read codes, ablate, clamp or steer latents, put the reconstruction in the activation's place.

    with tcsae.attach(sae, model) as live:
        live.clamp(12, 8.0)
        logits = model(tokens)
    live.code  # of the last pass

Works on TransformerLens models (HookedTransformer, TransformerBridge) and on plain Hugging Face ones.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tcsae.shared.base.errors import ConfigError, ModelError, unknown
from tcsae.shared.lm.tail import TailError, layers_name, residual_place
from tcsae.shared.sae.module import Edit, SparseAutoencoder, edit_difference
from tcsae.shared.sae.sparse import SparseCode


class LiveSae:
    """What `attach` yields: the code of the last pass, and edits of latents for the passes to come."""

    def __init__(self, sae: SparseAutoencoder, hook: str, splice: bool, error: bool, skip_first: int) -> None:
        self.sae, self.hook = sae, hook
        self.splice, self.error, self.skip_first = splice, error, skip_first
        self.shape: tuple[int, ...] = ()
        """(batch, positions) of the last pass."""
        self.edits: dict[int, Edit] = {}
        self._code: SparseCode | None = None
        self._n_before = 0
        """Positions that the model's cache holds from earlier passes."""

    @property
    def code(self) -> SparseCode:
        """The code of the last pass, before any edit: every position of every sequence, laid end to end.

        Raises ModelError if the hook has not fired yet.
        """
        if self._code is None:
            raise ModelError(f"{self.hook} has not fired: run the model inside `with tcsae.attach(...)`.")
        return self._code

    def dense(self) -> Float[Tensor, "batch position d_sae"]:
        """The same as a dense tensor."""
        return self.code.dense().reshape(*self.shape, self.sae.config.d_sae)

    def ablate(self, *latents: int) -> None:
        """Set latents to 0."""
        for latent in latents:
            self.clamp(latent, 0.0)

    def clamp(self, latent: int, value: float) -> None:
        """Set a latent to a value, wherever the SAE applies."""
        self._edit(latent, Edit("set", float(value)))

    def steer(self, latent: int, amount: float) -> None:
        """Add so many times the latent's decoder direction, whether it is active or not."""
        self._edit(latent, Edit("add", float(amount)))

    def reset(self) -> None:
        """Forget all edits."""
        self.edits.clear()

    def _edit(self, latent: int, edit: Edit) -> None:
        if not 0 <= latent < self.sae.config.d_sae:
            raise ConfigError(f"Latent {latent}: this SAE has latents 0 to {self.sae.config.d_sae - 1}.")
        self.edits[latent] = edit

    def _seen(self, activation: Tensor) -> Tensor:
        """What goes on through the model in the activation's place; the activation itself if nothing is to change."""
        sae, width = self.sae, self.sae.config.d_model
        flat = activation.reshape(*activation.shape[:2], -1)
        if flat.shape[2] != width:
            raise ModelError(
                f"{self.hook} is {flat.shape[2]} wide; the SAE reads d_model {width}. Attach it elsewhere."
            )
        self.shape = tuple(flat.shape[:2])
        x = flat.reshape(-1, width).to(sae.device, sae.dtype)
        self._code = code = sae.encode_sparse(x)
        if not self.splice and not self.edits:
            return activation
        spliced = self.splice and not self.error
        changed = (sae.decode_sparse(code, x) if spliced else x) + edit_difference(sae, code, x, self.edits)
        position = torch.arange(self.shape[1], device=flat.device) + self._n_before
        applies = (position >= self.skip_first)[None, :, None]
        return torch.where(applies, changed.reshape(flat.shape).to(flat), flat).reshape(activation.shape)


@contextmanager
def attach(
    sae: SparseAutoencoder,
    model: nn.Module,
    hook: str | None = None,
    *,
    splice: bool = False,
    error: bool = False,
    skip_first: int | None = None,
) -> Iterator[LiveSae]:
    """Let an SAE read a live model's activations at `hook` in every pass inside the `with`, and change them if asked.

    `hook`: a TransformerLens name, in a plain Hugging Face model blocks.N.hook_resid_pre or _post, or the path of a
    module; default: that of `sae.metadata`. Edits act on the activation alone: what the SAE does not reconstruct stays.
    `splice`: the (edited) reconstruction takes the activation's place; with `error`, what it misses is added again, so
    that without edits nothing changes. `skip_first`: first positions that are left as they are (default: those that the
    SAE was not trained on). Left padding counts as positions.
    Raises ConfigError without a hook, ModelError for one that the model has not, or of another width.
    """
    name = hook or sae.metadata.hook
    if name is None:
        raise ConfigError("The SAE does not say where it belongs. Give a hook, such as blocks.4.hook_resid_post.")
    if sae.config.reads_neighbours:
        raise ConfigError(
            "The codes of a crosscoder, a TFA or a persistent SAE depend on several positions: they cannot be read "
            "token by token."
        )
    first = sae.metadata.skip_first if skip_first is None else skip_first
    live = LiveSae(sae, name, splice, error, first)
    with ExitStack() as stack:
        inner = getattr(model, "original_model", model)
        inner = getattr(inner, "base_model", inner)  # generation may call the model's forward alone
        stack.callback(inner.register_forward_pre_hook(_counting(live), with_kwargs=True).remove)
        if hasattr(model, "hook_dict"):
            stack.enter_context(_through_transformer_lens(model, name, live))
        else:
            stack.callback(_through_module(model, name, live))
        yield live


def _through_transformer_lens(model: Any, name: str, live: LiveSae) -> Any:
    if name not in model.hook_dict:
        raise ModelError(unknown("hook", name, model.hook_dict).partition(" There is:")[0])
    return model.hooks(fwd_hooks=[(name, lambda activation, hook: live._seen(activation))])  # noqa: ARG005


def _through_module(model: nn.Module, name: str, live: LiveSae) -> Callable[[], None]:
    """Hook a module of a Hugging Face model; returns what takes the hook away."""
    module, reads_input = _place(model, name)
    if reads_input:

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (live._seen(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": live._seen(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def after(_: nn.Module, args: tuple, out: Any) -> Any:  # noqa: ARG001
        return (live._seen(out[0]), *out[1:]) if isinstance(out, tuple) else live._seen(out)

    return module.register_forward_hook(after).remove


def _place(model: Any, name: str) -> tuple[nn.Module, bool]:
    """(module, whether its input is meant)."""
    if place := residual_place(name):
        block, is_after = place
        try:
            layers: Any = model.get_submodule(layers_name(model))
        except (TailError, AttributeError) as error:
            raise ModelError(f"{type(model).__name__} has no list of layers: give a module's path as hook.") from error
        if block >= len(layers):
            raise ModelError(f"{name}: the model has blocks 0 to {len(layers) - 1}.")
        return layers[block], not is_after
    for owner in (model, getattr(model, "base_model", model)):
        try:
            return owner.get_submodule(name), False
        except AttributeError:
            continue
    raise ModelError(
        f"{type(model).__name__} has no module {name!r}. Give blocks.N.hook_resid_pre, blocks.N.hook_resid_post or the "
        "path of a module; other hooks are TransformerLens' alone."
    )


def has_place(model: nn.Module, name: str) -> bool:
    """Whether a plain Hugging Face model has this hook, as `attach` finds it there."""
    try:
        _place(model, name)
    except ModelError:
        return False
    return True


def _counting(live: LiveSae) -> Callable[[Any, tuple, dict], None]:
    """Tells, before each pass, how many positions came in earlier ones: in generation a pass is one position."""

    def before(_: Any, arguments: tuple, kwargs: dict) -> None:
        live._n_before = 0
        for value in (*arguments, *kwargs.values()):  # versions of transformers name it differently
            if hasattr(value, "get_seq_length"):
                live._n_before = int(value.get_seq_length())
        if (cache := kwargs.get("past_kv_cache")) is not None and hasattr(cache, "entries"):  # TransformerLens' own
            live._n_before = int(cache[0].past_keys.shape[1])

    return before
