"""The whole `train` command against its own bare steps, on a real store.

    python tests/bench/command.py [--store data/activations.zarr] [--steps 400] [--rounds 3] [--set KEY=VALUE]

One core. The command is a process of its own that reads the store, logs and writes checkpoints (every quarter of the
steps, more often than a user's run does); its steady state lies between the first and the last line of metrics.jsonl,
start-up and end are told separately. The bare steps are `Trainer.step` on batches that lie in memory. The bar: the
command reaches at least 0.93 of the bare steps' speed.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from alternate import Times, one_core, report

from tcsae.shared.store.reader import open_store
from tcsae.train.loader import SegmentLoader
from tcsae.train.log import read_metrics
from tcsae.train.plan import Request, plan_runs
from tcsae.train.run import SAMPLE_TOKENS
from tcsae.train.trainer import Trainer

N_BATCHES = 16


def command(store: str, settings: list[str]) -> tuple[float, float]:
    """(seconds a token between the first and the last line of metrics, seconds of all the rest)."""
    options = [f"--set={one}" for one in settings]
    with tempfile.TemporaryDirectory() as runs:
        call = [sys.executable, "-m", "tcsae", "--store", store, "--runs", runs, "train", "--preset", "topk", *options]
        start = time.perf_counter()
        subprocess.run(call, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        total = time.perf_counter() - start
        first, *_, last = read_metrics(next(Path(runs).iterdir()))
    steady = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
    return steady, total - steady * last["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/activations.zarr")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    one_core()
    store = open_store(arguments.store)
    settings = [*arguments.settings, f"steps={arguments.steps}", f"guard.checkpoint_steps={arguments.steps // 4}"]
    (run,) = plan_runs(store, Request(["topk"], settings))
    loader = SegmentLoader(store, run.config.data)
    # A schedule that does not end, however many rounds there are.
    trainer = Trainer(replace(run.config, steps=10**9), loader.sample(SAMPLE_TOKENS))
    data = [batch._replace(x=batch.x.clone()) for batch in itertools.islice(loader, N_BATCHES)]

    def bare() -> float:
        """Seconds a token."""
        start, n_tokens = time.perf_counter(), 0
        for batch in itertools.islice(itertools.cycle(data), arguments.steps):
            trainer.step(batch)
            n_tokens += len(batch.x)
        return (time.perf_counter() - start) / n_tokens

    seconds: dict[str, list[float]] = {"bare steps": [], "the command": []}
    rest = []
    for i in range(arguments.rounds):
        for name in seconds if i % 2 == 0 else reversed(seconds):
            if name == "bare steps":
                seconds[name].append(bare())
            else:
                steady, other = command(arguments.store, settings)
                seconds[name].append(steady)
                rest.append(other)
    times = Times(seconds)
    times.show("token", base="bare steps")
    share = times.ratio("bare steps", "the command")
    print(f"{share} of the bare steps' speed: {share.verdict(0.93)} the bar of 0.93")
    print(f"start-up (imports, opening, sample, initial weights) and end: {np.median(rest):.1f} s")
    report("command", times, base="bare steps", start_and_end_s=float(np.median(rest)), settings=settings)


if __name__ == "__main__":
    main()
