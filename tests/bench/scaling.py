"""What a corpus costs on many GPUs: time, bytes, requests and money of harvest and training, and the bottleneck.

    python tests/bench/scaling.py [--gpus 1 8 64] [--saes 1 4 16 64] [--lm-rate 250K] [--json]

Arithmetic, no measurement: every assumption is a flag, printed with where its default comes from. docs/scaling.md
explains the model and shows the output.
"""

import argparse
import json
import math
from dataclasses import dataclass

from assumptions import Assumption, parse_assumptions

HOUR, MONTH_H = 3600.0, 730.0


ASSUMPTIONS = {
    "tokens": Assumption(9e9, "tokens of the corpus", "OpenWebText: 8M documents, about 9B GPT-2 tokens"),
    "d_model": Assumption(512, "width of the hook", "Pythia-70m"),
    "n_hooks": Assumption(1, "hooks stored", "chosen"),
    "bytes_per_number": Assumption(2, "of the codec: float16 2, int8 1.008, compact about 0.44", "data/README.md"),
    "padding": Assumption(1.05, "stored over valid positions, of codecs without a compressor", "long web pages"),
    "chunk_mb": Assumption(4.2, "MB of an object", "layout_for: about 4 MiB"),
    "phase1_rate": Assumption(700e3, "tokens/s, text to sequences, by rank 0 alone", "assumed; --dry-run shows it"),
    "lm_rate": Assumption(400e3, "tokens/s of the language model up to the hook, a GPU", "assumed: 70M on an A100"),
    "write_rate": Assumption(1.2e6, "tokens/s encoded, digested and handed over, a process", "assumed; see --dry-run"),
    "read_rate": Assumption(750e3, "tokens/s of the loader, a process", "tests/bench/loader.py, one core, d 512"),
    "step_rate": Assumption(1.5e6, "tokens/s of training one SAE, a GPU", "assumed: 512 -> 4096, TopK"),
    "passes": Assumption(1, "epochs of training over the store", "chosen"),
    "saes_per_pass": Assumption(4, "SAEs that one GPU trains from one pass: those of one idea", "chosen"),
    "gpus_per_node": Assumption(8, "GPUs that share a network card", "usual"),
    "node_gbps": Assumption(12.5, "GB/s of a node's network", "assumed: 100 Gbit/s"),
    "bucket_gbps": Assumption(100, "GB/s of the bucket, all together", "assumed"),
    "gpu_price": Assumption(2.0, "dollars a GPU hour", "assumed"),
    "store_price": Assumption(0.023, "dollars a GB month", "S3 standard, list price"),
    "put_price": Assumption(0.005, "dollars a thousand PUT", "S3 standard, list price"),
    "get_price": Assumption(0.0004, "dollars a thousand GET", "S3 standard, list price"),
    "months": Assumption(1, "months that the store is kept", "chosen"),
}


@dataclass(frozen=True)
class Stage:
    """What a stage takes on some number of GPUs."""

    hours: float
    bottleneck: str
    gpu_hours: float
    requests: float
    dollars: float


class Plan:
    """The arithmetic over one set of assumptions."""

    def __init__(self, values: dict[str, float]) -> None:
        self.v = values
        self.bytes_per_token = values["d_model"] * values["n_hooks"] * values["bytes_per_number"] * values["padding"]
        self.store_gb = values["tokens"] * self.bytes_per_token / 1e9
        self.objects = math.ceil(self.store_gb * 1e3 / values["chunk_mb"])

    def network(self, n: int) -> float:
        """Tokens/s that n processes can move to or from the store."""
        nodes = math.ceil(n / self.v["gpus_per_node"])
        return min(nodes * self.v["node_gbps"], self.v["bucket_gbps"]) * 1e9 / self.bytes_per_token

    def harvest(self, n: int) -> Stage:
        """Phase 1 on one process, then phase 2 on all: the model, while the shard before is written."""
        v = self.v
        limits = {
            "language model": n * v["lm_rate"],
            "encoding": n * v["write_rate"],
            "network": self.network(n),
        }
        slowest = min(limits, key=lambda name: limits[name])
        first, second = v["tokens"] / v["phase1_rate"] / HOUR, v["tokens"] / limits[slowest] / HOUR
        where = slowest if second >= first else f"phase 1 on rank 0 ({first:.1f} h), then {slowest}"
        gpu_hours = n * (first + second)
        requests = 2.0 * self.objects  # each shard and its record
        dollars = gpu_hours * v["gpu_price"] + requests / 1e3 * v["put_price"]
        return Stage(first + second, where, gpu_hours, requests, dollars)

    def train(self, n: int, saes: int) -> Stage:
        """SAEs dealt out to the GPUs, some to a pass. Fewer SAEs than GPUs leave some idle."""
        v = self.v
        busy, passes, each = self._dealt(n, saes)
        limits = {
            "step": v["step_rate"] / each,
            "loader": v["read_rate"],
            "network": self.network(busy) / busy,
        }
        slowest = min(limits, key=lambda name: limits[name])
        hours = passes * v["tokens"] / limits[slowest] / HOUR
        requests = passes * self.objects * busy
        dollars = busy * hours * v["gpu_price"] + requests / 1e3 * v["get_price"]
        return Stage(hours, slowest, busy * hours, requests, dollars)

    def recompute(self, n: int, saes: int) -> float:
        """GPU hours of the same training where every pass runs the language model: no store, no loader."""
        v = self.v
        busy, passes, each = self._dealt(n, saes)
        seconds = passes * v["tokens"] * (1 / v["lm_rate"] + each / v["step_rate"])
        return busy * seconds / HOUR

    def _dealt(self, n: int, saes: int) -> tuple[int, float, int]:
        """GPUs that are busy, passes over the store of each, SAEs in a pass."""
        busy = min(n, saes)
        each = math.ceil(saes / busy)
        together = min(each, max(1, int(self.v["saes_per_pass"])))
        return busy, math.ceil(each / together) * self.v["passes"], together

    def keeping(self) -> float:
        """Dollars of the store's bytes for as long as it is kept."""
        return self.store_gb * self.v["store_price"] * self.v["months"]

    def cached(self, n: int, saes: int) -> float:
        """Dollars of harvest, training and keeping."""
        return self.harvest(n).dollars + self.train(n, saes).dollars + self.keeping()

    def break_even(self, n: int, most: int = 4096) -> int | None:
        """Fewest SAEs, trained one after the other or dealt out, from which the store is cheaper; None if not ever."""
        for saes in range(1, most + 1):
            if self.cached(n, saes) <= self.recompute(n, saes) * self.v["gpu_price"]:
                return saes
        return None


CODECS = {"float16": (2.0, 1.0), "int8": (1.008, 0.75), "compact": (0.44, 0.35)}
"""Bytes of a number, and speed of reading relative to float16 (tests/bench/codecs.py prints both)."""


def show(plan: Plan, gpus: list[int], saes: list[int]) -> dict:
    """The tables; returns their figures."""
    print(
        f"store: {plan.store_gb / 1e3:.2f} TB, {plan.bytes_per_token:.0f} bytes a token, {plan.objects:,} objects, "
        f"{plan.keeping():,.0f} dollars for {plan.v['months']:g} month(s)"
    )
    result: dict = {"store_gb": plan.store_gb, "objects": plan.objects, "rows": [], "codecs": []}
    print(f"\n{'GPUs':>5s} {'stage':14s} {'hours':>8s} {'GPU h':>8s} {'requests':>11s} {'dollars':>9s}  bottleneck")
    for n in gpus:
        stages = {"harvest": plan.harvest(n)} | {f"train {k} SAEs": plan.train(n, k) for k in saes}
        for name, one in stages.items():
            print(
                f"{n:5d} {name:14s} {one.hours:8.2f} {one.gpu_hours:8.1f} {one.requests:11,.0f} {one.dollars:9,.0f}  "
                f"{one.bottleneck}"
            )
            result["rows"].append({"gpus": n, "stage": name, **vars(one)})
    print(f"\n{'GPUs':>5s} {'SAEs':>5s} {'cached, $':>10s} {'recomputed, $':>14s}")
    for n in gpus:
        for k in saes:
            print(f"{n:5d} {k:5d} {plan.cached(n, k):10,.0f} {plan.recompute(n, k) * plan.v['gpu_price']:14,.0f}")
        even = plan.break_even(n)
        print(f"{n:5d} the store is cheaper from {even} SAEs on" if even else f"{n:5d} the store is never cheaper")
    print(f"\n{'codec':8s} {'TB':>6s} {'$ a month':>10s} {'tokens/s of a node':>19s} {'of a loader':>12s}")
    for name, (n_bytes, speed) in CODECS.items():
        other = Plan(plan.v | {"bytes_per_number": n_bytes, "padding": 1.0 if name == "compact" else plan.v["padding"]})
        row = {"codec": name, "tb": other.store_gb / 1e3, "dollars_a_month": other.store_gb * plan.v["store_price"]}
        row |= {"node_rate": other.network(1), "loader_rate": plan.v["read_rate"] * speed}
        result["codecs"].append(row)
        print(
            f"{name:8s} {row['tb']:6.2f} {row['dollars_a_month']:10,.0f} {row['node_rate']:19,.0f} "
            f"{row['loader_rate']:12,.0f}"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--saes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", action="store_true", help="also a line of JSON at the end")
    arguments, values = parse_assumptions(parser, ASSUMPTIONS)
    print()
    result = show(Plan(values), arguments.gpus, arguments.saes)
    if arguments.json:
        print(json.dumps({"assumptions": values, **result}))


if __name__ == "__main__":
    main()
