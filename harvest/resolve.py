"""From what is asked of a harvest to a recipe: the model's hooks, its device, the library versions."""

import importlib.metadata
import platform
from dataclasses import replace

from tcsae.harvest.capture import Capture
from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.corpus import Corpus
from tcsae.harvest.language_model import LanguageModel
from tcsae.shared.codecs import check_codec
from tcsae.shared.device import choose_device
from tcsae.shared.errors import ConfigError, ModelError
from tcsae.shared.manifest import HookRecipe, ModelRecipe, Recipe
from tcsae.shared.ranks import device_of, ranks

LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "datasets", "zarr", "numpy")


def resolve(
    config: HarvestConfig, model: LanguageModel, corpus: Corpus, stored: Recipe | None
) -> tuple[Recipe, Capture | None]:
    """The recipe that a config comes to, and the loaded model if it took that to find out.

    Names and widths of the hooks are the model's to say. A store that asked the same of the same model knows them.
    Raises ConfigError, ModelError or DataError.
    """
    capture = None
    asked = ModelRecipe(
        name=model.name,
        revision=model.revision,
        dtype=config.model.dtype,
        device=pick_device(config.model.device, stored),
        batch_size=config.model.batch_size,
    )
    check_dtype(asked.dtype, asked.device)
    if stored is not None and _same_hooks(stored, asked, config.hooks):
        hooks, pad_id = stored.hooks, stored.sequences.pad_id
        asked = replace(asked, attention=stored.model.attention)
    else:
        model.check_length(config.sequences.length)
        tokenizer = model.tokenizer()
        if config.sequences.prepend_bos and tokenizer.bos_token_id is None:
            raise ModelError(f"The tokenizer of {model.name} has no BOS token. Leave --prepend-bos out.")
        capture = load(model, config.hooks, asked)
        hooks = capture.hooks
        _check_places(hooks)
        asked = replace(asked, attention=capture.attention)
        pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if stored is None:
        corpus.check()
    recipe = Recipe(
        model=asked,
        corpus=corpus.recipe,
        sequences=replace(config.sequences, pad_id=pad_id),
        hooks=hooks,
        codec=config.codec,
        codec_error=check_codec(config.codec, config.codec_error),
        n_tokens=config.most_tokens,
        n_sequences=config.n_sequences,
        libraries={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        control=config.control,
    )
    return recipe, capture


def load(model: LanguageModel, hooks: tuple[str, ...], recipe: ModelRecipe) -> Capture:
    """The model, ready to run as a recipe says.

    Raises ConfigError if this machine has no such device; ModelError for the rest.
    """
    try:
        device_of(ranks(), choose_device(recipe.device))
    except ConfigError as error:
        raise ConfigError(f"{error} For a store of another device give another --store, too.") from error
    return Capture(model, hooks, recipe.batch_size, recipe.device, recipe.dtype)


def pick_device(asked: str, stored: Recipe | None) -> str:
    """ "auto" is the device of the store that is there, so that a sealed one is used anywhere; else the best here."""
    if asked != "auto":
        return asked
    return stored.model.device if stored is not None else choose_device(asked).type


def check_dtype(dtype: str, device: str) -> None:
    """Raises ConfigError for half precision on a CPU."""
    if device == "cpu" and dtype != "float32":
        raise ConfigError(
            f"--lm-dtype {dtype} on a CPU: matrix products in half precision take about 100 times as long there. "
            "Leave it at float32, or give --device cuda."
        )


def _check_places(hooks: tuple[HookRecipe, ...]) -> None:
    """Raises ConfigError if two hooks are one place under two names."""
    for i, hook in enumerate(hooks):
        for other in hooks[:i]:
            if hook.canonical == other.canonical:
                raise ConfigError(
                    f"--hook {other.requested} and {hook.requested} are the same place, {hook.canonical}. Give one."
                )


def _same_hooks(stored: Recipe, asked: ModelRecipe, hooks: tuple[str, ...]) -> bool:
    same_model = (stored.model.name, stored.model.revision) == (asked.name, asked.revision)
    return same_model and tuple(hook.requested for hook in stored.hooks) == hooks
