"""The steps of a harvest, in order. Each goes on from what the writer finds on disk."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tcsae.harvest.capture import Capture
from tcsae.harvest.chat import ChatChoice, Marked, chat_template
from tcsae.harvest.documents import Corpus
from tcsae.harvest.language_model import LanguageModel, load_plain, quiet
from tcsae.harvest.sequences import Sequencer, TokenReader, budgets_of, n_tokens, permuted, split_of
from tcsae.shared.base.console import progress, say
from tcsae.shared.base.files import PARTIAL
from tcsae.shared.base.signals import StopRequest
from tcsae.shared.lm.tail import Tail, TailError, make_tail, save_tail, tail_start, verify_tail
from tcsae.shared.store.format import PERMUTED, ControlRecipe, Shard
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.writer import StoreWriter

COMMIT_DOCUMENTS = 5000
COMMIT_S = 10.0
SAMPLE_SEQUENCES = 4
NOTHING = Marked(np.zeros(0, np.int32))


class Sample(NamedTuple):
    """What the whole model makes of a few real sequences, each unpadded, to verify tails on; zero beyond a length."""

    activations: dict[str, Float[Tensor, "n sequence_length d_model"]]
    logits: Float[Tensor, "n sequence_length vocabulary"]
    lengths: Int[Tensor, " n"]


def write_sequences(
    writer: StoreWriter, corpus: Corpus, model: LanguageModel, stop: StopRequest, chat: ChatChoice | None = None
) -> None:
    """Phase 1: the sequences of both splits, with a commit every few thousand documents or seconds."""
    if writer.planned:
        return
    recipe = writer.manifest.recipe
    reader = TokenReader(model, corpus, recipe.sequences.prepend_bos, chat_template(chat, model) if chat else None)
    budget, unit = budgets_of(recipe)
    done = writer.progress.get("counts")
    sequencer = Sequencer(recipe.sequences, budget, reader.bos_id, done, unit, recipe.roles)
    counts = sequencer.counts
    if done:
        say(f"{writer.location} goes on: {counts['documents_read']:,} documents are read.")
    shown, committed, committed_at = n_tokens(counts), counts["documents_read"], time.monotonic()
    with progress(f"{corpus.recipe.name} to sequences", recipe.n_tokens, done=shown) as advance:
        for _ in _read(sequencer, replace(corpus, pad_id=reader.pad_id), reader, recipe.control):
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
    if reader.template is not None and (n := reader.template.n_unmarked):
        say(f"{n:,} messages are not in the text as they stand in the data (the template changes them): not marked.")


def write_activations(
    writer: StoreWriter,
    capture: Capture,
    shards: Iterable[Shard],
    write: Callable[[Shard, dict[str, ndarray]], None],
    stop: StopRequest,
    n_processes: int = 1,
) -> tuple[int, float]:
    """Phase 2: activations of `shards`, this process's. One is written while the model works on the next.

    Returns the number of tokens that the model read, and the seconds it took.
    """
    missing, n_shards = writer.missing_shards(), len(writer.shards())
    to_do = sum(int(writer.lengths(shard).sum()) for shard in missing) // n_processes
    total = to_do if n_processes > 1 else n_tokens(writer.manifest.counts)
    if len(missing) < n_shards:
        say(f"{writer.location} goes on: {n_shards - len(missing)} of {n_shards} shards are on disk.")
    n_read, start = 0, time.monotonic()
    title = f"{capture.model.name} to {', '.join(hook.requested for hook in capture.hooks)}"
    with progress(title, total, done=total - to_do) as advance, ThreadPoolExecutor(1) as pool:
        pending: Future[None] | None = None
        for shard in shards:
            if stop.requested:
                break
            activations = capture.run(writer.tokens(shard), writer.lengths(shard))
            if pending is not None:
                pending.result()
            pending = pool.submit(write, shard, activations)
            advance(n := int(writer.lengths(shard).sum()))
            n_read += n
        if pending is not None:
            pending.result()
    stop.check(f"{n_shards - len(writer.missing_shards())} of {n_shards} shards are on disk")
    return n_read, time.monotonic() - start


def sample(writer: StoreWriter, capture: Capture) -> Sample:
    """The first few train sequences, cut to different lengths, through the whole model one by one."""
    shard = writer.shards()[0]
    tokens, lengths = writer.tokens(shard)[:SAMPLE_SEQUENCES], writer.lengths(shard)[:SAMPLE_SEQUENCES]
    shares = np.arange(len(lengths), 0, -1) / len(lengths)
    lengths = np.maximum(1, (lengths * shares).astype(np.int64))
    passes = [capture.run_whole(row[None, :n]) for row, n in zip(tokens, lengths, strict=True)]
    activations = {
        hook.requested: pad_sequence([caught[hook.requested][0] for caught, _ in passes], batch_first=True)
        for hook in capture.hooks
    }
    logits = pad_sequence([logits[0] for _, logits in passes], batch_first=True)
    return Sample(activations, logits, torch.from_numpy(lengths))


def write_tails(writer: StoreWriter, capture: Capture) -> tuple[dict[str, Any], list[str]]:
    """What the model does after each hook, where that can be saved and agrees with the whole model on real sequences.

    `capture` is in float32, as tails are. Returns, per hook, {"layers": n, "max_difference": nats} or {"none": why};
    and the keys of the files written.
    """
    few: Sample | None = None
    tails: dict[str, Any] = {}
    files: list[str] = []
    for hook in writer.manifest.recipe.hooks:
        try:
            start = tail_start(hook.canonical, capture.n_layers)
            if not capture.causal:
                raise TailError(
                    f"No tail: {capture.model.name} looks at later tokens, so it does not predict the next one."
                )
            few = few or sample(writer, capture)
            with tempfile.TemporaryDirectory(dir=_beside(writer), suffix=PARTIAL) as folder:
                path = Path(folder) / "tail"
                save_tail(make_tail(capture.plain or load_plain(capture.model), start), path)
                tail = Tail.load(path).model
                difference = verify_tail(tail, few.activations[hook.requested], few.logits, few.lengths)
                files += writer.add_folder(f"tail/{hook.requested}", path)
        except TailError as error:
            tails[hook.requested] = {"none": str(error)}
        else:
            layers = capture.n_layers - start
            tails[hook.requested] = {"layers": layers, "max_difference": float(f"{difference:.1e}")}
    return tails, files


def write_tokenizer(writer: StoreWriter, model: LanguageModel) -> list[str]:
    """The tokenizer, so that the store's tokens can be read as text. Returns the keys of the files written."""
    with tempfile.TemporaryDirectory(dir=_beside(writer), suffix=PARTIAL) as folder, quiet():
        model.tokenizer().save_pretrained(folder)
        for code in Path(folder).rglob("*.py"):  # no store holds code that a reader might run
            code.unlink()
        return writer.add_folder("tokenizer", Path(folder))


def _beside(writer: StoreWriter) -> Path | None:
    """Where files are made that a store will hold: on its own disk, if it has one."""
    return writer.objects.root if isinstance(writer.objects, LocalObjects) else None


def _read(sequencer: Sequencer, corpus: Corpus, reader: TokenReader, control: ControlRecipe | None) -> Iterator[None]:
    """Feed the corpus to the sequencer, from where its counts stand; yields after every batch of documents."""
    if sequencer.done:
        return
    every = sequencer.recipe.eval_every
    for documents in corpus.batches(start=sequencer.counts["documents_read"]):
        first = sequencer.counts["documents_read"]
        splits = [split_of(document, every) for document in documents]
        needed = [i for i, split in enumerate(splits) if not sequencer.is_full(split)]
        read = reader.marked([documents[i] for i in needed], [first + i for i in needed])
        read_of = dict(zip(needed, read, strict=True))
        for i, split in enumerate(splits):
            marked: Marked = read_of.get(i, NOTHING)
            ids, roles = marked
            if i in read_of and control is not None and control.kind == PERMUTED:
                number = sequencer.counts["documents_read"]
                ids = np.asarray(permuted(ids, control.seed, number), np.int32)
                if roles is not None:
                    roles = np.asarray(permuted(roles.tolist(), control.seed, number), np.uint8)
            sequencer.add(split, ids, roles)
            if sequencer.done:
                break
        yield
        if sequencer.done:
            return
