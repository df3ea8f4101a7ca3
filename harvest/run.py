"""The harvest: corpus -> sequences -> the language model up to the hooks -> a sealed activation store.

The same call, made again after a kill, goes on from what is on disk and ends with the same bytes.
"""

import importlib.metadata
import platform
import shutil
import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from tcsae.data.model import EVAL_EVERY
from tcsae.harvest.capture import Capture
from tcsae.harvest.corpus import Corpus, CorpusChoice, find_corpus
from tcsae.harvest.language_model import EMBEDDED, LanguageModel, find_model
from tcsae.harvest.phases import sample, write_activations, write_sequences, write_tails, write_tokenizer
from tcsae.harvest.sequences import budgets, check_sequences, n_tokens
from tcsae.shared.codecs import stored_dtype
from tcsae.shared.console import say
from tcsae.shared.errors import ConfigError, DataError, ModelError, StoreError
from tcsae.shared.journal import Journal
from tcsae.shared.manifest import FORMAT, SPLITS, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.storage import local_root
from tcsae.shared.store import Store, open_store, read_attributes, read_recipe
from tcsae.shared.writer import StoreWriter, open_writer

LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "datasets", "zarr", "numpy")
DELETED = ".deleted"
"""Ending of a store that is being deleted: renamed at once, then taken apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The language model that is asked for."""

    name: str = EMBEDDED
    """"embedded", a local folder, or a Hub id."""
    revision: str | None = None
    """Of a Hub model; None: its main branch."""
    batch_size: int = 32
    """Sequences in one forward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """All that can be asked of a harvest; what it resolves to is the store's `Recipe`."""

    model: ModelChoice = field(default_factory=ModelChoice)
    corpus: CorpusChoice = field(default_factory=CorpusChoice)
    sequences: SequenceRecipe = field(default_factory=SequenceRecipe)
    """Its pad_id is replaced by the tokenizer's."""
    hooks: tuple[str, ...] = ("blocks.4.hook_resid_post",)
    n_tokens: int = 1_000_000
    """Valid tokens over both splits."""
    codec: str = "float16"

    def __post_init__(self) -> None:
        check_sequences(self.sequences, self.n_tokens)
        stored_dtype(self.codec)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ConfigError(f"--hook {' '.join(self.hooks)}: give at least one, and each once.")
        if self.model.batch_size < 1:
            raise ConfigError(f"--batch-size {self.model.batch_size}: at least 1 sequence.")


def harvest(location: str, config: HarvestConfig, *, fresh: bool = False, exact: bool = False) -> Store:
    """Make, or finish, the store at `location`, and open it. A sealed store of the same recipe is used as it is.

    `fresh` deletes an activation store that is there. `exact` refuses a corpus with less text than `n_tokens`, before
    the activations are computed; otherwise the store then holds fewer tokens, and says so.
    Raises ConfigError, ModelError, DataError or StoreError. Wrong names and settings are found before anything is
    written; what a later failure leaves behind, the same call goes on from.
    """
    if fresh:
        remove_store(location)
    for leftover in local_root(location).absolute().parent.glob(f"{local_root(location).name}.*{DELETED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    model = find_model(config.model.name, config.model.revision)
    corpus = find_corpus(config.corpus)
    recipe, capture = _resolve(config, model, corpus, read_recipe(location))
    writer = open_writer(location, recipe)
    if writer is None:
        say(f"{location} holds this harvest already; it is used as it is (--fresh makes it anew).")
        return open_store(location)
    if config.model.name == EMBEDDED and config.sequences.eval_every != EVAL_EVERY:
        say(
            f"With --eval-every {config.sequences.eval_every} the embedded model was trained on part of the eval "
            f"split, and figures on it will flatter. It has not seen the eval split of --eval-every {EVAL_EVERY}."
        )
    start = time.monotonic()
    with writer:
        write_sequences(writer, corpus, model)
        _check_counts(writer, exact)
        capture = capture or Capture(model, config.hooks, config.model.batch_size)
        n_read, seconds = write_activations(writer, capture)
        few = sample(writer, capture)
        del capture  # a large model need not be in memory twice
        tails, files = write_tails(writer, model, few)
        files += write_tokenizer(writer, model)
        writer.seal(tails, files, _times(start, n_read, seconds))
    return open_store(location)


def remove_store(location: str) -> None:
    """Delete the activation store at `location`, if there is one, at once as far as a second start can see.

    Raises StoreError if something else is there, or if another process harvests into it.
    """
    root = local_root(location).resolve()
    values = read_attributes(root)
    if values is None:
        return
    if values.get("format") != FORMAT:
        raise StoreError(
            f"{location} is a Zarr group of another kind; only activation stores are deleted. Move it away."
        )
    journal = Journal(root, location)
    try:
        doomed = root.with_name(f"{root.name}.{uuid.uuid4().hex}{DELETED}")
        root.rename(doomed)
        shutil.rmtree(doomed)
    finally:
        journal.release()


def _resolve(
    config: HarvestConfig, model: LanguageModel, corpus: Corpus, stored: Recipe | None
) -> tuple[Recipe, Capture | None]:
    """The recipe that a config comes to, and the loaded model if it took that to find out.

    Names and widths of the hooks are the model's to say. A store that asked the same of the same model knows them.
    """
    capture = None
    asked = ModelRecipe(name=model.name, revision=model.revision, batch_size=config.model.batch_size)
    if stored is not None and _same_hooks(stored, asked, config.hooks):
        hooks, pad_id = stored.hooks, stored.sequences.pad_id
    else:
        model.check_length(config.sequences.length)
        tokenizer = model.tokenizer()
        if config.sequences.prepend_bos and tokenizer.bos_token_id is None:
            raise ModelError(f"The tokenizer of {model.name} has no BOS token. Leave --prepend-bos out.")
        capture = Capture(model, config.hooks, config.model.batch_size)
        hooks = capture.hooks
        pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if stored is None:
        corpus.check()
    recipe = Recipe(
        model=asked,
        corpus=corpus.recipe,
        sequences=replace(config.sequences, pad_id=pad_id),
        hooks=hooks,
        codec=config.codec,
        n_tokens=config.n_tokens,
        libraries={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    return recipe, capture


def _same_hooks(stored: Recipe, asked: ModelRecipe, hooks: tuple[str, ...]) -> bool:
    same_model = (stored.model.name, stored.model.revision) == (asked.name, asked.revision)
    return same_model and tuple(hook.requested for hook in stored.hooks) == hooks


def _check_counts(writer: StoreWriter, exact: bool) -> None:
    """Say, or with `exact` refuse, that there is less text than was asked for.

    Raises DataError, and deletes the store, if there is nothing to train on.
    """
    recipe, counts = writer.manifest.recipe, writer.manifest.counts
    name = f"{recipe.corpus.name} ({counts['documents_read']:,} documents)"
    if not counts["train"]["sequences"]:
        writer.close()
        remove_store(writer.location)
        raise DataError(f"{name} has no text for the train split. Give another --dataset, or a lower --min-length.")
    if counts["corpus_exhausted"]:
        wanted = budgets(recipe.n_tokens, recipe.sequences.eval_every)
        parts = ", ".join(f"{split} {counts[split]['tokens']:,} of {wanted[split]:,}" for split in SPLITS)
        short = f"{name} is at its end with {n_tokens(counts):,} of {recipe.n_tokens:,} tokens ({parts})."
        if exact:
            raise DataError(f"{short} Ask for fewer --tokens, or leave --exact out.")
        say(f"{short} The store will hold these.")


def _times(start: float, n_read: int, seconds: float) -> dict[str, Any]:
    return {
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "tokens_per_s": round(n_read / seconds) if n_read else None,
    }
