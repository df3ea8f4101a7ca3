"""The tail: what the language model does after the hook, so that evaluation needs no language model.

The layers after the hook, re-indexed, with the final norm and the unembedding, are a smaller Hugging Face causal LM of
the same class. It is fed `inputs_embeds = activations` and saved as an ordinary checkpoint. What a family does to its
embeddings before the first layer has already happened to the activations, so it must not happen again: learned
position embeddings are zero in the tail. (Gemma scales inside its embedding module, which `inputs_embeds` bypasses.)
Other families may do something that this file does not know: `verify_tail` decides, and nobody saves a tail without it.

Sequences are left-aligned and attention is causal, so valid positions never see padding and no attention mask is
passed. Padding must be finite, though: a masked NaN is still NaN (0 * NaN).
"""

import copy
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tcsae.shared.base.errors import TcsaeError, broken_library
from tcsae.shared.base.files import write_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
else:  # importing transformers takes a second, and only make_tail and Tail.load need it
    PretrainedConfig, PreTrainedModel = object, nn.Module


TOLERANCE = 1e-3  # nats; rounding in float32 gave 1e-5 or less, every wrong tail met so far 0.5 or more

# A batch of 4096 tokens has 0.8 GB of logits at a vocabulary of 50,000. Logits are made in slices: 8 MiB of them stays
# clear of page faults on every allocation (twice as fast as 32 MiB), fewer than 128 rows would starve the matmul.
SLICE_LOGITS = 2**21
SLICE_MIN_TOKENS = 128

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_(resid_post|out|resid_pre|in)")


class TailError(TcsaeError):
    """There is no tail for this hook or model, and why; or a saved one cannot be loaded."""


def tail_start(canonical_hook: str, n_layers: int) -> int:
    """First layer of the tail, 0 to n_layers (n_layers: no layer is left, only the final norm and the unembedding).

    Raises TailError for a hook that is not the residual stream between two blocks of the model.
    """
    place = residual_place(canonical_hook)
    if place is None:
        raise TailError(
            f"{canonical_hook} is not a residual stream: only blocks.N.hook_resid_pre, hook_in, hook_resid_post "
            "and hook_out determine all that follows; harvest one of these for cross-entropy and KL."
        )
    block, is_after = place
    if block >= n_layers:
        raise TailError(f"{canonical_hook} is not in the model: it has blocks 0 to {n_layers - 1}; name one of these.")
    return block + is_after


def residual_place(hook: str) -> tuple[int, bool] | None:
    """(block, whether it is after the block rather than before it) of a hook of the residual stream between blocks."""
    match = _RESIDUAL.fullmatch(hook)
    return match and (int(match[1]), match[2] in ("resid_post", "out"))


def make_tail(model: PreTrainedModel, start_layer: int) -> PreTrainedModel:
    """The layers from `start_layer` on, the final norm and the unembedding: a causal LM of the model's own class.

    Copies, never aliases; float32, on the CPU, in eval mode, without gradients. Input and output embeddings are tied,
    so that a checkpoint holds the unembedding once and no input embedding. `model` is the plain Hugging Face model,
    before TransformerLens wraps its layers. Raises TailError where no such model can be built. Success proves
    nothing: see `verify_tail`.
    """
    from transformers import AutoModelForCausalLM

    assert not any("_original_component" in key for key in model.state_dict()), "TransformerLens has wrapped this model"
    kind = type(model).__name__
    if model.get_output_embeddings() is None:
        raise TailError(f"No tail: {kind} has no unembedding; use a causal language model.")
    layers = layers_name(model)
    wraps = model.config.get_text_config() is not model.config
    try:
        config = _tail_config(model.config.get_text_config(), start_layer)
        # Random weights are drawn and thrown away: the caller's random numbers must not depend on it.
        with torch.random.fork_rng(devices=[]), _quiet_transformers():
            tail = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        state = _tail_state(model, layers, start_layer)
        if wraps:
            state = _text_state(state, layers.rpartition(".")[0], layers_name(tail).rpartition(".")[0])
            tail.load_state_dict(state, strict=False, assign=False)
            missing = sorted(tail.state_dict().keys() - state.keys() - _embedding_keys(tail))
            if missing:
                raise ValueError(f"{missing[0]} is not in it")
        else:
            tail.load_state_dict(state, strict=True)
    except ImportError as error:
        raise broken_library(f"The tail of {kind}", error) from error
    except Exception as error:  # an architecture nobody has tried can fail in any way; the harvest goes on without
        raise TailError(f"No tail: {kind} cannot be cut at layer {start_layer} ({_brief(error)}).") from error
    if type(tail) is not type(model) and not wraps:
        raise TailError(f"No tail: transformers would load {kind} as {type(tail).__name__}; use a model it has.")
    with torch.no_grad():
        # Tied now: of the model's two matrices, this is the one to keep.
        tail.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
        for name, module in tail.named_modules():
            outside = not name.startswith(f"{layers_name(tail)}.")
            if isinstance(module, nn.Embedding) and outside and module is not tail.get_input_embeddings():
                module.weight.zero_()  # positions: added before the hook already
    return tail.eval().requires_grad_(False)


def verify_tail(
    tail: PreTrainedModel,
    activations: Float[Tensor, "batch position d_model"],
    logits: Float[Tensor, "batch position vocabulary"],
    lengths: Int[Tensor, " batch"],
) -> float:
    """Largest difference, in nats, between the tail's log-probabilities and the whole model's, at valid positions.

    `activations` at the hook and `logits` come from the whole model over real tokens, each sequence unpadded; beyond
    its length they are anything finite. The tail runs on them together, and on each sequence alone. Verify the tail as
    loaded, `Tail.load(path).model`: then the checkpoint itself is known to be good. Raises TailError when the
    difference is above TOLERANCE or not a number, or when the tail cannot be run at all.
    """
    valid = _valid_positions(lengths, activations.shape[1])
    if not valid.any():
        raise TailError("No tail: there is no token to verify it on; give at least one sequence that is not empty.")
    worst = torch.zeros(())
    try:
        runner = Tail(tail)
        expected = logits[valid.to(logits.device)]
        alone = [runner.hidden(x[None, :n])[0] for x, n in zip(activations, lengths.tolist(), strict=True) if n]
        for hidden in (runner.hidden(activations)[valid.to(runner.device)], torch.cat(alone)):
            for part, (repeated,) in runner.slices(hidden):
                whole = expected[part].to(repeated.device, torch.float32)
                worst = torch.maximum(worst, (repeated.log_softmax(-1) - whole.log_softmax(-1)).abs().max().cpu())
    except Exception as error:  # as in make_tail
        raise TailError(f"No tail: {type(tail).__name__} cannot run on activations ({_brief(error)}).") from error
    if not worst <= TOLERANCE:  # so that NaN is refused
        raise TailError(
            f"No tail: its log-probabilities differ from the whole model's by {worst:.2g} nats, {TOLERANCE:g} is "
            f"allowed; {type(tail).__name__} does more around its layers than is known, or ran in half precision."
        )
    return float(worst)


def save_tail(tail: PreTrainedModel, path: Path) -> None:
    """Writes the folder `path`: config.json and model.safetensors (float32), under a temporary name until complete.

    A tail that is there already is replaced.
    """

    # transformers lets rank 0 of a process group write, and nobody else; any rank may be the one that seals a store.
    object.__setattr__(tail, "should_save_on_this_rank", lambda *_, **__: True)

    def fill(folder: Path) -> None:
        with _quiet_transformers():
            tail.save_pretrained(folder, max_shard_size=2**62)  # one file, however large
        (folder / "generation_config.json").unlink(missing_ok=True)

    write_folder(path, fill)


class Tail:
    """A tail that is run, not trained: activations in, log-probabilities of the next token out.

    Weights take no gradient, inputs may. Any float dtype and device come in; float32 on `device` comes out. For a logit
    lens, `unembed` directions as they are, or through the final norm: `Tail(make_tail(tail.model, tail.n_layers))`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._unembedding = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.vocabulary: int = self._unembedding.weight.shape[0]
        self.slice_tokens: int = max(SLICE_MIN_TOKENS, SLICE_LOGITS // self.vocabulary)
        self.d_model: int = model.config.hidden_size
        self.n_layers: int = model.config.num_hidden_layers

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "Tail":
        """Reads a folder that `save_tail` wrote.

        Raises TailError if it is missing, incomplete or unreadable; InstallError if transformers cannot be imported.
        """
        if not (path / "config.json").is_file():
            raise TailError(f"No tail at {path}: there is no config.json; harvest the store again.")
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            with _quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(
                    path,
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except ImportError as error:
            raise broken_library(f"The tail at {path}", error) from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise TailError(f"The tail at {path} cannot be read ({_brief(error)}); harvest it again.") from error
        if wrong := sorted(str(key) for keys in report.values() for key in keys):
            # transformers only warns about these, and fills missing weights with random numbers
            raise TailError(f"The tail at {path} does not fit its config.json ({wrong[0]}); harvest it again.")
        return cls(model.to(device))

    @property
    def device(self) -> torch.device:
        return self._unembedding.weight.device

    def hidden(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        """Activations at the hook to final hidden states (after the final norm), ready for `unembed`."""
        inputs = x.to(self.device, torch.float32)
        return self.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def unembed(
        self, hidden: Float[Tensor, "*axes d_model"], out: Float[Tensor, "*axes vocabulary"] | None = None
    ) -> Float[Tensor, "*axes vocabulary"]:
        """Final hidden states to logits, soft-capped where the family does so (Gemma 2: arXiv:2408.00118, 2).

        `out` takes the result, without gradients.
        """
        if out is None:
            logits = self._unembedding(hidden)
            return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap
        torch.mm(hidden, self._unembedding.weight.T, out=out)
        if self._unembedding.bias is not None:
            out.add_(self._unembedding.bias)
        return out if self._softcap is None else out.div_(self._softcap).tanh_().mul_(self._softcap)

    def logits(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position vocabulary"]:
        """All logits at once: for small inputs. `slices` is for the rest."""
        return self.unembed(self.hidden(x))

    def slices(
        self, *hidden: Float[Tensor, "tokens d_model"]
    ) -> Iterator[tuple[slice, tuple[Float[Tensor, "part vocabulary"], ...]]]:
        """Logits of one or several batches of final hidden states, side by side, a few tokens at a time.

        Yields the slice of tokens and one block of logits per batch. For cross-entropy, KL divergence and top-k, which
        reduce over the vocabulary and never need all logits at once. Write the results into a tensor allocated
        before: small ones kept from slice to slice fragment the heap (measured: 0.7 GB at a vocabulary of 50,000).
        """
        for start in range(0, hidden[0].shape[0], self.slice_tokens):
            part = slice(start, start + self.slice_tokens)
            yield part, tuple(self.unembed(one[part]) for one in hidden)


def _valid_positions(lengths: Int[Tensor, " batch"], n_positions: int) -> Bool[Tensor, "batch {n_positions}"]:
    """True at the first `lengths[i]` positions of sequence i."""
    return torch.arange(n_positions, device=lengths.device) < lengths[:, None]


def layers_name(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers, `gpt_neox.layers` for one: the outermost list with as many entries."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    text = model.get_decoder()  # of a model of text and images, its language model
    inside = {id(module) for module in (text if isinstance(text, nn.Module) else model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and id(module) in inside:
            return name
    raise TailError(f"No tail: {type(model).__name__} has no list of its {n_layers} layers; use a decoder-only model.")


def _tail_config(whole: PretrainedConfig, start_layer: int) -> PretrainedConfig:
    """The same architecture from `start_layer` on. What is listed per layer (attention patterns) is cut likewise."""
    config = copy.deepcopy(whole)
    n_layers = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, value[start_layer:])
    config.num_hidden_layers = n_layers - start_layer
    config.tie_word_embeddings = True
    return config


def _tail_state(model: PreTrainedModel, layers: str, start_layer: int) -> dict[str, Tensor]:
    """The model's weights with the layers renumbered from `start_layer`; the earlier layers left out."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(f"{layers}."):
            index, rest = key.removeprefix(f"{layers}.").split(".", 1)
            if int(index) < start_layer:
                continue
            key = f"{layers}.{int(index) - start_layer}.{rest}"
        state[key] = value
    return state


def _text_state(state: dict[str, Tensor], wrapped: str, owner: str) -> dict[str, Tensor]:
    """Of a model of text and images, the language model's part: `wrapped` is its name there, `owner` in the tail."""
    return {
        f"{owner}.{key.removeprefix(f'{wrapped}.')}": value
        for key, value in state.items()
        if key.startswith(f"{wrapped}.")
    }


def _embedding_keys(tail: PreTrainedModel) -> set[str]:
    """Keys of the tied embeddings, which are set apart."""
    embeddings = (tail.get_input_embeddings(), tail.get_output_embeddings())
    return {f"{name}.weight" for name, module in tail.named_modules() if any(module is one for one in embeddings)}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for a second's work, no warning where we raise. The switches are global, so they are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _brief(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
