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

from tcsae.harvest.capture import Capture, load_plain, quiet
from tcsae.harvest.corpus import Corpus
from tcsae.harvest.language_model import LanguageModel
from tcsae.harvest.sequences import Sequencer, budgets, n_tokens, split_of
from tcsae.shared.console import progress
from tcsae.shared.files import PARTIAL
from tcsae.shared.tail import Tail, TailError, make_tail, save_tail, tail_start, verify_tail
from tcsae.shared.writer import StoreWriter

COMMIT_DOCUMENTS = 5000
COMMIT_S = 10.0
SAMPLE_SEQUENCES = 4


class Sample(NamedTuple):
    """What the whole model makes of a few real sequences, to verify tails on."""

    n_layers: int
    activations: dict[str, Float[Tensor, "n sequence_length d_model"]]
    logits: Float[Tensor, "n sequence_length vocabulary"]
    lengths: Int[Tensor, " n"]


def write_sequences(writer: StoreWriter, corpus: Corpus, model: LanguageModel) -> None:
    """Phase 1: the sequences of both splits, with a commit every few thousand documents or seconds."""
    if writer.planned:
        return
    recipe = writer.manifest.recipe
    tokenizer = model.tokenizer()
    sequencer = Sequencer(
        recipe.sequences,
        budgets(recipe.n_tokens, recipe.sequences.eval_every),
        tokenizer.bos_token_id,
        writer.progress.get("counts"),
    )
    counts = sequencer.counts
    shown, committed, committed_at = n_tokens(counts), counts["documents_read"], time.monotonic()
    with progress(f"{corpus.recipe.name} to sequences", recipe.n_tokens, done=shown) as advance:
        for _ in _read(sequencer, corpus, tokenizer):
            advance(n_tokens(counts) - shown)
            shown = n_tokens(counts)
            now = time.monotonic()
            if counts["documents_read"] - committed >= COMMIT_DOCUMENTS or now - committed_at >= COMMIT_S:
                writer.commit(sequencer.take_rows(), {"counts": counts})
                committed, committed_at = counts["documents_read"], now
    writer.commit(sequencer.take_rows(), {"counts": counts})
    writer.finish_sequences({**counts, "corpus_exhausted": not sequencer.done})


def write_activations(writer: StoreWriter, capture: Capture) -> tuple[int, float]:
    """Phase 2: every shard that is not on disk yet. One is written while the model works on the next.

    Returns the number of tokens that the model read, and the seconds it took.
    """
    missing = writer.missing_shards()
    total = n_tokens(writer.manifest.counts)
    to_do = sum(int(writer.lengths(shard).sum()) for shard in missing)
    start = time.monotonic()
    title = f"{capture.model.name} to {', '.join(hook.requested for hook in capture.hooks)}"
    with progress(title, total, done=total - to_do) as advance, ThreadPoolExecutor(1) as pool:
        pending: Future[None] | None = None
        for shard in missing:
            activations = capture.run(writer.tokens(shard), writer.lengths(shard))
            if pending is not None:
                pending.result()
            pending = pool.submit(writer.write_shard, shard, activations)
            advance(int(writer.lengths(shard).sum()))
        if pending is not None:
            pending.result()
    return to_do, time.monotonic() - start


def sample(writer: StoreWriter, capture: Capture) -> Sample:
    """The first few train sequences through the whole model."""
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
            with tempfile.TemporaryDirectory(dir=writer.root, suffix=PARTIAL) as folder:
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
    with tempfile.TemporaryDirectory(dir=writer.root, suffix=PARTIAL) as folder, quiet():
        model.tokenizer().save_pretrained(folder)
        return writer.add_folder("tokenizer", Path(folder))


def _read(sequencer: Sequencer, corpus: Corpus, tokenizer: Any) -> Iterator[None]:
    """Feed the corpus to the sequencer, from where its counts stand; yields after every batch of documents."""
    if sequencer.done:
        return
    every = sequencer.recipe.eval_every
    for texts in corpus.batches(start=sequencer.counts["documents_read"]):
        splits = [split_of(text, every) for text in texts]
        wanted = [i for i, split in enumerate(splits) if not sequencer.is_full(split)]
        ids: dict[int, list[int]] = {}
        if wanted:
            encoded = tokenizer([texts[i] for i in wanted], add_special_tokens=False, verbose=False)["input_ids"]
            ids = dict(zip(wanted, encoded, strict=True))
        for i, split in enumerate(splits):
            sequencer.add(split, ids.get(i, []))
            if sequencer.done:
                break
        yield
        if sequencer.done:
            return
