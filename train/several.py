"""`train` in several processes: a sweep is dealt out to them, a single run is trained by all together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcsae.shared.console import say
from tcsae.shared.ranks import Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.sae import load_record
from tcsae.shared.store import Store
from tcsae.train.peers import Peers, check_parallel, deal
from tcsae.train.plan import Run
from tcsae.train.run import check_names, train_runs


def train_together(
    store: Store,
    runs_path: Path,
    runs: Sequence[Run],
    ours: Ranks,
    fresh: bool = False,
    tracker: str | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """As `train_runs`, by one of several processes. Returns the records that this one is to show: rank 0's all of them,
    once the others are done; without a rendezvous each its own.
    """
    check_names(runs)
    if len(runs) == 1:
        check_parallel(runs[0].config, ours.world, device)
        start_group(ours, device)
        train_runs(store, runs_path, runs, fresh, tracker, device, Peers(ours))
        return [load_record(runs_path / runs[0].name)] if ours.rank == 0 else []
    mine = deal(runs, ours)
    names = ", ".join(run.name for run in mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ours.rank} of {ours.world} trains {names}.")
    records = train_runs(store, runs_path, mine, fresh, tracker, device)
    if not has_rendezvous():
        return records
    wait_for_all(ours)
    return [load_record(runs_path / run.name) for run in runs] if ours.rank == 0 else []
