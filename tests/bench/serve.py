"""How fast `tcsae serve` answers: seconds until a text of 128 tokens is read, and until one latent is changed.

    tcsae harvest train eval report
    python tests/bench/serve.py [--store data/activations.zarr] [--runs data/runs] [--report data/report] [--model PATH]

The server is a process of its own. The first answer is the first after the address is printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from urllib.request import Request, urlopen

SENTENCE = "The function returns a list of tokens, sorted by position. "
ASKED = 10
"""Times that each question is asked."""


def ask(address: str, name: str, question: dict) -> tuple[float, dict]:
    """(seconds, answer)."""
    start = time.perf_counter()
    with urlopen(Request(f"{address}answer/{name}", json.dumps(question).encode())) as answer:
        result = json.loads(answer.read())
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/activations.zarr")
    parser.add_argument("--runs", default="data/runs")
    parser.add_argument("--report", default="data/report")
    parser.add_argument("--model", help="Where the store's language model lies, if it was a local folder.")
    asked = parser.parse_args()
    arguments = ["--store", asked.store, "--runs", asked.runs, "serve", "--report", asked.report]
    arguments += ["--model", asked.model] if asked.model else []
    start = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "tcsae", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().rpartition(": ")[2].strip()
        if not address.startswith("http"):
            sys.exit("The server did not start: what it says stands above.")
        figures = {"start_s": time.perf_counter() - start}
        text = SENTENCE * 10  # some 128 tokens of the embedded tokenizer
        run = ask(address, "runs", {})[1]["runs"][0]["name"]
        figures["first_s"], result = ask(address, "read", {"run": run, "text": text})
        figures["tokens"] = len(result["tokens"])
        figures["read_s"] = statistics.median(ask(address, "read", {"run": run, "text": text})[0] for _ in range(ASKED))
        change = {"run": run, "text": text, "kind": "clamp", "value": 10.0, "n_continued": 0}
        change["latent"] = result["latents"][5][0][0]
        figures["kl_s"] = statistics.median(ask(address, "change", change)[0] for _ in range(ASKED))
        figures["continue_12_s"] = ask(address, "change", change | {"n_continued": 12})[0]
    finally:
        server.terminate()
        server.wait()
    for name, value in figures.items():
        print(f"{name:14} {value:,.2f}")
    print(json.dumps({"bench": "serve"} | figures))


if __name__ == "__main__":
    main()
