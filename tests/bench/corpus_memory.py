"""Peak memory of a harvest from a packed corpus at two sizes: it may grow with the longest document, not with the file.

    python tests/bench/corpus_memory.py [--packed-mb 40 400] [--document-kb 4 10000]

JSON lines of random words in a .gz of so many MB. For each size and length of document: a process that reads every
document of it, and one that harvests from it (a small GPT-NeoX with random weights). The peak of each is what the
system counts (libraries included).
"""

import argparse
import base64
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from alternate import report
from harvest_memory import HOOK, save_small_model

N_TOKENS = 100_000
ROUND = 1 << 20


def save_corpus(path: Path, packed_bytes: int, document_bytes: int) -> None:
    """Documents of random base64 in words of seven characters: a quarter less when packed."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        text = ""
        while path.stat().st_size < packed_bytes or not file.tell():
            raw = base64.b64encode(os.urandom(ROUND)).decode()
            text += " ".join(raw[i : i + 7] for i in range(0, len(raw), 7))
            while len(text) >= document_bytes:
                file.write(json.dumps({"text": text[:document_bytes], "id": "2024-01-31"}).encode() + b"\n")
                text = text[document_bytes:]


def read(data: str) -> int:
    """Every document; returns how many."""
    from tcsae.harvest.documents import CorpusChoice, find_corpus

    return sum(len(batch) for batch in find_corpus(CorpusChoice(name=data)).batches())


def harvest(data: str, model: str, location: str) -> int:
    """A harvest; returns its tokens."""
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.resolve import HarvestConfig, ModelChoice
    from tcsae.harvest.run import harvest as run

    config = HarvestConfig(
        model=ModelChoice(name=model), corpus=CorpusChoice(name=data), hooks=(HOOK,), n_tokens=N_TOKENS
    )
    run(location, config)
    return N_TOKENS


def child(what: str, *arguments: str) -> None:
    n = {"read": read, "harvest": harvest}[what](*arguments)
    print(json.dumps([n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def measure(what: str, *arguments: str) -> tuple[int, int]:
    command = [sys.executable, __file__, "--child", what, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    n, peak = json.loads(done.stdout.splitlines()[-1])
    return n, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed-mb", type=int, nargs=2, default=(40, 400))
    parser.add_argument("--document-kb", type=int, nargs="+", default=(4, 10_000))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_small_model(folder / "model")
        for kb in asked.document_kb:
            for mb in asked.packed_mb:
                data = folder / "corpus.jsonl.gz"
                save_corpus(data, mb << 20, kb << 10)
                for what, arguments in {"read": (), "harvest": (str(model), str(folder / f"{kb}-{mb}.zarr"))}.items():
                    n, peaks[f"{what}, {kb} KB, {mb} MB"] = measure(what, str(data), *arguments)
                    peak = peaks[f"{what}, {kb} KB, {mb} MB"] / 1e6
                    print(f"{what:8} documents of {kb:6,d} KB, {mb:4d} MB packed: {n:8,d}, {peak:6.0f} MB at the peak")
    report("corpus_memory", peaks=peaks)


if __name__ == "__main__":
    main()
