"""`eval` in several processes: the SAEs are dealt out, each scored whole by one of them; or, where there are fewer SAEs
than processes, all go through the split together, each through documents of its own. The figures are the same.
"""

from dataclasses import replace
from pathlib import Path

from tcsae.evaluate.candidates import Request, evaluable
from tcsae.evaluate.run import Evaluated, evaluate_runs
from tcsae.shared.console import say
from tcsae.shared.ranks import Ranks, has_rendezvous, start_group, wait_for_all
from tcsae.shared.store import Store


def evaluate_in_several(store: Store, runs_path: Path, request: Request, ours: Ranks) -> Evaluated:
    """As `evaluate_runs`, by one of several processes. Returns what this one is to show: rank 0 all, once the others
    are done; without a rendezvous, where no sums can be added up and SAEs are dealt out always, each its own.
    """
    folders = evaluable(runs_path, request.names)
    if len(folders) < ours.world and has_rendezvous():
        start_group(ours)
        found = evaluate_runs(store, runs_path, request, ours)
        wait_for_all(ours)
        return found
    mine = [path.name for path in folders][ours.rank :: ours.world]
    names = ", ".join(mine) or "none, as there are fewer runs than processes"
    say(f"Rank {ours.rank} of {ours.world} evaluates {names}.")
    found = evaluate_runs(store, runs_path, replace(request, names=tuple(mine))) if mine else Evaluated([], [])
    if not has_rendezvous():
        return found
    wait_for_all(ours)
    if ours.rank:
        return Evaluated([], [])
    return evaluate_runs(store, runs_path, replace(request, names=tuple(path.name for path in folders), force=False))
