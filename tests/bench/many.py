"""Several runs in one pass against the same runs' single steps.

    python tests/bench/many.py [--d-sae 4096] [--rounds 5] [--malloc]

One core, batches of 4096 tokens, d_model 512, k = 32, four runs. In the pass a batch is read from a store once and
every run takes a step on it, in buffers that they share; single steps have their batch in memory and buffers of their
own. The bar: the pass takes at most 1.03 times as long.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

from alternate import alternate, one_core, report, tune_malloc
from loader import synthetic_store
from step import D_MODEL, LENGTH, K, N

from tcsae.shared.base.settings import with_settings
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

RUNS = {
    "topk": ("topk", ()),
    "batchtopk": ("batchtopk", ()),
    "topk + eq. 3": ("topk", ("temporal.weight=0.01",)),
    "topk, another seed": ("topk", ("init_seed=1",)),
}


def trainers(loader: SegmentLoader, d_sae: int) -> list[Trainer]:
    """One trainer a run, in the middle of a long run."""
    settings = [f"sae.k={K}", "steps=1M", f"data.segment_length={LENGTH}", f"sae.d_sae={d_sae}"]
    sample = loader.sample(N)
    configs = [with_settings(preset(name, D_MODEL), [*settings, *own]) for name, own in RUNS.values()]
    return [Trainer(config, sample) for config in configs]


def one_pass(loader: SegmentLoader, d_sae: int) -> Callable[[], int]:
    """A batch from the store, and a step of every run."""
    stream, together = iter(loader), trainers(loader, d_sae)

    def step() -> int:
        batch = next(stream)
        for trainer in together:
            trainer.step(batch)
        return len(batch.x) * len(together)

    return step


def single_steps(loader: SegmentLoader, d_sae: int) -> Callable[[], int]:
    """The same steps, each on a batch in memory."""
    data = [batch._replace(x=batch.x.clone()) for batch in itertools.islice(loader, 4 * len(RUNS))]
    stream, alone = itertools.cycle(data), trainers(loader, d_sae)

    def step() -> int:
        return sum(len(batch.x) for trainer in alone for batch in [next(stream)] if trainer.step(batch))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--malloc", action="store_true")
    arguments = parser.parse_args()
    one_core()
    if arguments.malloc:
        tune_malloc()
    config = DataConfig(n_segments=N // LENGTH, segment_length=LENGTH, skip_first=0)
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), D_MODEL)
        contestants = {
            "single steps": single_steps(SegmentLoader(store, config), arguments.d_sae),
            "one pass": one_pass(SegmentLoader(store, config), arguments.d_sae),
        }
        # A round has to hold whole blocks of the loader, as a block is read at once.
        times = alternate(contestants, arguments.rounds, least_s=20.0)
    times.show("token", base="single steps")
    verdict = times.ratio("one pass", "single steps").verdict(1.03)
    print(f"{len(RUNS)} runs in one pass against {len(RUNS)} single steps: {verdict} the bar of 1.03")
    report("many", times, base="single steps", d_sae=arguments.d_sae, malloc=arguments.malloc)


if __name__ == "__main__":
    main()
