"""The `train` command."""

import click

from tcsae.shared.cli import Count, Place, StageCommand


@click.command(cls=StageCommand)
@click.option("--preset", "presets", multiple=True, metavar="NAME", help="Named settings; repeatable. Default: topk.")
@click.option("--steps", type=Count(), help="Optimiser steps, 4096 tokens each unless set otherwise. Default: 1250.")
@click.option("--seed", type=int, default=0, show_default=True, help="Order of the data.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting, such as sae.k=16; repeatable."
)
@click.option("--fresh", is_flag=True, help="Train again what is trained already.")
@click.pass_obj
def train(
    place: Place, presets: tuple[str, ...], steps: int | None, seed: int, settings: tuple[str, ...], fresh: bool
) -> None:
    """Train sparse autoencoders from the store, all from one pass over it.

    Each becomes a folder below --runs, named after its preset and settings, in SAELens' layout. Without a preset the
    recommended one is trained.

    \b
    Presets:
      topk          TopK, 4096 latents, 32 active
      written-run3  the paper's equations and hyperparameters, trained

    \b
    Settings (--set KEY=VALUE), with their defaults in the preset topk:
      sae.d_sae=4096 sae.activation=topk|relu|gelu sae.k=32
      temporal.weight=0 temporal.window=3 l1=0
      data.n_segments=256 data.segment_length=16 data.skip_first=1
      optimizer.lr=0.001 optimizer.warmup_steps=1000 optimizer.decay=linear
      init=transpose|xavier init_seed=0 input_norm=unit|none
    """
    from pathlib import Path

    from tcsae.shared.console import table
    from tcsae.shared.store import open_store
    from tcsae.train.plan import plan_runs
    from tcsae.train.run import train_runs

    store = open_store(place.store)
    if steps is not None:
        settings = (*settings, f"steps={steps}")
    runs = plan_runs(store, presets, (*settings, f"data.seed={seed}"))
    records = train_runs(store, Path(place.runs), runs, fresh)
    columns = ("run", "latents", "steps", "tokens", "seconds")
    rows = [(one["name"], one["sae"]["d_sae"], one["steps"], one["tokens"], one["seconds"]) for one in records]
    table(f"Trained in {place.runs}", columns, rows)
