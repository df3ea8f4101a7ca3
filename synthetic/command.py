"""The commands `synthetic` and `planted`."""

import click

from tcsae.shared.base.cli import Count, Place, StageCommand


@click.command(cls=StageCommand, short_help="Plant known features in a store, to see what SAEs recover.")
@click.option(
    "--size",
    type=click.Choice(("small", "large")),
    default="small",
    show_default=True,
    help="small: 256 features in 64 dimensions. large: 16,384 in 768, the shape of SynthSAEBench-16k.",
)
@click.option("--tokens", type=Count(), help="Tokens, over both splits.  [default: 500K; large: 10M]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@click.option("--still", is_flag=True, help="No memory at all, the null: every duration 1, no dense subspace, no ramp.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting, as slow_durations=4,16."
)
@click.option("--list", "listed", is_flag=True, help="Print all settings with their values, and stop.")
@click.option("--fresh", is_flag=True, help="Delete the activation store that is there and start anew.")
@click.pass_obj
def synthetic(
    place: Place,
    size: str,
    tokens: int | None,
    seed: int,
    still: bool,
    settings: tuple[str, ...],
    listed: bool,
    fresh: bool,
) -> None:
    """Write a store of planted features: activations whose truth is known, so that recovery can be scored.

    Slow rare features, frequent fast ones, parents and children, correlation, a slow dense subspace, a ramp over
    positions, noise. The truth lies beside the store, in STORE.truth.safetensors; `tcsae eval` reads it and adds what
    each SAE recovers of it. Killed at any moment, the same command goes on where it stopped.

    \b
      tcsae --store planted.zarr --runs planted synthetic train --preset topk --set sae.d_sae=288 --set sae.k=8 eval
    """
    from tcsae.shared.base.console import echo, table
    from tcsae.shared.base.console import size as of_bytes
    from tcsae.synthetic.planting import STILL, planted_config

    asked = [f"seed={seed}", *(STILL if still else ()), *settings]
    if tokens is not None:
        asked.append(f"n_tokens={tokens}")
    config = planted_config(size, tuple(asked))
    if listed:
        from tcsae.shared.base.settings import to_settings

        for setting in to_settings(config):
            echo(setting)
        return

    from tcsae.synthetic.run import write_planted

    if fresh:
        from tcsae.harvest.run import remove_store

        remove_store(place.store)
    store = write_planted(place.store, config)
    counts = store.manifest.counts
    rows = [(name, counts["train"][name], counts["eval"][name]) for name in ("sequences", "tokens", "documents")]
    table(f"{place.store}: {config.n_features} planted features", ["", "train", "eval"], rows)
    echo(f"  {of_bytes(sum(store.n_bytes().values()))} on disk; the truth: {place.store.rstrip('/')}.truth.safetensors")
    echo(
        f"  Train with about {round(1.1 * config.n_features)} latents: --set sae.d_sae={round(1.1 * config.n_features)}"
    )


@click.command(cls=StageCommand, short_help="Which planted features can be identified, by which method: the page.")
@click.option("--quick", is_flag=True, help="A minute: few tokens, few steps, one seed. Shows that everything runs.")
@click.option("--work", default="data/planted", show_default=True, metavar="PATH", help="Folder of stores and runs.")
@click.option("--out", default="docs/results", show_default=True, metavar="PATH", help="Folder that the page goes to.")
@click.pass_context
def planted(ctx: click.Context, quick: bool, work: str, out: str) -> None:
    """Plant features of many durations and strengths, train plain and temporal SAEs on them, and write the page
    planted.md with the identifiability diagram.

    What is done is not done again, so that it can be stopped and started.

    \b
      tcsae planted --quick --out /tmp/results
      tcsae planted
      torchrun --nproc-per-node 2 -m tcsae planted        stores dealt out to two processes
    """
    from click.core import ParameterSource

    assert ctx.parent is not None
    for name in ("store", "runs"):
        if ctx.parent.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is not for planted, which has stores and runs of its own below --work.")

    from pathlib import Path

    from tcsae.shared.base.console import say
    from tcsae.shared.base.distributed import ranks
    from tcsae.synthetic.experiment import Place as Work
    from tcsae.synthetic.experiment import make_all
    from tcsae.synthetic.identifiability import FULL, QUICK
    from tcsae.synthetic.planted_page import write_planted_page

    size = QUICK if quick else FULL
    make_all(Work(Path(work)), size)
    if ranks().rank == 0:
        say(f"The page: {write_planted_page(Work(Path(work)), size, Path(out))}")
