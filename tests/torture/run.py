"""Torture: kills, damage, two at once and full disks, on a toy place. Prints counts; exits with 1 if anything was lost,
silently wrong, or ended in a traceback.

    python tests/torture/run.py --trials 20 --seed 1 --only kills,damage
"""

import argparse
import gc
import importlib
import os
import pkgutil
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Before anything else is imported: one thread, no network, no threads of tokenizers that a fork would lose.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

KINDS = ("kills", "damage", "pairs", "disks")
GOOD = ("same", "refused", "said", "skipped")


def import_all() -> None:
    """What a command would import, so that a trial is a fork."""
    import matplotlib.pyplot
    import torch
    import transformer_lens
    import zarr

    import tcsae

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(tcsae.__path__, "tcsae."):
        rest = module.name.split(".")[1]
        if rest in ("harvest", "train", "evaluate", "shared"):
            importlib.import_module(module.name)
    assert all((matplotlib.pyplot, transformer_lens, zarr))
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="of each kind, for each stage or file kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help="of kills, damage, pairs, disks")
    parser.add_argument("--root", type=Path, help="folder to work in; default: a temporary one")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(KINDS):
        parser.error(f"--only {','.join(unknown)}: there is {', '.join(KINDS)}")
    import_all()
    import stages

    root = options.root or Path(tempfile.mkdtemp(prefix="torture"))
    workshop = stages.Workshop(root)
    workshop.prepare()
    print(f"seed {options.seed}, {options.trials} trials each, in {root}; undisturbed:", flush=True)
    print("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in workshop.seconds.items()), flush=True)
    counts: Counter[tuple[str, str, str]] = Counter()
    for kind in options.only.split(","):
        start = time.monotonic()
        trials = importlib.import_module(kind).trials(workshop, random.Random(f"{options.seed} {kind}"), options.trials)
        for what, outcome, detail in trials:
            counts[kind, what, outcome] += 1
            if outcome not in GOOD or outcome == "skipped":
                print(f"{outcome}: {kind}, {what}: {detail}", flush=True)
        print(f"{kind}: {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(show(counts))


def show(counts: Counter[tuple[str, str, str]]) -> int:
    """Print the table; the exit code."""
    outcomes = [*GOOD, *sorted({outcome for _, _, outcome in counts} - set(GOOD) | {"lost", "silent", "traceback"})]
    print(f"\n{'':40}" + "".join(f"{one:>11}" for one in outcomes))
    for kind, what in dict.fromkeys((kind, what) for kind, what, _ in counts):
        row = [counts[kind, what, outcome] for outcome in outcomes]
        print(f"{kind + ', ' + what:40}" + "".join(f"{n or '-':>11}" for n in row))
    totals = {outcome: sum(n for (_, _, one), n in counts.items() if one == outcome) for outcome in outcomes}
    print(f"{'all':40}" + "".join(f"{n:>11}" for n in totals.values()))
    bad = sum(n for outcome, n in totals.items() if outcome not in GOOD)
    print(f"{sum(totals.values())} trials, {totals['lost']} lost, {totals['silent']} silent, {bad} bad in all")
    return int(bad > 0)


if __name__ == "__main__":
    main()
