"""Two processes against one: the shards of a harvest, and the steps of a sweep of two SAEs. For two idle cores.

    python tests/bench/ranks.py [--rounds 3] [--shards 12] [--steps 150] [--tokens 400000] [--only sweep]

One thread a process; each is started, loads what it needs, and waits for the others: only the work is timed. The
bars: 1.7 times as fast.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

from alternate import report

from tcsae.shared.base.distributed import Ranks

KINDS = ("harvest", "sweep")
WAIT_S = 600.0
"""For the others: a process that died breaks the barrier for all."""


class Task(NamedTuple):
    """What is timed."""

    kind: str
    location: str
    n: int
    """Shards to harvest, or steps of each SAE."""
    tokens: int
    """Of the store."""


def harvesting(task: Task, rank: int, world: int) -> Callable[[], None]:
    """This rank's share of the shards, from a store that has its sequences."""
    from tcsae.harvest.phases import write_beside
    from tcsae.harvest.resolve import HarvestConfig
    from tcsae.harvest.run import _prepare
    from tcsae.harvest.work_stealing import _join_writer

    result = _prepare(task.location, HarvestConfig(n_tokens=task.tokens), fresh=False)
    capture, writer = result.load(), _join_writer(task.location, result.recipe)
    assert writer is not None
    mine = writer.shards()[: task.n][rank::world]
    capture.run(writer.tokens(mine[0]), writer.lengths(mine[0]))

    def work() -> None:
        for shard in mine:
            write_beside(writer, shard, capture.run(writer.tokens(shard), writer.lengths(shard)))

    return work


def sweeping(task: Task, rank: int, world: int) -> Callable[[], None]:
    """This rank's share of two SAEs; one process trains both from one pass."""
    from tcsae.shared.base.settings import with_settings
    from tcsae.shared.store.reader import open_store
    from tcsae.train.loader import SegmentLoader
    from tcsae.train.presets import preset
    from tcsae.train.run import deal
    from tcsae.train.trainer import Trainer

    store = open_store(task.location)
    configs = [
        with_settings(preset("topk", store.d_model(store.hook())), ["sae.d_sae=4096", f"init_seed={i}"]) for i in (0, 1)
    ]
    loader = SegmentLoader(store, configs[0].data)
    sample = loader.sample(8192)
    trainers = [Trainer(one, sample, store.sequence_length) for one in deal(configs, Ranks(rank, world, rank))]
    stream = iter(loader)
    for trainer in trainers:
        trainer.step(next(stream))

    def work() -> None:
        for _ in range(task.n):
            batch = next(stream)
            for trainer in trainers:
                trainer.step(batch)

    return work


def run(task: Task, rank: int, world: int, ready: Barrier) -> None:
    """A child, on a core of its own."""
    import torch

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    work = (harvesting if task.kind == "harvest" else sweeping)(task, rank, world)
    ready.wait(WAIT_S)
    work()
    ready.wait(WAIT_S)


def timed(task: Task, world: int) -> float:
    """Seconds that `world` processes take for the work together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(world + 1)
    children = [context.Process(target=run, args=(task, rank, world, ready)) for rank in range(world)]
    for child in children:
        child.start()
    ready.wait(WAIT_S)
    start = time.perf_counter()
    ready.wait(WAIT_S)
    seconds = time.perf_counter() - start
    for child in children:
        child.join()
    return seconds


def prepare(kind: str, location: str, tokens: int) -> None:
    """A store whose sequences are made, to be harvested; or a sealed one."""
    from tcsae.harvest.phases import write_sequences
    from tcsae.harvest.resolve import HarvestConfig
    from tcsae.harvest.run import _prepare, harvest
    from tcsae.shared.store.writer import open_writer

    config = HarvestConfig(n_tokens=tokens)
    if kind == "sweep":
        harvest(location, config)
        return
    result = _prepare(location, config, fresh=False)
    writer = open_writer(location, result.recipe)
    assert writer is not None
    with writer:
        write_sequences(writer, result.corpus, result.model)
        writer.share()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--only", choices=KINDS)
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in (arguments.only,) if arguments.only else KINDS:
            location = str(Path(folder) / f"{kind}.zarr")
            prepare(kind, location, arguments.tokens)
            task = Task(kind, location, arguments.shards if kind == "harvest" else arguments.steps, arguments.tokens)
            ratios = []
            for i in range(arguments.rounds):
                worlds = (1, 2) if i % 2 == 0 else (2, 1)
                seconds = {world: timed(task, world) for world in worlds}
                ratios.append(seconds[1] / seconds[2])
            low, high = min(ratios), max(ratios)
            verdict = "above" if low > 1.7 else "below" if high < 1.7 else "inconclusive"
            print(
                f"{kind}: 2 processes {statistics.median(ratios):.2f} times as fast ({low:.2f} to {high:.2f}); "
                f"bar 1.7: {verdict}"
            )
            figures[kind] = {"median": statistics.median(ratios), "low": low, "high": high}
    report("ranks", figures=figures)


if __name__ == "__main__":
    main()
