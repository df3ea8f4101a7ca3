"""The language model: the embedded one, a local folder, or one of the Hugging Face Hub; its tokenizer and weights."""

import copy
import re
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tcsae.harvest.revisions import LOCAL, HubError, digest_files, first_line, not_found, pinned_commit
from tcsae.shared.base.errors import ConfigError, ModelError, broken_library
from tcsae.shared.lm.tail import TailError
from tcsae.shared.store.format import RANDOM_WEIGHTS, ControlRecipe, ModelRecipe, Recipe

EMBEDDED = "embedded"
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}
"""Endings of the files that decide what a checkpoint folder computes, or how its tokenizer cuts text."""


@dataclass(frozen=True)
class LanguageModel:
    """A model that was found. Use `find_model`."""

    name: str
    source: str
    """What `from_pretrained` takes: a folder, or a Hub id."""
    revision: str
    """A commit of the Hub, or "sha256:..." of a local folder's files."""
    weights_seed: int | None = None
    """None: the weights that it was trained to. Otherwise weights as they are before training, drawn with this seed."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside the weights may run."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`."""
        revision = {} if self.revision.startswith(LOCAL) else {"revision": self.revision}
        return revision | {"trust_remote_code": self.trust_remote_code}

    def config(self) -> Any:
        """The model's Hugging Face config. Raises ModelError if `transformers` does not know it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.source, **self.options)
        except ImportError as error:
            raise broken_library(f"The model {self.name}", error) from error
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"The model {self.name} has no config that can be read ({first_line(error)}).{self._code_hint(error)}"
            ) from error

    def n_vocabulary(self) -> int:
        """Rows of the embedding: token ids are below it. Raises ModelError for a model of something else than text."""
        n = getattr(self.config().get_text_config(), "vocab_size", None)
        if not isinstance(n, int) or n < 1:
            raise ModelError(f"The model {self.name} has no vocabulary in its config: no language model. Give another.")
        return n

    def check_length(self, length: int) -> None:
        """Raises ModelError if sequences of `length` positions do not fit into the model's context."""
        config = self.config().get_text_config()
        limits = [getattr(config, name, None) for name in _CONTEXT_FIELDS]
        if context_lengths := [limit for limit in limits if isinstance(limit, int)]:
            limit = context_lengths[0]
            if length > limit:
                raise ModelError(
                    f"A sequence length of {length} is over the context of {self.name}, {limit} positions. "
                    f"Give --sequence-length {limit} or less."
                )

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError if it has none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, **self.options)
            # Where files are missing, transformers may make one that knows no word.
            if not tokenizer("text", add_special_tokens=False)["input_ids"]:
                raise ValueError("its vocabulary is empty")
        except ImportError as error:
            raise broken_library(f"The tokenizer of the model {self.name}", error) from error
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"The model {self.name} has no tokenizer that can be loaded ({first_line(error)}). "
                f"Put its tokenizer files beside config.json.{self._code_hint(error)}"
            ) from error
        return tokenizer

    def _code_hint(self, error: Exception) -> str:
        if self.trust_remote_code or "trust_remote_code" not in str(error):
            return ""
        return " It comes with Python code. If you have read that code, run it: --trust-remote-code."


def find_model(
    name: str, revision: str | None = None, stored: ModelRecipe | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Find a model and name its revision exactly.

    `stored` is the model of the store that is there: its commit stands where the same model is asked for.
    Raises ModelError: unknown, unreachable, or a folder without a model; ConfigError: a revision of a local folder.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED or path.is_dir():
        if revision is not None:
            raise ConfigError(f"{name} is a local folder and has no revision {revision!r}. Leave --revision out.")
        if name == EMBEDDED:
            from tcsae.data.model import embedded_model_path

            path = embedded_model_path()
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json: no Hugging Face model. Give another --model.")
        files = [file for file in path.iterdir() if file.is_file() and file.suffix in _MODEL_FILES]
        return LanguageModel(
            EMBEDDED if name == EMBEDDED else path.resolve().name,
            str(path),
            digest_files(files, path),
            trust_remote_code=trust_remote_code,
        )
    pinned = stored.revision if stored is not None and stored.name == name else LOCAL
    try:
        commit = pinned_commit("model", name, revision, None if pinned.startswith(LOCAL) else pinned)
        return LanguageModel(name, name, commit, trust_remote_code=trust_remote_code)
    except HubError as error:
        known = [EMBEDDED, "a local folder with config.json", "a Hub id (as in owner/name)"]
        raise ModelError(not_found("model", name, name, known, error)) from error


def stored_model(recipe: Recipe, given: str | None = None) -> LanguageModel:
    """The language model that a store was harvested from, as its control has it. `given`: where it lies now.

    Raises ModelError if it is not to be found, or another.
    """
    stored = recipe.model
    try:
        model = find_model(given or stored.name, None, stored)
    except ModelError as error:
        raise ModelError(f"{error} Where it is now, say with --model.") from error
    if model.revision != stored.revision:
        raise ModelError(
            f"{given or stored.name} has revision {model.revision[:19]}; the store was harvested from {stored.name}, "
            f"revision {stored.revision[:19]}. Give that model: --model"
        )
    return controlled(model, recipe.control)


def controlled(model: LanguageModel, control: ControlRecipe | None) -> LanguageModel:
    """The model, with the weights that a store's control calls for."""
    if control is None or control.kind != RANDOM_WEIGHTS:
        return model
    return replace(model, weights_seed=control.seed)


def load_bridge(model: LanguageModel, device: str = "cpu", dtype: str = "float32", plain: Any = None) -> Any:
    """TransformerLens' bridge around the model, with eager attention. Raises ModelError.

    Around a twin of `plain`, which holds the same weights, where the bridge would load a model of that class; else the
    bridge loads its own. Weights of a seed, which it cannot draw, always come in a twin.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if model.weights_seed is not None and plain is None:
        with suppress(TailError):
            plain = load_plain(model, device, dtype)
    twin = _twin(plain)
    if model.weights_seed is not None and twin is None:
        raise ModelError(f"{model.name} cannot be run with random weights: transformers makes no such model anew.")
    try:
        with quiet(), nothing_installed():
            return TransformerBridge.boot_transformers(
                model.source,
                device=device,
                dtype=getattr(torch, dtype),
                # Otherwise every layer's attention weights are kept until the pass ends.
                hf_config_overrides={"output_attentions": False},
                hf_model=twin,
                **model.options,
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ModelError(f"TransformerLens cannot load the model {model.name} ({first_line(error)}).") from error


def load_plain(model: LanguageModel, device: str = "cpu", dtype: str = "float32") -> Any:
    """The Hugging Face model itself, as no bridge has touched it.

    Its attention is what `transformers` picks, `sdpa` where that computes what the model asks for. Raises TailError if
    it is no causal language model, alone or inside a model of text and images.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    options: dict[str, Any] = {}
    config = model.config()
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa leaves the soft cap out (Gemma 2)
    kind = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    try:
        with quiet():
            if model.weights_seed is not None:
                return _untrained(model, kind, dtype, options).to(device)
            options |= {"dtype": getattr(torch, dtype), **model.options}
            return kind.from_pretrained(model.source, **options).eval().to(device)
    except ImportError as error:
        raise broken_library(f"The model {model.name}", error) from error
    except (OSError, ValueError) as error:
        raise TailError(f"No tail: {model.name} is no causal language model ({first_line(error)}).") from error


def _untrained(model: LanguageModel, kind: Any, dtype: str, options: dict[str, Any]) -> Any:
    """The same architecture with the weights that `transformers` begins to train it from, drawn with the model's seed.

    Drawn on the CPU in float32, so that every device and dtype gets the same.
    """
    assert model.weights_seed is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.weights_seed)
        untrained = kind.from_config(
            model.config(), dtype=torch.float32, trust_remote_code=model.trust_remote_code, **options
        )
    return untrained.eval().to(getattr(torch, dtype))


def _twin(plain: Any) -> Any:
    """A copy of the modules of a Hugging Face model, around the same weights: the bridge rebuilds the modules.

    None where the bridge would load another class, or where the modules cannot be copied.
    """
    if plain is None or type(plain).__name__ not in (plain.config.architectures or [type(plain).__name__]):
        return None
    weights = [*plain.parameters(), *plain.buffers()]
    try:
        return copy.deepcopy(plain, {id(weight): weight for weight in weights})
    except (TypeError, RuntimeError, AttributeError):
        return None


def tail_parameters(model: Any, start_layer: int) -> int:
    """Numbers that a tail from `start_layer` on holds: the later layers, what is outside the layers, one embedding."""
    total = 0
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        total += parameter.numel() * (layer is None or int(layer[1]) >= start_layer)
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    if None in embeddings or embeddings[0].weight is embeddings[1].weight:
        return total
    return total - embeddings[0].weight.numel()


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Keep TransformerLens from running `pip install torchvision` for a model of text and images.

    It would put another torch into the user's environment; the image processor that it wants is not used here.
    """
    call = subprocess.check_call

    def refuse(command: Any, *rest: Any, **options: Any) -> int:
        if "torchvision" in command:
            raise OSError("nothing is installed")  # which it takes for a failed installation
        return call(command, *rest, **options)

    subprocess.check_call = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.check_call = call


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
