"""The format of a store: the manifest (attributes["tcsae"] of its root group), the layout of its arrays in chunks and
shards, and the sums that its statistics come from. data/README.md states it for other readers.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tcsae.shared.base.files import json_digest
from tcsae.shared.base.settings import from_dict, to_dict
from tcsae.shared.store.codecs import CODECS, parameter_shapes, representation, stored_width

FORMAT = "tcsae-activations"
VERSION, PLAIN_VERSION = 3, 2
"""1: float16 and float32 only, no statistics/<hook>/sums, no checksums_metadata. 2: no recipe.chat, no roles. A store
without these is still written as version 2, byte for byte."""
SPLITS = ("train", "eval")
PER_TOKEN = ("tokens", "roles")
"""Arrays of a split with a number for each position; the others have one for each sequence."""
TOKEN_DTYPES = {"documents": "int64", "roles": "uint8"}
"""Of the arrays that hold a row a sequence, where it is not int32."""
MAX_ROLES = 254
MAX_LENGTH, MAX_TOKENS, MAX_CHUNK_NUMBERS = 1 << 31, 1 << 50, 1 << 33
"""Bounds that no store reaches: of a width, length or number of rows, of a split's tokens, and of a chunk's numbers."""
HARVESTING, SEALED = "harvesting", "sealed"
PERMUTED, RANDOM_WEIGHTS = "permuted", "random-weights"
CONTROLS = {
    PERMUTED: "each document's tokens in random order",
    RANDOM_WEIGHTS: "the model with weights as they are before training",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecipe:
    """The language model, as far as it determines the activations."""

    name: str
    revision: str
    """A commit of the Hub, or "sha256:..." of a local folder's files."""
    dtype: str = "float32"
    device: str = "cpu"
    """Kind of device ("cpu", "cuda"): other kinds round differently."""
    attention: str = "eager"
    weight_processing: str = "none"
    batch_size: int = 32
    """Sequences in one forward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusRecipe:
    """The text, and how its documents are found."""

    name: str
    revision: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    tokenized: bool = False
    """The field holds token ids, not text."""
    seed: int = 0
    """0: the corpus's own order. Otherwise documents are shuffled in a buffer with this seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRecipe:
    """How documents become sequences, and which split they belong to."""

    length: int = 128
    """Positions of a sequence, at most."""
    min_length: int = 3
    """A document's last piece is dropped if it is shorter."""
    prepend_bos: bool = False
    pad_id: int = 0
    eval_every: int = 20
    """A document is eval iff int(sha256(text)) % eval_every == 0; 0: whoever made the store gave both splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRecipe:
    """How conversations became text, and whose tokens are marked."""

    template: str
    """sha256 of the chat template."""
    roles: tuple[str, ...] = ()
    """Roles whose tokens the array `roles` marks: 1 for the first of these, 2 for the second, ...; 0 for all others."""
    spans: tuple[str, ...] = ()
    """Of each role: "generation" (what the template says the model writes) or "content" (a message's own text)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HookRecipe:
    """One place in the model whose output is stored."""

    requested: str
    canonical: str
    d_model: int
    """Width of the stored vectors (heads flattened)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlRecipe:
    """A null of a store: what the activations are when one thing about the language model or its text is destroyed."""

    kind: str
    """One of `CONTROLS`."""
    seed: int = 0
    """Of the orders, or of the weights."""

    def __str__(self) -> str:
        return f"{self.kind}, seed {self.seed}: {CONTROLS[self.kind]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that determines a store's bytes; compared when a harvest is resumed."""

    model: ModelRecipe
    corpus: CorpusRecipe
    sequences: SequenceRecipe
    hooks: tuple[HookRecipe, ...]
    codec: str = "float16"
    codec_error: float | None = None
    """Relative squared error that `compact` aims at; None for the other codecs."""
    n_tokens: int
    """Valid tokens asked for, over both splits."""
    n_sequences: int | None = None
    """Sequences asked for instead; `n_tokens` is then what they can hold."""
    libraries: dict[str, str] = field(default_factory=dict)
    control: ControlRecipe | None = None
    """None: the model as it was trained, over the text as it was written. Then the manifest has no such key."""
    chat: ChatRecipe | None = None
    """None: documents are text or token ids, not conversations. Then the manifest has no such key."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that the array `roles` marks; without any there is no such array."""
        return self.chat.roles if self.chat else ()

    @property
    def token_arrays(self) -> tuple[str, ...]:
        """Names of the arrays of a split that hold a row a sequence, but for activations, in their order."""
        return ("tokens", "lengths", "documents", "starts", *(("roles",) if self.roles else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How rows are cut into objects."""

    sequences_per_chunk: int
    """Of an activation array."""
    chunks_per_shard: int = 1
    """Consecutive chunks of every hook's array that are made together: the unit of the harvest."""
    sequences_per_token_chunk: int = 4096
    """Of tokens, lengths, documents, starts and roles."""

    @property
    def sequences_per_shard(self) -> int:
        return self.sequences_per_chunk * self.chunks_per_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything needed to trust a store and to make it again."""

    format: str = FORMAT
    version: int = PLAIN_VERSION
    state: str
    """"harvesting" until all is written, then "sealed"."""
    recipe: Recipe
    layout: Layout
    counts: dict[str, Any] = field(default_factory=dict)
    """Per split: sequences, tokens, documents; and what was read, kept and left out on the way."""
    tails: dict[str, Any] = field(default_factory=dict)
    """Per hook: {"layers": n, "max_difference": nats}, or {"none": why}."""
    files: tuple[str, ...] = ()
    """Keys of the objects that belong to no array: tails and tokenizer."""
    content: str = ""
    """sha256 of the checksum array's bytes: what is in the store, cited by runs and evaluations."""
    checksums_metadata: str = ""
    """sha256 of checksums/zarr.json."""
    times: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    """One entry for each time that the store was sealed before and then extended, or copied into another codec: its
    content and size, or codec, then."""
    digest: str = ""
    """sha256 of this manifest as canonical JSON, with this field blank."""

    def __post_init__(self) -> None:
        if self.recipe.chat is not None:
            object.__setattr__(self, "version", max(self.version, VERSION))

    def to_json(self) -> dict[str, Any]:
        """The manifest as dictionaries, with its digest filled in."""
        blank = to_dict(dataclasses.replace(self, digest=""))
        for name in ("control", "chat"):
            if blank["recipe"][name] is None:
                del blank["recipe"][name]  # so that a store without one has the bytes it had before there were any
        return blank | {"digest": json_digest(blank)}

    def root_metadata(self) -> bytes:
        """The root's zarr.json, which holds the manifest."""
        root = {"zarr_format": 3, "node_type": "group", "attributes": {"tcsae": self.to_json()}}
        return (json.dumps(root, indent=2) + "\n").encode()

    def arrays(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Every array of the store but `checksums`: path -> (shape, rows per object)."""
        length, layout = self.recipe.sequences.length, self.layout
        arrays: dict[str, tuple[tuple[int, ...], int]] = {}
        for split in SPLITS:
            n = self.counts[split]["sequences"]
            rows = layout.sequences_per_token_chunk
            for name in self.recipe.token_arrays:
                arrays[f"{split}/{name}"] = ((n, length) if name in PER_TOKEN else (n,), rows)
            codec = self.recipe.codec if split == "train" else "float32"  # or float16: an exact one
            for hook in self.recipe.hooks:
                shape = (n, length, stored_width(codec, hook.d_model))
                arrays[f"{split}/activations/{hook.requested}"] = (shape, layout.sequences_per_chunk)
        for hook in self.recipe.hooks:
            for name, n in statistics_sizes(hook.d_model, self.version).items():
                arrays[f"statistics/{hook.requested}/{name}"] = ((n,), n)
        for hook in self.recipe.hooks:
            for name, sizes in parameter_shapes(self.recipe.codec, hook.d_model).items():
                arrays[f"codec/{hook.requested}/{name}"] = (sizes, sizes[0])
        return arrays

    def groups(self) -> list[str]:
        """Every group below the root, parents first."""
        hooks = [hook.requested for hook in self.recipe.hooks]
        splits = [group for split in SPLITS for group in (split, f"{split}/activations")]
        codec = ["codec", *(f"codec/{hook}" for hook in hooks)] if representation(self.recipe.codec).parameters else []
        return [*splits, "statistics", *(f"statistics/{hook}" for hook in hooks), *codec]

    def n_objects(self) -> int:
        """Length of `objects`, by arithmetic: a manifest may claim more than there is memory for."""
        n_chunks = sum(1 + -(-shape[0] // rows) for shape, rows in self.arrays().values())
        return len(self.groups()) + n_chunks + len(self.files)

    def objects(self) -> list[str]:
        """Keys of all objects but the root's zarr.json and `checksums`, in the order of the checksum array's rows."""
        keys = [f"{group}/zarr.json" for group in self.groups()]
        for path, (shape, rows) in self.arrays().items():
            keys.append(f"{path}/zarr.json")
            rest = "/0" * (len(shape) - 1)
            keys += [f"{path}/c/{i}{rest}" for i in range(-(-shape[0] // rows))]
        return keys + list(self.files)


def manifest_from_json(values: Mapping[str, Any]) -> Manifest:
    """Rebuild a manifest. Raises ConfigError if a field is unknown or missing."""
    return from_dict(Manifest, values)


def allowed_dtypes(path: str, codec: str) -> tuple[str, ...]:
    """The dtypes that an array of a store can have, by its path."""
    parts = path.split("/")
    if len(parts) == 2:
        return (TOKEN_DTYPES.get(parts[1], "int32"),)
    if parts[0] in SPLITS:
        exact = ("float16", "float32")
        return exact if parts[0] == "eval" and codec not in exact else (representation(codec).dtype.name,)
    if parts[0] == "codec":
        return ("float32",)
    return ("int64",) if parts[-1] == "norm_histogram" else ("float64",) if parts[0] == "statistics" else ("uint8",)


def impossible(manifest: Manifest) -> str:
    """The first thing that a manifest says which cannot be; empty if it can. Nothing is allocated to find out."""
    recipe, layout = manifest.recipe, manifest.layout
    names = [hook.requested for hook in recipe.hooks]
    if not names or len(set(names)) < len(names):
        return f"{len(names)} hooks, {len(set(names))} of them different"
    if recipe.codec not in CODECS:
        return f"recipe.codec {recipe.codec[:40]!r}"
    if len(set(recipe.roles)) < len(recipe.roles) or len(recipe.roles) > MAX_ROLES:
        return f"{len(recipe.roles)} roles, {len(set(recipe.roles))} of them different"
    numbers = {
        "layout.sequences_per_chunk": layout.sequences_per_chunk,
        "layout.chunks_per_shard": layout.chunks_per_shard,
        "layout.sequences_per_token_chunk": layout.sequences_per_token_chunk,
        "recipe.sequences.length": recipe.sequences.length,
        **{f"d_model of {hook.requested}": hook.d_model for hook in recipe.hooks},
    }
    for what, number in numbers.items():
        if not 1 <= number <= MAX_LENGTH:
            return f"{what} {number}"
    if manifest.state not in (HARVESTING, SEALED):
        return f"state {manifest.state[:40]!r}"
    return _impossible_counts(manifest) if manifest.state == SEALED else ""


def _impossible_counts(manifest: Manifest) -> str:
    length = manifest.recipe.sequences.length
    for split in SPLITS:
        counts = manifest.counts.get(split)
        if not isinstance(counts, Mapping):
            return f"no counts of {split}"
        three = [counts.get(name) for name in ("sequences", "tokens", "documents")]
        if not all(type(n) is int and 0 <= n <= MAX_TOKENS for n in three):
            return f"counts of {split} {three}"
        n_sequences, n_tokens, n_documents = (int(n or 0) for n in three)
        if n_tokens > n_sequences * length or n_documents > n_sequences:
            return f"{n_tokens} tokens and {n_documents} documents in {n_sequences} {split} sequences of up to {length}"
    largest = max(
        math.prod((rows, *shape[1:])) for path, (shape, rows) in manifest.arrays().items() if not path.startswith("c")
    )
    return f"a chunk of {largest} numbers" if largest > MAX_CHUNK_NUMBERS else ""


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether a manifest's own digest fits it."""
    return json_digest({**values, "digest": ""}) == values.get("digest")


def is_tail(tail: Any) -> bool:
    """Whether it is {"layers": n, "max_difference": nats} or {"none": why}."""
    if not isinstance(tail, Mapping):
        return False
    if "none" in tail:
        return isinstance(tail["none"], str)
    return type(tail.get("layers")) is int and type(tail.get("max_difference")) in (int, float)


def content_digest(checksums: bytes) -> str:
    """The store's content digest from the bytes of its checksum array."""
    return hashlib.sha256(checksums).hexdigest()


def statistics_sizes(d_model: int, version: int = PLAIN_VERSION) -> dict[str, int]:
    """The arrays of statistics/<hook>/ and their lengths."""
    sizes = {"mean": d_model, "variance": d_model, "norm_histogram": N_NORM_BINS}
    return sizes | {"sums": n_sums(d_model)} if version > 1 else sizes


# How a store is cut: chunks, which are the objects of its arrays, and shards, the pieces that it is made in. The model
# runs over a shard at a time, so a shard holds whole batches whatever the width of the activations: a chunk of 4 MiB
# is 128 sequences of 128 positions at width 128, and four at width 4096. And several batches, because sequences are
# put into batches by length within their shard only.

CHUNK_BYTES = 4 << 20
SHARD_BATCHES = 8
"""Forward passes in a shard, about: some seconds of work, which is what a kill may cost."""
SHARD_BYTES = 128 << 20
"""Float32 activations of all hooks in a shard, at most, or else one batch: two shards are in memory."""


class Shard(NamedTuple):
    """The unit of phase 2: sequences start..stop-1 of a split, in one or several chunks of every hook's array."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:08d}"


class Chunk(NamedTuple):
    """A chunk of a shard: its number in the array, and which of the shard's sequences it holds."""

    number: int
    rows: slice


def layout_for(recipe: Recipe) -> Layout:
    """Chunks of about 4 MiB in the widest hook's array: one read, contiguous. Shards of about SHARD_BATCHES batches."""
    widths = [hook.d_model for hook in recipe.hooks]
    length, batch = recipe.sequences.length, recipe.model.batch_size
    per_chunk = max(1, CHUNK_BYTES // (length * max(widths) * representation(recipe.codec).bytes_per_number))
    n_batches = max(1, min(SHARD_BATCHES, SHARD_BYTES // max(1, batch * length * sum(widths) * 4)))
    return Layout(sequences_per_chunk=per_chunk, chunks_per_shard=max(1, n_batches * batch // per_chunk))


def shards_of(manifest: Manifest) -> list[Shard]:
    """All shards, train first, in order. Phase 1 must be done."""
    n = manifest.layout.sequences_per_shard
    return [
        Shard(split, number, start, min(start + n, manifest.counts[split]["sequences"]))
        for split in SPLITS
        for number, start in enumerate(range(0, manifest.counts[split]["sequences"], n))
    ]


def chunks_of(shard: Shard, layout: Layout) -> Iterator[Chunk]:
    """The chunks that a shard consists of; the last one of a split may not be full."""
    n = layout.sequences_per_chunk
    for start in range(shard.start, shard.stop, n):
        yield Chunk(start // n, slice(start - shard.start, min(start + n, shard.stop) - shard.start))


def chunk_key(split: str, hook: str, number: int) -> str:
    """Key of the object that holds a chunk of a hook's activations."""
    return f"{split}/activations/{hook}/c/{number}/0/0"


# Sums over tokens that add up, shard by shard, to the statistics of a whole split.

N_NORM_BINS = 322
"""Bin 0: norms below 2**-20. Bin i: [2**((i - 1) / 8 - 20), 2**(i / 8 - 20)). The last: all from 2**20 on."""
NORM_EDGES = 2.0 ** (np.arange(N_NORM_BINS) / 8 - 20)
"""Upper edge of each bin (the last bin has none)."""

BLOCK_TOKENS = 256
"""Widened at a time: what stays in the cache costs a third of fresh memory for a whole shard."""


def partial_sums(x: Float[ndarray, "n d_model"]) -> Float[ndarray, " n_sums"]:
    """float64 [1 + 2 d_model + n_bins]: count, sum, sum of squares, norm histogram; partial sums add up."""
    first, second, norms = np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.empty(len(x))
    for start in range(0, len(x), BLOCK_TOKENS):
        wide = x[start : start + BLOCK_TOKENS].astype(np.float64)
        first += wide.sum(0)
        np.square(wide, out=wide)
        second += wide.sum(0)
        norms[start : start + BLOCK_TOKENS] = np.sqrt(wide.sum(1))
    bins = np.clip(np.floor((np.log2(np.maximum(norms, 2.0**-30)) + 20) * 8).astype(np.int64) + 1, 0, N_NORM_BINS - 1)
    histogram = np.bincount(bins, minlength=N_NORM_BINS).astype(np.float64)
    return np.concatenate([[len(x)], first, second, histogram])


def n_sums(d_model: int) -> int:
    """Length of `partial_sums`."""
    return 1 + 2 * d_model + N_NORM_BINS


def finished(sums: Float[ndarray, " n_sums"], d_model: int) -> dict[str, ndarray]:
    """mean and variance [d_model], float64, and norm_histogram [n_bins], int64, from added `partial_sums`."""
    count = max(float(sums[0]), 1.0)
    mean = sums[1 : 1 + d_model] / count
    variance = np.maximum(sums[1 + d_model : 1 + 2 * d_model] / count - mean**2, 0.0)
    return {"mean": mean, "variance": variance, "norm_histogram": sums[1 + 2 * d_model :].astype(np.int64)}
