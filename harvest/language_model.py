"""Which language model: the embedded one, a local folder, or one of the Hugging Face Hub. No weights are loaded."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcsae.harvest.documents import HubError, digest_files, first_line, hub_commit, not_found
from tcsae.shared.base.errors import ConfigError, ModelError
from tcsae.shared.lm.tail import TailError

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

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`."""
        return {} if self.revision.startswith("sha256:") else {"revision": self.revision}

    def config(self) -> Any:
        """The model's Hugging Face config. Raises ModelError if `transformers` does not know it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.source, **self.options)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"The model {self.name} has no config that can be read ({first_line(error)}).") from error

    def check_length(self, length: int) -> None:
        """Raises ModelError if sequences of `length` positions do not fit into the model's context."""
        config = self.config().get_text_config()
        limits = [getattr(config, name, None) for name in _CONTEXT_FIELDS]
        if found := [limit for limit in limits if isinstance(limit, int)]:
            limit = found[0]
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
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"The model {self.name} has no tokenizer that can be loaded ({first_line(error)}). "
                "Put its tokenizer files beside config.json."
            ) from error
        return tokenizer


def find_model(name: str, revision: str | None = None) -> LanguageModel:
    """Find a model and name its revision exactly.

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
            EMBEDDED if name == EMBEDDED else path.resolve().name, str(path), digest_files(files, path)
        )
    try:
        return LanguageModel(name, name, hub_commit("model", name, revision))
    except HubError as error:
        known = [EMBEDDED, "a local folder with config.json", "a Hub id (as in owner/name)"]
        raise ModelError(not_found("model", name, name, known, error)) from error


# A language model's weights, loaded: as TransformerLens sees it, or as Hugging Face has it.


def load_bridge(model: LanguageModel, device: str = "cpu", dtype: str = "float32") -> Any:
    """TransformerLens' bridge around the model, with eager attention. Raises ModelError."""
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with quiet():
            untrained = None
            if model.weights_seed is not None:
                untrained = _untrained(model, dtype, {"attn_implementation": "eager"}).to(device)
            bridge = TransformerBridge.boot_transformers(
                model.source,
                device=device,
                dtype=getattr(torch, dtype),
                # Otherwise every layer's attention weights are kept until the pass ends.
                hf_config_overrides={"output_attentions": False},
                hf_model=untrained,
                **model.options,
            )
            return bridge.eval()
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ModelError(f"TransformerLens cannot load the model {model.name} ({first_line(error)}).") from error


def load_plain(model: LanguageModel, device: str = "cpu", dtype: str = "float32") -> Any:
    """The Hugging Face model itself, as no bridge has touched it.

    Its attention is what `transformers` picks, `sdpa` where that computes what the model asks for. Raises TailError if
    it is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if getattr(model.config().get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa leaves the soft cap out (Gemma 2)
    try:
        with quiet():
            if model.weights_seed is not None:
                return _untrained(model, dtype, options).to(device)
            options |= {"dtype": getattr(torch, dtype), **model.options}
            return AutoModelForCausalLM.from_pretrained(model.source, **options).eval().to(device)
    except (OSError, ValueError) as error:
        raise TailError(f"No tail: {model.name} is no causal language model ({first_line(error)}).") from error


def _untrained(model: LanguageModel, dtype: str, options: dict[str, Any]) -> Any:
    """The same architecture with the weights that `transformers` begins to train it from, drawn with the model's seed.

    Drawn on the CPU in float32, so that every device and dtype gets the same.
    """
    from transformers import AutoModelForCausalLM

    assert model.weights_seed is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.weights_seed)
        found = AutoModelForCausalLM.from_config(model.config(), dtype=torch.float32, **options)
    return found.eval().to(getattr(torch, dtype))


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
