"""What each representation costs and does to a trained SAE, on a store that is there; and the loader against training.

    python tests/bench/codecs.py --store data/activations.zarr [--seeds 3] [--steps 600] [--only compact:1e-2]
    python tests/bench/codecs.py --demand [--rounds 5]

One core. The store (float16) is written again in every codec, with the same eval split and tail; on each, TopK SAEs of
4 d_model latents are trained with the same seeds and evaluated. Error: mean squared, relative to the variance of the
train tokens below the 99th norm percentile. The second form times the loader on a compact store of width 512, rotation
included, and a TopK step 512 -> 4096; the bar is 5 times.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from alternate import alternate, one_core, report
from click.testing import CliRunner
from step import batches, ours

import tcsae
from tcsae.shared.commands.group import cli
from tcsae.shared.store.codecs import check_codec
from tcsae.shared.store.format import SPLITS, Shard
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

CODECS = ("float16", "float32", "bfloat16", "int8", "compact:1e-1", "compact:1e-2", "compact:1e-3")
COLUMNS = ("bytes/token", "bits/dim", "error", "at pos. 0", "worst dim", "max |off|", "write tok/s", "read tok/s")


def convert(source: Store, location: Path, name: str) -> tuple[Store, float]:
    """The source's activations in another codec, and the seconds that encoding and writing took."""
    codec, _, asked = name.partition(":")
    error = check_codec(codec, float(asked) if asked else None)
    recipe = replace(source.manifest.recipe, codec=codec, codec_error=error)
    # The same chunks, so the same order of batches: what differs in training is the codec.
    writer = open_writer(str(location), recipe, source.manifest.layout)
    assert writer is not None
    parts = {split: source.split(split) for split in SPLITS}
    writer.commit({s: Rows(one.tokens, one.lengths, one.documents, one.starts) for s, one in parts.items()}, {})
    writer.finish_sequences(source.manifest.counts)

    def run(shard: Shard) -> dict[str, np.ndarray]:
        return {hook: parts[shard.split].read(hook, shard.start, shard.stop) for hook in source.hooks}

    writer.fit_codec(run)
    seconds = 0.0
    for shard in writer.missing_shards():
        activations = run(shard)
        start = time.perf_counter()
        writer.write_shard(shard, activations)
        seconds += time.perf_counter() - start
    for key in source.manifest.files:
        writer.add_file(key, (source.root / key).read_bytes())
    writer.seal(source.manifest.tails, list(source.manifest.files), {})
    return open_store(location), seconds


def errors(source: Store, store: Store, hook: str) -> list[float]:
    """Relative squared error of the train split: all, at position 0, in the worst dimension; and the largest."""
    norms, n, step = [], store.train.n_sequences, store.sequences_per_chunk
    off_sum = first_sum = largest = 0.0
    n_tokens = 0
    x_kept: list[np.ndarray] = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        valid = np.arange(store.sequence_length) < store.train.lengths[start:stop, None]
        x, off = source.train.read(hook, start, stop).astype(float), store.train.read(hook, start, stop)
        off = np.square(off - x)
        off_sum = off_sum + off[valid].sum(0)
        first_sum += off[:, 0].sum()
        largest = max(largest, off[valid].max())
        n_tokens += int(valid.sum())
        norms.append(np.linalg.norm(x[valid], axis=1))
        x_kept.append(x[valid])
    norm, x = np.concatenate(norms), np.concatenate(x_kept)
    variance = x[norm <= np.percentile(norm, 99)].var(0)
    per_dim = off_sum / n_tokens
    total = variance.sum()
    return [per_dim.sum() / total, first_sum / n / total, float((per_dim / variance).max()), largest**0.5]


def read_rate(store: Store) -> float:
    """Tokens/s of the loader over an epoch: batches of 4096, decoded."""
    loader = SegmentLoader(store, DataConfig())
    stream = iter(loader)
    next(stream)
    start, n = time.perf_counter(), 0
    for batch in itertools.islice(stream, max(1, loader.n_segments // loader.config.n_segments - 1)):
        n += len(batch.x)
    return n / (time.perf_counter() - start)


def figures(store: Store, runs: Path, seeds: int, steps: int, d_model: int) -> tuple[list[float], list[float]]:
    """Explained variance and CE score of each seed's SAE, on the exact eval split."""
    sweep = ["--sweep", f"init_seed={','.join(map(str, range(seeds)))}"] if seeds > 1 else []
    settings = ["--set", f"sae.d_sae={4 * d_model}", "--set", f"steps={steps}", "--preset", "topk"]
    place = ["--store", store.location, "--runs", str(runs)]
    done = CliRunner().invoke(cli, [*place, "train", *settings, *sweep, "eval"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = [json.loads(path.read_text())["metrics"] for path in sorted(runs.rglob("eval*.json"))]
    assert len(result) == seeds, result
    return [one["explained_variance"] for one in result], [one["ce_loss_score"] for one in result]


def spread(values: list[float], base: list[float]) -> str:
    """Mean difference to the base, seed by seed, and its range."""
    differences = np.subtract(values, base)
    return f"{differences.mean():+.4f} ({differences.min():+.4f} to {differences.max():+.4f})"


def compare(source: Store, names: list[str], seeds: int, steps: int) -> None:
    """The table, a row as soon as it is known."""
    hook = source.hook()
    print("| codec | " + " | ".join(COLUMNS) + " | EV | CE score |\n" + "| --- " * (len(COLUMNS) + 3) + "|")
    base: tuple[list[float], list[float]] | None = None
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            store, seconds = convert(source, Path(folder) / "a.zarr", name)
            parts = [store.root / "train" / "activations" / hook, store.root / "codec" / hook]
            n_bytes = sum(f.stat().st_size for part in parts for f in part.rglob("*") if f.is_file())
            per_token = n_bytes / store.train.n_tokens
            row = [f"{per_token:.1f}", f"{8 * per_token / store.d_model(hook):.2f}"]
            row += [f"{value:.2g}" for value in errors(source, store, hook)]
            n_tokens = store.train.n_tokens + store.eval.n_tokens
            row += [f"{rate / 1000:,.0f}K" for rate in (n_tokens / seconds, read_rate(store))]
            if seeds:
                result = figures(store, Path(folder) / "runs", seeds, steps, store.d_model(hook))
                row += [f"{np.mean(v):.4f}" if base is None else spread(v, b) for v, b in zip(result, base or result)]  # noqa: B905
                base = base or result
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def demand(rounds: int) -> None:
    """The loader on a compact store of width 512 against a TopK step 512 -> 4096."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        location, spectrum = str(Path(folder) / "a.zarr"), np.arange(1, 513) ** -0.6
        rotation = np.linalg.qr(rng.normal(size=(512, 512)))[0] * spectrum[:, None]
        with tcsae.create_store(location, hooks={"h": 512}, sequence_length=128, codec="compact") as creation:
            for _ in range(16):
                creation.append("train", {"h": rng.standard_normal((128, 128, 512)) @ rotation})
            creation.append("eval", {"h": rng.standard_normal((1, 128, 512))})
        stream = iter(SegmentLoader(open_store(location), DataConfig(buffer_sequences=512)))
        step, _ = ours("topk", batches(), "sae.d_sae=4096")
        loader = "loader, compact"
        times = alternate({loader: lambda: len(next(stream).x), "TopK step 512 -> 4096": step}, rounds, least_s=4.0)
        times.show("token", base=loader)
        print(f"the loader brings {times.ratio('TopK step 512 -> 4096', loader)} times what one TopK run takes; bar: 5")
        report("codecs-demand", times, base=loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/activations.zarr")
    parser.add_argument("--seeds", type=int, default=3, help="0 trains nothing")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", default=list(CODECS), metavar="CODEC", help="float16 is always the first")
    parser.add_argument("--demand", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    one_core()
    if arguments.demand:
        demand(arguments.rounds)
    else:
        names = ["float16", *(name for name in arguments.only if name != "float16")]
        compare(open_store(arguments.store), names, arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
