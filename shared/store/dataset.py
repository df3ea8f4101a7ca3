"""A store's sequences one by one, as batches for anybody's trainer, as text, and as a Hugging Face dataset."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.settings import from_dict
from tcsae.shared.lm.token_text import TokenTexts

if TYPE_CHECKING:
    import datasets

    from tcsae.shared.store.iterate import SegmentDataset


class StoredSequence(NamedTuple):
    """One sequence of a split, without its padding."""

    tokens: Int[ndarray, " length"]
    activations: dict[str, Float[ndarray, "length d_model"]]
    """By hook, float32."""
    document: int
    """Number of the document in the corpus."""
    start: int
    """First token of the sequence within its document."""


class SplitItems:
    """What makes a split a sequence of sequences: `split[i]`, `len(split)`, iteration in corpus order."""

    def __len__(self: Any) -> int:
        return self.n_sequences

    def __getitem__(self: Any, i: int) -> StoredSequence:
        """Sequence i; from the end if negative. Raises IndexError beyond both ends, StoreError for damage.

        Reads a chunk: for many sequences iterate, or `store.iterate`.
        """
        n = self.n_sequences
        if not -n <= i < n:
            raise IndexError(f"Sequence {i} of split {self.name!r}: it has {n}.")
        i = i % n
        return self._item(i, {hook: self.read(hook, i, i + 1)[0] for hook in self.store.hooks})

    def __iter__(self: Any) -> Iterator[StoredSequence]:
        return self.each(self.store.hooks)

    def each(self: Any, hooks: tuple[str, ...]) -> Iterator[StoredSequence]:
        """All sequences in corpus order, with the activations of some hooks."""
        for first in range(0, self.n_sequences, self.store.sequences_per_chunk):
            stop = min(first + self.store.sequences_per_chunk, self.n_sequences)
            chunks = {hook: self.read(hook, first, stop) for hook in hooks}
            for i in range(first, stop):
                yield self._item(i, {hook: rows[i - first] for hook, rows in chunks.items()})

    def _item(self: Any, i: int, rows: dict[str, ndarray]) -> StoredSequence:
        length = int(self.lengths[i])
        activations = {hook: values[:length] for hook, values in rows.items()}
        return StoredSequence(self.tokens[i, :length], activations, int(self.documents[i]), int(self.starts[i]))


class StoreData:
    """What a store gives to other libraries. Pickled, it is its location: another process opens it anew."""

    reopen: Callable[[str], Any]
    """`open_store`, which stands on this file."""

    def __reduce__(self: Any) -> tuple[Callable[[str], Any], tuple[str]]:
        return type(self).reopen, (self.location,)

    def iterate(
        self: Any,
        split: str = "train",
        segment_length: int | None = 16,
        *,
        batch_tokens: int = 4096,
        device: Any = "cpu",
        epochs: int | None = 1,
        **order: Any,
    ) -> "SegmentDataset":
        """Shuffled batches of segments, a torch IterableDataset of `SegmentBatch`; its length is the number of batches.

        `segment_length` consecutive positions of one sequence each (None: whole sequences), as many segments in a batch
        as `batch_tokens` hold. Each position of the split comes once an epoch; `epochs=None` never ends.
        `order`: hook (the first), skip_first (1: the first positions of each sequence are left out, as in training),
        shuffle (True), seed (0), buffer_sequences (2048: shuffled in memory, from chunks in random order).
        `state_dict()` and `load_state_dict()` go on from a batch; torchdata's StatefulDataLoader uses both.
        Raises StoreError for an unknown split or hook, ConfigError for a setting that cannot be.
        """
        from tcsae.shared.store.iterate import IterateConfig, SegmentDataset

        length = self.sequence_length if segment_length is None else segment_length
        values = {"split": split, "segment_length": length, "batch_tokens": batch_tokens, "epochs": epochs, **order}
        return SegmentDataset(self, from_dict(IterateConfig, values), device)

    def tokens_text(self: Any, i: int, split: str = "train") -> str:
        """The text of sequence i, token by token, as the report shows it: line ends as ⏎, bytes as ⟨E2 80⟩."""
        part, texts = self.split(split), TokenTexts(self)
        n = part.n_sequences
        if not -n <= i < n:
            raise IndexError(f"Sequence {i} of split {split!r}: it has {n}.")
        return "".join(texts[int(token)] for token in part.tokens[i, : part.lengths[i]])

    def to_dataset(self: Any, split: str = "train", hook: str | None = None, *, streaming: bool = False) -> Any:
        """The split as a Hugging Face dataset: tokens, document, start, and activations float32 [length, d_model].

        A `datasets.Dataset` is written to that library's cache (twice the bytes of a float16 store); streaming: an
        `IterableDataset` that reads the store as it goes. Raises StoreError for an unknown split or hook.
        """
        import datasets

        name = self.hook(hook)
        self.split(split)
        features = _features(self.d_model(name))
        # The content makes the library's cache know this store from another one at the same place.
        source = {"store": self, "split": split, "hook": name, "content": self.content}
        if streaming:
            return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=source)
        return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=source)


def _features(d_model: int) -> "datasets.Features":
    import datasets

    return datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("int32")),
            "document": datasets.Value("int64"),
            "start": datasets.Value("int32"),
            "activations": datasets.List(datasets.List(datasets.Value("float32"), length=d_model)),
        }
    )


def _rows(store: Any, split: str, hook: str, content: str) -> Iterator[dict[str, Any]]:
    """In a process of its own, perhaps, which has opened the store anew."""
    if store.content != content:
        raise StoreError(f"{store.location} has changed since the dataset was made of it. Call to_dataset again.")
    for one in store.split(split).each((hook,)):
        activations = np.ascontiguousarray(one.activations[hook])
        yield {"tokens": one.tokens, "document": one.document, "start": one.start, "activations": activations}
