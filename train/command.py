"""The `train` and `presets` commands."""

from typing import Any

import click

from tcsae.shared.base.cli import Count, Place, StageCommand


@click.command(cls=StageCommand)
@click.option(
    "--preset", "presets", multiple=True, metavar="NAME", help="Named settings; repeatable. Default: temporal-topk."
)
@click.option("--steps", type=Count(), help="Optimiser steps, of 2048 tokens unless set otherwise. Default: 2500.")
@click.option("--seed", type=click.IntRange(min=0), help="Order of the data, as --set data.seed. Default: 0.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting, such as sae.k=16; repeatable."
)
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="KEY=V1,V2,...", help="Train one run a value; repeated: a grid."
)
@click.option("--config", "config_file", metavar="FILE", help="Settings from a TOML file, with a preset to start from.")
@click.option(
    "--positions",
    multiple=True,
    metavar="ROLE",
    help="Train on the tokens of this role of a conversation alone, as --set data.positions; repeatable.",
)
@click.option("--init-from", metavar="RUN", help="Start from the weights of a run below --runs.")
@click.option("--tracker", metavar="NAME", help="Also log to tensorboard or wandb.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "mps", "cpu"]),
    default="auto",
    show_default=True,
    help="Where runs are trained; auto: the first of the others that is there.",
)
@click.option("--fresh", is_flag=True, help="Train again what is trained already.")
@click.pass_obj
def train(
    place: Place, steps: int | None, seed: int | None, tracker: str | None, fresh: bool, device: str, **asked: Any
) -> None:
    """Train sparse autoencoders from the store, all from one pass over it.

    Each becomes a folder below --runs, named after its preset and settings, in SAELens' layout. Without a preset the
    recommended one is trained. `tcsae presets` lists the presets and every setting with its default.

    \b
      tcsae train --preset topk --preset temporal-topk --steps 5000
      tcsae train --set sae.d_sae=1024 --sweep sae.k=8,16,32 --sweep init_seed=0,1,2

    Interrupted, the same command goes on where the last checkpoint is, to the same weights: bit for bit on a CPU with
    the same number of threads, up to rounding on a GPU.

    In several processes, `torchrun --nproc-per-node N -m tcsae train ...`, several runs are dealt out to them, each the
    same as trained alone; a single run is trained by all, each on its part of every batch.
    """

    from pathlib import Path

    from tcsae.shared.base.device import choose_device, keep_freed_memory
    from tcsae.shared.base.distributed import device_of, ranks
    from tcsae.shared.store.reader import open_store
    from tcsae.train.plan import Request, plan_runs
    from tcsae.train.run import train_parallel, train_runs

    keep_freed_memory()
    store = open_store(place.store)
    options = {"data.seed": seed, "steps": steps, "data.positions": ",".join(asked["positions"]) or None}
    config_file = Path(asked["config_file"]) if asked["config_file"] else None
    request = Request(
        asked["presets"], asked["settings"], asked["sweeps"], config_file, asked["init_from"], options=options
    )
    runs, runs_path, processes = plan_runs(store, request), Path(place.runs), ranks()
    chosen = device_of(processes, choose_device(device))
    if not processes.parallel:
        show(train_runs(store, runs_path, runs, fresh, tracker, chosen), place.runs)
    elif records := train_parallel(store, runs_path, runs, processes, fresh, tracker, chosen):
        show(records, place.runs)


def show(records: list[dict[str, Any]], runs: str) -> None:
    """Print one row a run, with its last figures on training batches."""
    from tcsae.shared.base.console import sparkline, table
    from tcsae.shared.sae.folder import read_metrics

    columns = ("run", "latents", "steps", "tokens", "EV, last batch", "over time", "L0", "dead %", "minutes")
    rows = []
    for record in records:
        lines = [line for line in read_metrics(f"{runs}/{record['name']}") if "event" not in line]
        last = lines[-1] if lines else {}
        values = [line.get("explained_variance") for line in lines]
        curve = sparkline([value for value in values if isinstance(value, int | float)])
        name = record["name"] + (" (ended early)" if record["ended"] else "")
        made = (record["sae"]["d_sae"], record["steps"], record["tokens"])
        figures = (last.get("explained_variance"), curve, last.get("l0"), 100 * record["dead_fraction"])
        rows.append((name, *made, *figures, record["seconds"] / 60))
    table(f"Trained in {runs}", columns, rows)


@click.command(cls=StageCommand)
@click.option("--name", metavar="NAME", help="Show every setting of this preset.")
def presets(name: str | None) -> None:
    """List the presets of `train`, a line each; with --name every setting of one.

    Settings are changed with `train --set KEY=VALUE`; `train --sweep KEY=V1,V2` trains one run a value.
    """
    from tcsae.shared.base.settings import to_settings
    from tcsae.train.presets import DEFAULT, PRESETS, preset

    if name is not None:
        for line in to_settings(preset(name, 512)):
            if not line.startswith("sae.d_model"):
                click.echo(line)
        return
    width = max(map(len, PRESETS))
    for one, about in PRESETS.items():
        click.echo(f"{one:{width}}  {about.about}{' (default)' if one == DEFAULT else ''}")
