"""Creation of a store from given activations: of other models, of images or sound, from any hook."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike

from tcsae.shared.base.console import say
from tcsae.shared.base.errors import ConfigError, DataError, StoreError, unknown
from tcsae.shared.store.codecs import FIT_TOKENS, check_codec
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, ModelRecipe, Recipe, SequenceRecipe, Shard
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, StoreWriter, open_writer

NO_TAIL = "the activations were given, not harvested"


class StoreCreation:
    """Takes sequences of both splits in order, and seals them into a store. See `create_store`.

    In a `with` statement it seals at the end; after an error, it deletes what it wrote.
    """

    def __init__(self, location: str, writer: StoreWriter, tokenizer: Any = None, labels: Sequence[str] = ()) -> None:
        self.location = location
        self._writer = writer
        self._labels = tuple(labels)
        self._tokenizer = label_tokenizer(self._labels) if labels else tokenizer
        recipe = writer.manifest.recipe
        self._length = recipe.sequences.length
        self._widths = {hook.requested: hook.d_model for hook in recipe.hooks}
        self._pending: dict[str, list[tuple[Rows, dict[str, ndarray]]]] = {split: [] for split in SPLITS}
        self._n_pending = dict.fromkeys(SPLITS, 0)
        """Sequences in `_pending`: adding them up at each append would be quadratic in appends."""
        self._counts = {split: dict.fromkeys(("sequences", "tokens", "documents"), 0) for split in SPLITS}
        self._seen: dict[str, list[ndarray]] = {split: [] for split in SPLITS}
        self._last: dict[str, tuple[int, int]] = {}
        """Per split: the last sequence's document, and where the document goes on."""
        self._sealed = False

    def __enter__(self) -> "StoreCreation":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.discard()
            return
        if self._sealed:
            return
        try:
            self.seal()
        except BaseException:
            self.discard()
            raise

    def append(
        self,
        split: str,
        activations: Mapping[str, Float[Any, "n sequence_length d_model"]],
        *,
        lengths: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
        documents: ArrayLike | None = None,
    ) -> None:
        """Add n sequences to "train" or "eval", with the activations of every hook (arrays or tensors, any float).

        All that is given is copied, so a buffer can be used again.

        lengths [n]: valid positions of each sequence, left-aligned; default: all. What lies beyond is not looked at.
        tokens [n, sequence_length]: ids of the tokenizer, or numbers of the labels, shown as text; default 0.
        documents [n]: a number for each sequence, never falling within a split. Consecutive sequences of one number are
        pieces of one document (a video, a recording), which lies in one split only. Default: one document each.
        Raises DataError for shapes and numbers that do not fit, NaN, infinity, or a value that the codec cannot hold.
        """
        if split not in SPLITS:
            raise ConfigError(unknown("split", split, SPLITS))
        if activations.keys() != self._widths.keys():
            raise DataError(f"Activations of {sorted(activations)} were given; the store has {sorted(self._widths)}.")
        values = {hook: _floats(given) for hook, given in activations.items()}
        n = len(next(iter(values.values())))
        for hook, width in self._widths.items():
            _check_shape(hook, values[hook], (n, self._length, width))
        if n:
            self._pending[split].append((self._rows(split, n, lengths, tokens, documents), values))
            self._n_pending[split] += n
        if not self._writer.codec.fitted:
            if self._n_pending["train"] * self._length < FIT_TOKENS:
                return
            self._fit()
        for one in SPLITS:
            self._flush(one, whole_chunks=True)

    def seal(self) -> Store:
        """Finish the store, and open it; say so if it has no eval split.

        Raises DataError if the train split is empty or a document is in both.
        """
        if not self._seen["train"]:
            raise DataError(f"{self.location} has no train sequence. Append some before the seal.")
        train, evaluation = (np.concatenate([[], *self._seen[split]]) for split in SPLITS)
        if len(both := np.intersect1d(train, evaluation)):
            raise DataError(f"Document {int(both[0])} is in train and in eval. Give each document to one split.")
        if not self._writer.codec.fitted:
            self._fit()
        for split in SPLITS:
            self._flush(split, whole_chunks=False)
        self._writer.finish_sequences(self._counts)
        self._writer.seal({hook: {"none": NO_TAIL} for hook in self._widths}, self._add_tokenizer(), {})
        self._sealed = True
        if not self._seen["eval"]:
            say(
                f"{self.location} has no eval split, so tcsae train can use it and tcsae eval cannot. Append sequences "
                'of other documents to "eval" before the seal.'
            )
        return open_store(self.location)

    def _add_tokenizer(self) -> list[str]:
        """Keys of the tokenizer's files, which are written here."""
        if self._tokenizer is None:
            return []
        if isinstance(self._tokenizer, str | Path):
            return self._writer.add_folder("tokenizer", Path(self._tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            for code in Path(folder).rglob("*.py"):  # no store holds code that a reader might run
                code.unlink()
            return self._writer.add_folder("tokenizer", Path(folder))

    def discard(self) -> None:
        """Delete what was written: an unfinished creation cannot be gone on with."""
        try:
            self._writer.objects.delete_below("")
        finally:
            self._writer.close()

    def _rows(self, split: str, n: int, lengths: Any, tokens: Any, documents: Any) -> Rows:
        lengths = np.full(n, self._length) if lengths is None else np.asarray(lengths)
        tokens = np.zeros((n, self._length)) if tokens is None else np.asarray(tokens)
        if documents is None:
            first = sum(self._counts[one]["sequences"] + self._n_pending[one] for one in SPLITS)
            documents = np.arange(first, first + n)
        documents = np.array(documents, np.int64)  # a copy: kept until a chunk is full
        _check_shape("lengths", lengths, (n,))
        _check_shape("tokens", tokens, (n, self._length))
        _check_shape("documents", documents, (n,))
        if lengths.min() < 1 or lengths.max() > self._length:
            raise DataError(f"A length of {lengths.min()} or {lengths.max()}: give 1 to {self._length}.")
        if tokens.min() < 0 or documents.min() < 0:
            raise DataError("A token or a document has a negative number. Give numbers from 0 on.")
        if self._labels and tokens.max() >= len(self._labels):
            raise DataError(f"A token of {tokens.max()}: the store has {len(self._labels)} labels. Give 0 to one less.")
        last, after = self._last.get(split, (-1, 0))
        if (np.diff(documents, prepend=last) < 0).any():
            raise DataError(f"Documents of {split} fall after {last}. Append the pieces of each one after the other.")
        starts = np.zeros(n, np.int32)
        for i, (document, length) in enumerate(zip(documents.tolist(), lengths.tolist(), strict=True)):
            self._counts[split]["documents"] += document != last
            starts[i] = after if document == last else 0
            last, after = document, int(starts[i]) + length
        self._last[split] = last, after
        self._seen[split].append(np.unique(documents))
        tokens = np.where(np.arange(self._length) < lengths[:, None], tokens, 0)
        return Rows(tokens.astype(np.int32), lengths.astype(np.int32), documents, starts)

    def _fit(self) -> None:
        n = -(-FIT_TOKENS // self._length)
        samples: dict[str, list[ndarray]] = {hook: [np.zeros((0, width))] for hook, width in self._widths.items()}
        for rows, values in self._pending["train"]:
            valid = np.arange(self._length) < rows.lengths[:, None]
            for hook, parts in samples.items():
                parts.append(values[hook][:n][valid[:n]])
            n = max(0, n - len(valid))
        self._writer.codec.fit({hook: np.concatenate(parts).astype(np.float32) for hook, parts in samples.items()})

    def _flush(self, split: str, *, whole_chunks: bool) -> None:
        """Write what is pending, as far as chunks are full; each is a shard."""
        layout = self._writer.manifest.layout
        assert layout.chunks_per_shard == 1, "no model runs, so no batch has to be filled"
        per_chunk = layout.sequences_per_chunk
        n = self._n_pending[split]
        if whole_chunks:
            n -= n % per_chunk
        if not n:
            return
        parts = self._pending[split]
        rows = Rows.joined([rows for rows, _ in parts])
        values = {hook: np.concatenate([one[hook] for _, one in parts]) for hook in self._widths}
        now, rest = rows.part(slice(n)), rows.part(slice(n, None))
        self._pending[split] = (
            [(rest, {hook: one[n:].copy() for hook, one in values.items()})] if len(rest.lengths) else []
        )
        self._n_pending[split] -= n
        nothing = rows.part(slice(0))
        self._writer.commit({one: now if one == split else nothing for one in SPLITS}, {})
        counts = self._counts[split]
        start = counts["sequences"]
        counts["sequences"] += n
        counts["tokens"] += int(now.lengths.sum())
        self._writer.finish_sequences(self._counts)
        for first in range(0, n, per_chunk):
            stop = min(first + per_chunk, n)
            shard = Shard(split, (start + first) // per_chunk, start + first, start + stop)
            self._writer.write_shard(shard, {hook: one[first:stop] for hook, one in values.items()})


def create_store(  # noqa: PLR0913 (keyword arguments of a public function)
    location: str | Path,
    *,
    hooks: Mapping[str, int],
    sequence_length: int,
    codec: str = "float16",
    codec_error: float | None = None,
    source: str = "own activations",
    model: str | None = None,
    tokenizer: Any = None,
    labels: Sequence[str] = (),
) -> StoreCreation:
    """Begin a store of your own activations, for `tcsae train` and `tcsae eval` (without cross-entropies).

    hooks: name -> d_model of what is stored side by side, e.g. {"layer4": 768}. sequence_length: positions of a
    sequence, at most (1 for single vectors). codec, codec_error: as in `tcsae harvest --help`. source: its name where a
    model's would stand. tokenizer: a Hugging Face tokenizer or its folder, to show tokens as text; or labels: what
    token 0, 1, ... is called, where there is no text (classes of patches, phonemes). model: the language model's name
    (default: the source's).

        with tcsae.create_store("a.zarr", hooks={"layer4": 768}, sequence_length=64) as store:
            store.append("train", {"layer4": x})  # [n, 64, 768]
            store.append("eval", {"layer4": y})

    Raises StoreError if something is at `location`; ConfigError for settings that do not fit.
    """
    check_text(tokenizer, labels)
    location = str(location)
    objects = objects_at(location)
    if objects.writable and not objects.is_new():
        raise StoreError(f"{location} is there already. Give another location, or delete it first.")
    if not hooks or min(hooks.values()) < 1 or sequence_length < 1 or any(not name or "/" in name for name in hooks):
        raise ConfigError("create_store: give at least one hook (a name without /), widths and lengths from 1 on.")
    recipe = Recipe(
        model=ModelRecipe(
            name=model or source, revision="as given", device="unknown", attention="unknown", batch_size=0
        ),
        corpus=CorpusRecipe(name=source, revision="as given"),
        sequences=SequenceRecipe(length=sequence_length, min_length=1, eval_every=0),
        hooks=tuple(HookRecipe(requested=name, canonical=name, d_model=width) for name, width in hooks.items()),
        codec=codec,
        codec_error=check_codec(codec, codec_error),
        n_tokens=0,
    )
    writer = open_writer(location, recipe)
    assert writer is not None
    return StoreCreation(location, writer, tokenizer, labels)


def check_text(tokenizer: Any, labels: Sequence[str]) -> None:
    """Raises ConfigError for what cannot name tokens."""
    if tokenizer is not None and labels:
        raise ConfigError("create_store: a tokenizer and labels are given. Give one of them.")
    if isinstance(tokenizer, str | Path):
        if not (Path(tokenizer) / "tokenizer.json").is_file():
            raise ConfigError(f"create_store: tokenizer {str(tokenizer)!r} is no folder with a tokenizer.json.")
    elif tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(
            f"create_store: tokenizer is a {type(tokenizer).__name__}. Give a Hugging Face tokenizer or its folder."
        )
    if twice := sorted(label for label, n in Counter(labels).items() if n > 1):
        raise ConfigError(f"create_store: the label {twice[0]!r} is given twice. Give each token one of its own.")


def label_tokenizer(labels: Sequence[str]) -> Any:
    """A Hugging Face tokenizer whose token i is labels[i], so that readers show labels as they show text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({label: i for i, label in enumerate(labels)}, unk_token=labels[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


def _floats(values: Any) -> ndarray:
    """A float32 copy: what is given is kept until a chunk is full, and may be a buffer that the caller fills again."""
    if hasattr(values, "detach"):  # a tensor, perhaps of a dtype that NumPy lacks
        values = values.detach().float().cpu().numpy()
    return np.array(values, np.float32)


def _check_shape(name: str, values: ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise DataError(f"{name} has shape {list(values.shape)}; the store takes {list(shape)}.")
