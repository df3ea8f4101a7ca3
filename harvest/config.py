"""All that can be asked of a harvest."""

from dataclasses import dataclass, field

from tcsae.harvest.corpus import CorpusChoice
from tcsae.harvest.language_model import EMBEDDED
from tcsae.harvest.sequences import check_sequences
from tcsae.shared.codecs import check_codec
from tcsae.shared.device import DEVICES
from tcsae.shared.errors import ConfigError, unknown
from tcsae.shared.manifest import CONTROLS, ControlRecipe, SequenceRecipe

DTYPES = ("float32", "bfloat16", "float16")
MOST_POSITIONS = 1 << 20
"""In one forward pass. What a shard takes in memory grows with it, so a slip of the finger has to be refused."""


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
        if self.corpus.seed < 0:
            raise ConfigError(f"--seed {self.corpus.seed}: 0 for the corpus's own order, or a number above.")
        if self.model.batch_size * self.sequences.length > MOST_POSITIONS:
            raise ConfigError(
                f"--batch-size {self.model.batch_size}: at most {MOST_POSITIONS // self.sequences.length} sequences of "
                f"{self.sequences.length} in one forward pass."
            )
        if self.n_sequences is not None and self.n_sequences < 10:
            raise ConfigError(f"--sequences {self.n_sequences}: at least ten.")
        if self.control is not None and self.control.kind not in CONTROLS:
            raise ConfigError(unknown("control", self.control.kind, CONTROLS))
        check_sequences(self.sequences, self.most_tokens)
        check_codec(self.codec, self.codec_error)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ConfigError(f"--hook {' '.join(self.hooks)}: give at least one, and each once.")

    @property
    def most_tokens(self) -> int:
        """Tokens asked for, or what the sequences asked for can hold."""
        return self.n_tokens if self.n_sequences is None else self.n_sequences * self.sequences.length
