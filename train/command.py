"""The `train` and `presets` commands."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tcsae.shared.base.cli import Count, Place, StageCommand, device_option, precision_option

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tcsae.shared.base.distributed import Ranks
    from tcsae.shared.store.reader import Store
    from tcsae.train.dry_run import TrainEstimate
    from tcsae.train.plan import Run

PAPERS = ("logged-", "written-")
"""How the names of the paper's presets begin."""
CONTROLS = "-shuffled"
"""How the name of a preset's control ends."""


@click.command(cls=StageCommand)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    metavar="NAME",
    help="Named settings; repeatable. Default: temporal-topk-centred.",
)
@click.option(
    "--steps",
    type=Count(),
    help="Optimiser steps. Default: the preset's, mostly 2500 of 2048 tokens. A finished run goes on to more, if its "
    "schedule allows it.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Order of the data, as --set data.seed. Default: 0."
)
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
@device_option("runs are trained")
@precision_option("the encoder's and the decoder's. Losses and Adam are in float32.")
@click.option(
    "--compile",
    is_flag=True,
    help="Compile a step's tensor work with torch.compile, on an NVIDIA GPU; the same up to rounding.",
)
@click.option("--dry-run", is_flag=True, help="Print passes, memory and time, measured on a few steps. Writes nothing.")
@click.option("--fresh", is_flag=True, help="Train again what is trained already.")
@click.pass_obj
def train(place: Place, **asked: Any) -> None:
    """Train sparse autoencoders from the store, any number in one pass over it.

    \b
      tcsae train                                                      the default preset
      tcsae train --preset topk --preset temporal-topk-centred --steps 5000    two runs, one pass
      tcsae train --set sae.d_sae=1024 --sweep sae.k=8,16,32 --sweep init_seed=0,1,2    nine runs, one pass
      tcsae train --preset written-run3 --dry-run                      passes, memory, time; nothing is written

    A run is a folder below --runs, named after its preset and settings, in SAELens' layout. `tcsae presets` lists the
    presets, `tcsae presets --name NAME` every setting of one.

    An interrupted run goes on from its last checkpoint under the same command, to the same weights: bit for bit on a
    CPU with the same number of threads, up to rounding on a GPU. A finished run goes on under a higher --steps if no
    setting depends on the number of steps: optimizer.decay=none, a warm-up of at most a twentieth of the run,
    dead.after_share=1, temporal.warmup=0. Otherwise the reason is given.

    With `torchrun --nproc-per-node N -m tcsae train ...` the runs are divided among N processes, each run the same as
    trained alone. A single run is trained by all processes, each on its part of every batch.
    """
    from tcsae.shared.base.errors import ConfigError
    from tcsae.train.dry_run import estimate

    prepared = prepare(place, asked)
    store, runs_path, runs, processes, device = prepared
    if asked["dry_run"]:
        if processes.parallel:
            raise ConfigError(f"--dry-run in {processes.world} processes: one is enough. Start it without torchrun.")
        show_estimate(estimate(store, runs_path, runs, asked["fresh"], device))
    elif records := train_prepared(prepared, asked):
        show(records, place.runs)


class Prepared(NamedTuple):
    """What `train` is about to do."""

    store: "Store"
    runs_path: "Path"
    runs: "list[Run]"
    processes: "Ranks"
    device: "torch.device"


def prepare(place: Place, asked: dict[str, Any]) -> Prepared:
    """From the command's options to runs. Raises ConfigError, RunError or StoreError."""
    from pathlib import Path

    from tcsae.shared.base.device import choose_device, keep_freed_memory, set_compile, set_precision
    from tcsae.shared.base.distributed import device_of, ranks
    from tcsae.shared.store.reader import open_store
    from tcsae.train.plan import Request, plan_runs

    keep_freed_memory()
    store = open_store(place.store)
    options = {
        "data.seed": asked["seed"],
        "steps": asked["steps"],
        "data.positions": ",".join(asked["positions"]) or None,
    }
    config_file = Path(asked["config_file"]) if asked["config_file"] else None
    request = Request(
        asked["presets"], asked["settings"], asked["sweeps"], config_file, asked["init_from"], options=options
    )
    runs, processes = plan_runs(store, request), ranks()
    chosen = device_of(processes, choose_device(asked["device"]))
    set_precision(asked["precision"], chosen)
    if asked["compile"]:
        set_compile(chosen)
    return Prepared(store, Path(place.runs), runs, processes, chosen)


def train_prepared(prepared: Prepared, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Train them; records of the runs that this process is to show."""
    from tcsae.train.checks import check_compile
    from tcsae.train.run import train_parallel, train_runs

    store, runs_path, runs, processes, device = prepared
    if asked["compile"]:
        check_compile([run.config for run in runs], processes.world)
    fresh, tracker = asked["fresh"], asked["tracker"]
    if not processes.parallel:
        return train_runs(store, runs_path, runs, fresh, tracker, device)
    return train_parallel(store, runs_path, runs, processes, fresh, tracker, device)


def show(records: list[dict[str, Any]], runs: str) -> None:
    """Print one row a run, with its last figures on training batches."""
    from tcsae.shared.base.console import sparkline, table
    from tcsae.shared.sae.folder import read_metrics

    columns = ("run", "latents", "steps", "tokens", "EV (last batch)", "over time", "L0", "dead %", "minutes")
    rows = []
    for record in records:
        lines = [line for line in read_metrics(f"{runs}/{record['name']}") if "event" not in line]
        last = lines[-1] if lines else {}
        values = [line.get("explained_variance") for line in lines]
        curve = sparkline([value for value in values if isinstance(value, int | float) and math.isfinite(value)])
        name = record["name"] + (" (ended early)" if record["ended"] else "")
        size = (record["sae"]["d_sae"], record["steps"], record["tokens"])
        figures = (last.get("explained_variance"), curve, last.get("l0"), 100 * record["dead_fraction"])
        rows.append((name, *size, *figures, record["seconds"] / 60))
    table(f"Trained in {runs}", columns, rows)


def show_estimate(estimated: "TrainEstimate") -> None:
    """Print what a training would take: a row a run, a line a pass."""
    import torch

    from tcsae.shared.base.console import duration, echo, size, table

    for name in estimated.trained:
        echo(f"{name}: trained already. Train it again with --fresh.")
    rows = [
        (one.run.name, one.run.config.sae.d_sae, one.run.config.steps, one.tokens, one.epochs, 1000 * one.step_s)
        for part in estimated.passes
        for one in part.runs
    ]
    if rows:
        table("To train", ("run", "latents", "steps", "tokens", "epochs", "ms a step"), rows)
    for number, part in enumerate(estimated.passes, start=1):
        names = ", ".join(one.run.name for one in part.runs)
        about = f"about {size(part.memory_bytes)} of memory, about {duration(part.seconds)}"
        echo(f"Pass {number} of {len(estimated.passes)}: {names}; {about}")
    total = sum(part.seconds for part in estimated.passes)
    echo(f"In all about {duration(total)} with {torch.get_num_threads()} thread(s). Nothing was written.")


@click.command(cls=StageCommand)
@click.option("--name", metavar="NAME", help="Show every setting of this preset.")
def presets(name: str | None) -> None:
    """List the presets of `train`; with --name every setting of one.

    \b
      tcsae presets
      tcsae presets --name topk
      tcsae train --preset topk --set sae.k=16

    The paper's presets stand apart: logged-run* are its networks before their first step, which is what its printed
    figures are of; written-run* are its equations, trained.
    """
    from tcsae.shared.base.settings import to_settings
    from tcsae.train.presets import DEFAULT, PRESETS, preset

    if name is not None:
        for line in to_settings(preset(name, 512)):
            if not line.startswith("sae.d_model"):
                click.echo(line)
        return
    controls = [one for one in PRESETS if one.endswith(CONTROLS)]
    papers = [one for one in PRESETS if one.startswith(PAPERS)]
    ours = [one for one in PRESETS if one not in (*papers, *controls)]
    width = max(map(len, ours + papers))
    for title, names in (("Presets:", ours), ("The paper's:", papers)):
        click.echo(title)
        for one in names:
            click.echo(f"  {one:{width}}  {PRESETS[one].about}{' (default)' if one == DEFAULT else ''}")
    if controls:
        twins = ", ".join(one.removesuffix(CONTROLS) for one in controls)
        click.echo(f"Controls, on shuffled positions: NAME{CONTROLS} for the NAMEs\n  {twins}")
