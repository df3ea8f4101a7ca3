"""What the temporal presets gain and cost against their twins without the term: same data, seeds and active latents.

    python tests/bench/temporal_gain.py --store data/activations.zarr --runs /tmp/temporal-gain [--seeds 3]

1024 latents, 16 active, 2500 steps unless said otherwise. A row a seed: the difference of each figure with its
interval over documents, paired; a star where it leaves out zero. Below, the mean over seeds and whether all seeds
agree. The bar: explained variance within 0.01, and slower by every measure. What is trained and evaluated is reused.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from alternate import report

from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.printed_tables import differences
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.store.reader import open_store
from tcsae.train.plan import Request as Training
from tcsae.train.plan import Run, plan_runs
from tcsae.train.run import train_runs

TWINS = {
    "temporal-topk": ("topk", ()),
    "temporal-matryoshka": ("temporal-matryoshka", ("temporal.weight=0",)),
}
SLOWER = {"slowness_to_x": -1, "rho_8_within": 1, "jaccard_corrected": 1}
"""Measures, and which way slower is."""
FIGURES = ("explained_variance", "ce_loss_score", "l0", *SLOWER, "boundary_auc", "position_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="settings", nargs="+", default=["sae.d_sae=1024", "sae.k=16"])
    asked = parser.parse_args()
    store = open_store(asked.store)
    seeds = (f"init_seed={','.join(map(str, range(asked.seeds)))}",)
    planned: dict[tuple[str, bool], list[Run]] = {}
    for name, (twin, without) in TWINS.items():
        planned[name, True] = plan_runs(store, Training((name,), asked.settings, seeds))
        planned[name, False] = plan_runs(store, Training((twin,), [*asked.settings, *without], seeds))
    runs = [run for group in planned.values() for run in group]
    train_runs(store, asked.runs, runs)
    evaluated = evaluate_runs(store, asked.runs, EvalRequest(names=[run.name for run in runs]))
    done = {one["name"]: one for one in evaluated.evaluations}
    result = {}
    for name in TWINS:
        pairs = zip(planned[name, True], planned[name, False], strict=True)
        result[name] = [differences(asked.runs, done[ours.name], done[twin.name]) for ours, twin in pairs]
        show(name, result[name])
    kept = {name: [{key: one[key] for key in FIGURES} for one in rows] for name, rows in result.items()}
    report("temporal_gain", figures=kept, settings=asked.settings)


def show(name: str, rows: list[dict[str, dict[str, Any]]]) -> None:
    print(f"\n{name} minus its twin\n{'seed':6s}" + "".join(f"{figure:>30s}" for figure in FIGURES))
    for seed, row in enumerate(rows):
        print(f"{seed:<6d}" + "".join(f"{cell(row[figure]):>30s}" for figure in FIGURES))
    mean = {figure: float(np.mean([row[figure]["difference"] for row in rows])) for figure in FIGURES}
    print(f"{'mean':6s}" + "".join(f"{mean[figure]:>+30.4f}" for figure in FIGURES))
    slower = all(sure(row[figure]["interval"], sign) for row in rows for figure, sign in SLOWER.items())
    print(f"slower by every measure in every seed: {'yes' if slower else 'no'}")


def sure(interval: list[float], sign: int) -> bool:
    return bool(interval[0] > 0 if sign > 0 else interval[1] < 0)


def cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    star = "" if low <= 0 <= high else "*"
    return f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f}){star}"


if __name__ == "__main__":
    main()
