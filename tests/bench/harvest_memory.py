"""Peak memory of a harvest at two sizes: it may grow with the model and the shard, not with --tokens.

    python tests/bench/harvest_memory.py [--tokens 500000 4000000]

A small GPT-NeoX with random weights, random token ids from a parquet file; each harvest in a process of its own, whose
peak is what the system counts (libraries included).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from alternate import report
from peers_harvest import VOCABULARY, save_model

HOOK, LENGTH, D_MODEL, DOCUMENT = "blocks.1.hook_resid_post", 128, 64, 400


def save_small_model(folder: Path) -> Path:
    """Two layers of width 64; the tokenizer of `save_model`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    save_model(folder)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=256,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def save_tokens(path: Path, n_tokens: int) -> Path:
    """Documents of 400 random ids, written a thousand at a time."""
    rng, left = np.random.default_rng(0), n_tokens * 3 // 2 // DOCUMENT
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while left > 0:
            n = min(left, 1000)
            ids = rng.integers(1, VOCABULARY, (n, DOCUMENT)).astype(np.int32)
            writer.write_table(pa.table({"input_ids": list(ids)}, schema))
            left -= n
    return path


def child(model: str, data: str, location: str, n_tokens: int) -> None:
    """A harvest, and on stdout the peak before it and at its end, in bytes."""
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.resolve import HarvestConfig, ModelChoice
    from tcsae.harvest.run import harvest

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    config = HarvestConfig(
        model=ModelChoice(name=model),
        corpus=CorpusChoice(name=data, field="input_ids", tokenized=True),
        hooks=(HOOK,),
        n_tokens=n_tokens,
    )
    harvest(location, config)
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=2, default=(500_000, 4_000_000))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child[:3], int(asked.child[3]))
        return
    peaks = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_small_model(folder / "model")
        data = save_tokens(folder / "tokens.parquet", max(asked.tokens))
        for n in asked.tokens:
            command = [sys.executable, __file__, "--child", str(model), str(data), str(folder / f"{n}.zarr"), str(n)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            before, peaks[n] = json.loads(done.stdout.splitlines()[-1])
            print(f"{n:12,d} tokens: {peaks[n] / 1e6:8.0f} MB at the peak, {before / 1e6:.0f} MB of it imports")
    small, large = (peaks[n] for n in asked.tokens)
    print(f"{asked.tokens[1] / asked.tokens[0]:.0f} times the tokens take {large / small:.2f} times the memory")
    report("harvest_memory", peaks=peaks)


if __name__ == "__main__":
    main()
