"""The loader from a store against the same loader over an array in memory, and how well it mixes documents.

    python tests/bench/loader.py [--d-model 512] [--rounds 5]

One core, float16, batches of 4096 tokens, a buffer of 2048 sequences of 128. The bar: at least 300,000 tokens/s, and at
least 0.6 of the loader whose chunks lie in memory.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from alternate import alternate, one_core, report

from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Split, Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

LENGTH, N_SEQUENCES, BATCH_TOKENS = 128, 4096, 4096
HOOK = "blocks.4.hook_resid_post"


def synthetic_store(folder: Path, d_model: int) -> Store:
    """Random activations: 4096 full sequences, 3 of a document."""
    recipe = Recipe(
        model=ModelRecipe(name="none", revision="0"),
        corpus=CorpusRecipe(name="random", revision="0"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=d_model),),
        n_tokens=N_SEQUENCES * LENGTH,
    )
    writer = open_writer(str(folder / "a.zarr"), recipe)
    assert writer is not None
    n = {"train": N_SEQUENCES, "eval": 1}
    writer.commit({split: _rows(n[split]) for split in SPLITS}, {})
    writer.finish_sequences({s: {"sequences": n[s], "tokens": n[s] * LENGTH, "documents": 1} for s in SPLITS})
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        writer.write_shard(
            shard, {HOOK: rng.standard_normal((shard.stop - shard.start, LENGTH, d_model), dtype=np.float32)}
        )
    writer.seal({}, [], {})
    return open_store(folder / "a.zarr")


def _rows(n: int) -> Rows:
    tokens = np.zeros((n, LENGTH), np.int32)
    return Rows(tokens, np.full(n, LENGTH, np.int32), np.arange(n) // 3, np.zeros(n, np.int32))


class InMemory(Split):
    """The train split with its activations in memory: reading a chunk is a copy."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, "train")
        self._values = store.train.read_stored(HOOK, 0, store.train.n_sequences)

    def read_stored(self, hook: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:  # noqa: ARG002
        assert out is not None
        out[:] = self._values[start:stop]
        return out


def mixing(store: Store, config: DataConfig, n_batches: int) -> tuple[float, float]:
    """Distinct documents in a batch: (the loader's mean, an ideal shuffle's over the whole epoch)."""
    loader = SegmentLoader(store, config)
    seen = [len(set(batch.documents.tolist())) for batch in itertools.islice(loader, n_batches)]
    counts = np.bincount(store.train.documents) * (loader.n_segments / store.train.n_sequences)
    ideal = (1 - (1 - counts / loader.n_segments) ** config.n_segments).sum()
    return float(np.mean(seen)), float(ideal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    one_core()
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), arguments.d_model)
        memory = open_store(store.location)
        memory.train = InMemory(memory)
        contestants = {}
        for length in (3, 16, LENGTH):
            config = DataConfig(n_segments=BATCH_TOKENS // length, segment_length=length, skip_first=0)
            for name, source in (("memory", memory), ("store", store)):
                stream = iter(SegmentLoader(source, config))
                contestants[f"{name}, segments of {length}"] = lambda stream=stream: len(next(stream).x)
            result, ideal = mixing(store, config, 50)
            print(f"segments of {length}: {result:.1f} distinct documents a batch, ideal shuffle {ideal:.1f}")
        # A round has to hold whole blocks, as a block is read at once.
        times = alternate(contestants, arguments.rounds, least_s=2.0)
        times.show("token", base="memory, segments of 16")
        for length in (3, 16, LENGTH):
            share = times.ratio(f"memory, segments of {length}", f"store, segments of {length}")
            print(f"segments of {length}: {share} of the speed in memory")
        report("loader", times, base="memory, segments of 16", d_model=arguments.d_model)


if __name__ == "__main__":
    main()
