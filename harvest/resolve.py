"""From what is asked of a harvest to a recipe: the model's hooks, its device, the library versions."""

import importlib.metadata
import platform
from dataclasses import dataclass, field, replace

from tcsae.harvest.capture import Capture
from tcsae.harvest.chat import ChatChoice, chat_template
from tcsae.harvest.documents import Corpus, CorpusChoice
from tcsae.harvest.language_model import EMBEDDED, LanguageModel
from tcsae.harvest.sequences import TokenReader, check_sequences
from tcsae.shared.base.device import DEVICES, choose_device
from tcsae.shared.base.distributed import device_of, ranks
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.store.codecs import check_codec
from tcsae.shared.store.format import CONTROLS, ControlRecipe, HookRecipe, ModelRecipe, Recipe, SequenceRecipe

DTYPES = ("float32", "bfloat16", "float16")
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The language model that is asked for, and how it is run."""

    name: str = EMBEDDED
    """"embedded", a local folder, or a Hub id."""
    revision: str | None = None
    """Of a Hub model; None: its main branch."""
    batch_size: int = 32
    """Sequences in one forward pass."""
    dtype: str = "float32"
    """What it computes in: float32, or on a GPU bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda or mps; auto: that of the store that is there, else the first of cuda, mps and cpu that this machine
    has."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: at least 1 sequence.")
        if self.dtype not in DTYPES:
            raise ConfigError(unknown("dtype", self.dtype, DTYPES))
        if self.device not in DEVICES:
            raise ConfigError(unknown("device", self.device, DEVICES))


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """All that can be asked of a harvest; what it resolves to is the store's `Recipe`."""

    model: ModelChoice = field(default_factory=ModelChoice)
    corpus: CorpusChoice = field(default_factory=CorpusChoice)
    sequences: SequenceRecipe = field(default_factory=SequenceRecipe)
    """Its pad_id is replaced by the tokenizer's."""
    chat: ChatChoice | None = None
    """How conversations become text; None: documents are text or token ids."""
    hooks: tuple[str, ...] = ("blocks.4.hook_resid_post",)
    n_tokens: int = 1_000_000
    """Valid tokens over both splits."""
    n_sequences: int | None = None
    """Sequences over both splits, in place of `n_tokens`."""
    codec: str = "float16"
    codec_error: float | None = None
    """Relative squared error of the codec `compact`; None: its default."""
    control: ControlRecipe | None = None
    """A null of this harvest in place of it."""

    def __post_init__(self) -> None:
        if not 0 <= self.corpus.seed <= MOST_SEED:
            raise ConfigError(f"--seed {self.corpus.seed}: 0 for the corpus's own order, or up to {MOST_SEED}.")
        if self.n_sequences is not None and self.n_sequences < 10:
            raise ConfigError(f"--sequences {self.n_sequences}: at least ten.")
        if self.control is not None and self.control.kind not in CONTROLS:
            raise ConfigError(unknown("control", self.control.kind, CONTROLS))
        check_sequences(self.sequences, self.most_tokens, self.model.batch_size)
        check_codec(self.codec, self.codec_error)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ConfigError(f"--hook {' '.join(self.hooks)}: give at least one, and each once.")

    @property
    def most_tokens(self) -> int:
        """Tokens asked for, or what the sequences asked for can hold."""
        return self.n_tokens if self.n_sequences is None else self.n_sequences * self.sequences.length


LIBRARIES = ("torch", "transformers", "transformer-lens", "tokenizers", "datasets", "zarr", "numpy")


def resolve(
    config: HarvestConfig, model: LanguageModel, corpus: Corpus, stored: Recipe | None
) -> tuple[Recipe, Capture | None]:
    """The recipe that a config comes to, and the loaded model if that was needed for it.

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
    template = chat_template(config.chat, model) if config.chat else None
    if stored is not None and _same_hooks(stored, asked, config.hooks):
        hooks, pad_id = stored.hooks, stored.sequences.pad_id
        asked = replace(asked, attention=stored.model.attention)
    else:
        model.check_length(config.sequences.length)
        reader = TokenReader(model, corpus, config.sequences.prepend_bos, template)
        pad_id = reader.pad_id
        if stored is None:
            corpus.check()
            reader.check(corpus)
        capture = load(model, config.hooks, asked)
        hooks = capture.hooks
        _check_places(hooks)
        asked = replace(asked, attention=capture.attention)
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
        chat=None if template is None else template.recipe,
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
