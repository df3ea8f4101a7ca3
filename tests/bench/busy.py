"""Training on all cores beside another busy process, by how long OpenMP's idle threads spin (GOMP_SPINCOUNT).

    python tests/bench/busy.py [--store data/activations.zarr] [--steps 60] [--rounds 2] [--threads 2]

A pool of threads waits for its slowest. Threads that spin while they wait take the core of the one that they wait for
when another process runs there. Every contestant is a process of its own, as the variable is read when torch is
imported; contestants take turns, alone and beside one process that computes without end. `tcsae` sets the variable to
10000 where it is not set (`shared/commands/group.py`).
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

from alternate import report

SPINS = ("", "1000", "10000", "100000")
"""Values of the variable; empty: not set."""
BURN = "while True: sum(range(10**5))"


def step_rate(store_path: str, steps: int) -> float:
    """Tokens a second of bare steps of the preset topk."""
    from dataclasses import replace

    from tcsae.shared.store.reader import open_store
    from tcsae.train.loader import SegmentLoader
    from tcsae.train.plan import Request, plan_runs
    from tcsae.train.run import SAMPLE_TOKENS
    from tcsae.train.trainer import Trainer

    store = open_store(store_path)
    (run,) = plan_runs(store, Request(["topk"]))
    loader = SegmentLoader(store, run.config.data)
    trainer = Trainer(replace(run.config, steps=10**9), loader.sample(SAMPLE_TOKENS))
    data = [batch._replace(x=batch.x.clone()) for batch in itertools.islice(loader, 8)]
    for batch in data[:4]:
        trainer.step(batch)
    start, n_tokens = time.perf_counter(), 0
    for batch in itertools.islice(itertools.cycle(data), steps):
        trainer.step(batch)
        n_tokens += len(batch.x)
    return n_tokens / (time.perf_counter() - start)


def measured(arguments: argparse.Namespace, spins: str) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    environment.pop("GOMP_SPINCOUNT", None)
    if spins:
        environment["GOMP_SPINCOUNT"] = spins
    call = [sys.executable, __file__, "--store", arguments.store, "--steps", str(arguments.steps), "--child"]
    return float(subprocess.run(call, check=True, capture_output=True, text=True, env=environment).stdout)


@contextmanager
def busy(process: bool):
    """Beside a process that computes without end, or not."""
    if not process:
        yield
        return
    burning = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        yield
    finally:
        burning.kill()
        burning.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/activations.zarr")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help="internal: one contestant")
    arguments = parser.parse_args()
    if arguments.child:
        print(step_rate(arguments.store, arguments.steps))
        return
    rates: dict[str, dict[str, list[float]]] = {spins: {"alone": [], "busy": []} for spins in SPINS}
    for _ in range(arguments.rounds):
        for spins in SPINS:
            for name in ("alone", "busy"):
                with busy(name == "busy"):
                    rates[spins][name].append(measured(arguments, spins))
    print(f"{'GOMP_SPINCOUNT':16s} {'alone, tokens/s':>24s} {'beside one, tokens/s':>28s}")
    figures = {}
    for spins, both in rates.items():
        figures[spins or "not set"] = {name: statistics.median(values) for name, values in both.items()}
        alone, beside = (f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in both.values())
        print(f"{spins or 'not set':16s} {alone:>24s} {beside:>28s}")
    report("busy", threads=arguments.threads, figures=figures)


if __name__ == "__main__":
    main()
