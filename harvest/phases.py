"""The steps of a harvest, in order. Each goes on from what the writer finds on disk."""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.harvest.capture import Capture
from tcsae.harvest.documents import Corpus, Document
from tcsae.harvest.language_model import LanguageModel, load_plain, quiet
from tcsae.harvest.sequences import Sequencer, budgets_of, n_tokens, permuted, split_of
from tcsae.harvest.work_stealing import dealt, write_beside
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.distributed import ALONE, Ranks
from tcsae.shared.base.errors import DataError
from tcsae.shared.base.files import PARTIAL
from tcsae.shared.base.signals import StopRequest
from tcsae.shared.lm.tail import Tail, TailError, make_tail, save_tail, tail_start, verify_tail
from tcsae.shared.store.format import PERMUTED, ControlRecipe
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.writer import StoreWriter

COMMIT_DOCUMENTS = 5000
COMMIT_S = 10.0
SAMPLE_SEQUENCES = 4


class Sample(NamedTuple):
    """What the whole model makes of a few real sequences, to verify tails on."""

    n_layers: int
    activations: dict[str, Float[Tensor, "n sequence_length d_model"]]
    logits: Float[Tensor, "n sequence_length vocabulary"]
    lengths: Int[Tensor, " n"]


def write_sequences(writer: StoreWriter, corpus: Corpus, model: LanguageModel, stop: StopRequest | None = None) -> None:
    """Phase 1: the sequences of both splits, with a commit every few thousand documents or seconds."""
    if writer.planned:
        return
    stop = stop or StopRequest()
    recipe = writer.manifest.recipe
    tokenizer = model.tokenizer()
    wanted, unit = budgets_of(recipe)
    done = writer.progress.get("counts")
    sequencer = Sequencer(recipe.sequences, wanted, tokenizer.bos_token_id, done, unit)
    counts = sequencer.counts
    if done:
        say(f"{writer.location} goes on: {counts['documents_read']:,} documents are read.")
    shown, committed, committed_at = n_tokens(counts), counts["documents_read"], time.monotonic()
    with progress(f"{corpus.recipe.name} to sequences", recipe.n_tokens, done=shown) as advance:
        for _ in _read(sequencer, corpus, model, tokenizer, recipe.control):
            advance(n_tokens(counts) - shown)
            shown = n_tokens(counts)
            now = time.monotonic()
            due = counts["documents_read"] - committed >= COMMIT_DOCUMENTS or now - committed_at >= COMMIT_S
            if due or stop.requested:
                writer.commit(sequencer.take_rows(), {"counts": counts})
                committed, committed_at = counts["documents_read"], now
                stop.check(f"{committed:,} documents are read")
    writer.commit(sequencer.take_rows(), {"counts": counts})
    writer.finish_sequences({**counts, "corpus_exhausted": not sequencer.done})


def write_activations(
    writer: StoreWriter, capture: Capture, stop: StopRequest | None = None, ours: Ranks = ALONE
) -> tuple[int, float]:
    """Phase 2: every shard that is not on disk yet, or this rank's. One is written while the model works on the next.

    Returns the number of tokens that the model read, and the seconds it took.
    """
    stop = stop or StopRequest()
    writer.fit_codec(lambda shard: capture.run(writer.tokens(shard), writer.lengths(shard)))
    missing = writer.missing_shards()
    total = n_tokens(writer.manifest.counts)
    to_do = sum(int(writer.lengths(shard).sum()) for shard in missing) // ours.world
    total, n_read = (to_do if ours.several else total), 0
    n_shards = len(writer.shards())
    if len(missing) < n_shards:
        say(f"{writer.location} goes on: {n_shards - len(missing)} of {n_shards} shards are on disk.")
    start = time.monotonic()
    title = f"{capture.model.name} to {', '.join(hook.requested for hook in capture.hooks)}"
    with progress(title, total, done=total - to_do) as advance, ThreadPoolExecutor(1) as pool:
        pending: Future[None] | None = None
        for shard in dealt(writer, ours):
            if stop.requested:
                break
            activations = capture.run(writer.tokens(shard), writer.lengths(shard))
            if pending is not None:
                pending.result()
            pending = pool.submit(write_beside, writer, shard, activations)
            advance(n := int(writer.lengths(shard).sum()))
            n_read += n
        if pending is not None:
            pending.result()
    stop.check(f"{n_shards - len(writer.missing_shards())} of {n_shards} shards are on disk")
    return n_read, time.monotonic() - start


def sample(writer: StoreWriter, capture: Capture) -> Sample:
    """The first few train sequences through the whole model, in float32 as tails are."""
    if capture.dtype != "float32":
        requested = [hook.requested for hook in capture.hooks]
        capture = Capture(capture.model, requested, capture.batch_size)
    shard = writer.shards()[0]
    tokens, lengths = writer.tokens(shard)[:SAMPLE_SEQUENCES], writer.lengths(shard)[:SAMPLE_SEQUENCES]
    activations, logits = capture.run_whole(tokens)
    return Sample(capture.n_layers, activations, logits, torch.from_numpy(lengths).long())


def write_tails(writer: StoreWriter, model: LanguageModel, sample: Sample) -> tuple[dict[str, Any], list[str]]:
    """What the model does after each hook, where that can be saved and agrees with the whole model on `sample`.

    Returns, per hook, {"layers": n, "max_difference": nats} or {"none": why}; and the keys of the files written.
    """
    plain = None
    tails: dict[str, Any] = {}
    files: list[str] = []
    for hook in writer.manifest.recipe.hooks:
        try:
            start = tail_start(hook.canonical, sample.n_layers)
            plain = plain or load_plain(model)
            with tempfile.TemporaryDirectory(dir=_beside(writer), suffix=PARTIAL) as folder:
                path = Path(folder) / "tail"
                save_tail(make_tail(plain, start), path)
                tail = Tail.load(path).model
                difference = verify_tail(tail, sample.activations[hook.requested], sample.logits, sample.lengths)
                files += writer.add_folder(f"tail/{hook.requested}", path)
        except TailError as error:
            tails[hook.requested] = {"none": str(error)}
        else:
            tails[hook.requested] = {"layers": sample.n_layers - start, "max_difference": float(f"{difference:.1e}")}
    return tails, files


def write_tokenizer(writer: StoreWriter, model: LanguageModel) -> list[str]:
    """The tokenizer, so that the store's tokens can be read as text. Returns the keys of the files written."""
    with tempfile.TemporaryDirectory(dir=_beside(writer), suffix=PARTIAL) as folder, quiet():
        model.tokenizer().save_pretrained(folder)
        return writer.add_folder("tokenizer", Path(folder))


def _beside(writer: StoreWriter) -> Path | None:
    """Where files are made that a store will hold: on its own disk, if it has one."""
    return writer.objects.root if isinstance(writer.objects, LocalObjects) else None


def _read(
    sequencer: Sequencer, corpus: Corpus, model: LanguageModel, tokenizer: Any, control: ControlRecipe | None
) -> Iterator[None]:
    """Feed the corpus to the sequencer, from where its counts stand; yields after every batch of documents."""
    if sequencer.done:
        return
    every, n_vocabulary = sequencer.recipe.eval_every, model.config().get_text_config().vocab_size
    for documents in corpus.batches(start=sequencer.counts["documents_read"]):
        splits = [split_of(document, every) for document in documents]
        wanted = [i for i, split in enumerate(splits) if not sequencer.is_full(split)]
        ids = _ids([documents[i] for i in wanted], tokenizer, n_vocabulary)
        found = dict(zip(wanted, ids, strict=True))
        for i, split in enumerate(splits):
            if i in found and control is not None and control.kind == PERMUTED:
                found[i] = permuted(found[i], control.seed, sequencer.counts["documents_read"])
            sequencer.add(split, found.get(i, []))
            if sequencer.done:
                break
        yield
        if sequencer.done:
            return


def _ids(documents: list[Document], tokenizer: Any, n_vocabulary: int) -> list[list[int]]:
    """Token ids of documents. Raises DataError for ids that the model has not."""
    if not documents or isinstance(documents[0], str):
        return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    found = [one for one in documents if not isinstance(one, str)]
    for ids in found:
        if ids and not 0 <= min(ids) <= max(ids) < n_vocabulary:
            raise DataError(
                f"A document has token ids from {min(ids)} to {max(ids)}; the model has 0 to {n_vocabulary - 1}. Give "
                "data that this model's tokenizer made, or the text: --text-field NAME."
            )
    return found
