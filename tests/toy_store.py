"""A small store of every kind of object, which the tests of reading, verifying and locking share."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tcsae.shared.store.format import CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.writer import Rows, open_writer

HOOK, LENGTH, WIDTH = "blocks.4.hook_resid_post", 5, 4
CONFIG, WEIGHTS = f"tail/{HOOK}/config.json", f"tail/{HOOK}/model.safetensors"


def make(path: Path, codec: str = "compact", **spoilt) -> Path:
    """A store of 5 + 3 sequences; `spoilt` replaces rows, counts or files by what cannot be."""
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        codec=codec,
        codec_error=1e-2 if codec == "compact" else None,
        n_tokens=40,
    )
    writer = open_writer(str(path), recipe, Layout(sequences_per_chunk=2, sequences_per_token_chunk=4))
    rows, counts = {}, {}
    for split, n, first in (("train", 5, 10), ("eval", 3, 20)):
        lengths = np.array([5, 2, 5, 4, 3][:n], np.int32)
        tokens = np.where(np.arange(LENGTH) < lengths[:, None], 7, 0).astype(np.int32)
        documents = first + np.array([0, 0, 1, 2, 3][:n])
        rows[split] = Rows(tokens, lengths, documents, np.array([0, 5, 0, 0, 0][:n], np.int32))
        counts[split] = {"sequences": n, "tokens": int(lengths.sum()), "documents": int(np.unique(documents).size)}
    for name, value in spoilt.get("rows", {}).items():
        setattr(rows["eval"], name, value)
    writer.commit(rows, {})
    writer.finish_sequences(spoilt.get("counts", counts))
    rng = np.random.default_rng(0)

    def run(shard) -> dict:
        return {HOOK: rng.normal(size=(shard.stop - shard.start, LENGTH, WIDTH)).astype(np.float32)}

    writer.fit_codec(run)
    for shard in writer.missing_shards():
        writer.write_shard(shard, run(shard))
    files = {
        CONFIG: json.dumps({"model_type": "gpt_neox"}).encode(),
        WEIGHTS: save({"weight": np.zeros((2, 2), np.float32)}),
        "tokenizer/tokenizer.json": b'{"version": "1.0"}',
    } | spoilt.get("files", {})
    for key, data in files.items():
        writer.add_file(key, data)
    tails = {HOOK: {"layers": 1, "max_difference": 0.0}}
    writer.seal(spoilt.get("tails", tails), [key for key in files if key not in spoilt.get("unnamed", ())], {})
    return path
