"""A language model's weights, loaded: as TransformerLens sees it, or as Hugging Face has it."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.sources import first_line
from tcsae.shared.errors import ModelError
from tcsae.shared.tail import TailError


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
