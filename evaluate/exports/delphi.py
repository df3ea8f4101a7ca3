"""Cached latents for delphi, so that it explains features without running the language model again.

latents/HOOK/FIRST_LAST.safetensors, a file a range of latents: locations [n, 3] (context, position, latent within the
range) in uint16 or uint32, activations [n] in float16, tokens [n_contexts, context_length]; and config.json. delphi's
`LatentDataset(raw_dir=OUT/latents, tokenizer=...)` reads it. delphi's contexts are all of one length, without padding:
sequences are cut into whole contexts, and what is left over of each is left out.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Int
from numpy import ndarray

from tcsae.evaluate.batches import EvalBatch, batches
from tcsae.evaluate.exports.feature_source import FeatureSource, split_edges
from tcsae.evaluate.measures.core import join_codes
from tcsae.evaluate.systems import code_parts
from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import write_atomic, write_json
from tcsae.shared.sae.sparse import SparseCode, positive_code

N_SPLITS = 5
"""Ranges of latents, as delphi has by default."""
CONTEXT_LENGTH = 32
"""delphi's example_ctx_len, of which a context has to be a multiple. Its own caches have 256: more than a sequence."""
LATENTS, TOKENIZER = "latents", "tokenizer"


class Written(NamedTuple):
    """What an export holds."""

    n_contexts: int
    n_activations: int
    n_left_out: int
    """Valid tokens beyond the last whole context of their sequence."""


class _Range:
    """The activations of a range of latents, on disk until they are complete."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._locations, self._values = (folder / f"{first}.{name}" for name in ("locations", "values"))
        self.n = 0

    def add(self, locations: Int[ndarray, "n 3"], values: ndarray) -> None:
        ours = (locations[:, 2] >= self.first) & (locations[:, 2] <= self.last)
        with self._locations.open("ab") as file:
            (locations[ours] - [0, 0, self.first]).astype(np.uint32).tofile(file)
        with self._values.open("ab") as file:
            values[ours].astype(np.float16).tofile(file)
        self.n += int(ours.sum())

    def write(self, folder: Path, tokens: Int[ndarray, "n_contexts context_length"]) -> None:
        locations = np.fromfile(self._locations, np.uint32).reshape(-1, 3)
        if locations.max(initial=0) < 1 << 16:
            locations = locations.astype(np.uint16)
        data: dict[str, np.ndarray] = {
            "locations": locations,
            "activations": np.fromfile(self._values, np.float16),
            "tokens": tokens,
        }
        write_atomic(folder / f"{self.first}_{self.last}.safetensors", safetensors.numpy.save(data))


@torch.inference_mode()
def write_delphi(
    source: FeatureSource, folder: Path, context_length: int | None, advance: Callable[[int], None]
) -> Written:
    """Write the cache below `folder`. Raises StoreError if no sequence holds a whole context."""
    length = context_length or min(CONTEXT_LENGTH, source.store.sequence_length)
    per_sequence = source.lengths // length
    first_context = np.cumsum(per_sequence) - per_sequence
    if not per_sequence.any():
        raise StoreError(
            f"No sequence of {source.store.location} has {length} tokens; the longest has "
            f"{source.lengths.max(initial=0)}. Give a shorter --context-length."
        )
    part = source.part
    in_whole_contexts = np.arange(source.store.sequence_length) < (per_sequence * length)[:, None]
    tokens = part.tokens[in_whole_contexts].reshape(-1, length).astype(np.int64)
    module = folder / LATENTS / part.hook
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        ranges = [_Range(Path(spool), *edges) for edges in split_edges(source.sae.config.d_sae, N_SPLITS)]
        for batch in batches(part.split, part.hook, part.rules, part.max_tokens):
            locations, values = _entries(source, batch, length, first_context)
            for one in ranges:
                one.add(locations, values)
            advance(int(batch.lengths.sum()))
        for one in ranges:
            one.write(module, tokens)
    write_json(module / "config.json", _config(source, length, tokens.size))
    if (tokenizer := source.store.tokenizer_path) is not None:
        for file in sorted(path for path in tokenizer.rglob("*") if path.is_file()):
            write_atomic(folder / TOKENIZER / file.relative_to(tokenizer), file.read_bytes())
    return Written(len(tokens), sum(one.n for one in ranges), int(source.lengths.sum()) - tokens.size)


def _entries(
    source: FeatureSource, batch: EvalBatch, length: int, first_context: Int[ndarray, " n_sequences"]
) -> tuple[Int[ndarray, "n 3"], ndarray]:
    """(context, position, latent) and value of each active entry in whole contexts."""
    x = batch.x[batch.counted]
    if not len(x):
        return np.zeros((0, 3), np.int64), np.zeros(0, np.float32)
    code = join_codes([code for _, code in code_parts(source.sae, x)])
    sparse = code if isinstance(code, SparseCode) else positive_code(code)
    on = sparse.values > 0
    sequence, position = (one.numpy() for one in batch.counted.nonzero()[sparse.rows[on]].T)
    latents, values = sparse.latents[on].numpy(), sparse.values[on].numpy()
    inside = position < batch.lengths.numpy()[sequence] // length * length
    context = first_context[batch.start + sequence] + position // length
    locations = np.stack([context, position % length, latents], axis=1)
    return locations[inside], values[inside]


def _config(source: FeatureSource, length: int, n_tokens: int) -> dict[str, object]:
    """What delphi's CacheConfig says, and the model's name."""
    corpus = source.store.manifest.recipe.corpus
    return {
        "dataset_repo": corpus.name,
        "dataset_split": corpus.split,
        "dataset_name": corpus.config or "",
        "dataset_column": corpus.field,
        "batch_size": source.store.manifest.recipe.model.batch_size,
        "cache_ctx_len": length,
        "ctx_len": length,
        "n_tokens": n_tokens,
        "n_splits": N_SPLITS,
        "model_name": source.model,
    }
