"""The commands `push` and `pull`."""

from typing import Any

import click

from tcsae.shared.base.cli import Place, StageCommand
from tcsae.shared.base.errors import ConfigError


class LastCommand(StageCommand):
    """A command whose names may stand before its options; none follows it in a chain."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = True
        return super().parse_args(ctx, args)


@click.command(cls=LastCommand, short_help="Put trained SAEs, or the store, on the Hugging Face Hub.")
@click.argument("runs", nargs=-1, metavar="RUN...")
@click.option("--to", "repo", required=True, metavar="OWNER/NAME", help="The repository, made if need be.")
@click.option("--store", "with_store", is_flag=True, help="Push the store, as a data set; resumable.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", "licence", metavar="ID", help="Licence of the weights, as the Hub names it: mit.")
@click.option("--data-license", "data_licence", metavar="TEXT", help="Licence of the text. Default: what the Hub says.")
@click.pass_obj
def push(
    place: Place, runs: tuple[str, ...], repo: str, with_store: bool, private: bool, **licences: str | None
) -> None:
    """Put trained SAEs, or the store, on the Hugging Face Hub.

    \b
      tcsae push topk temporal-topk-centred --to me/pythia-70m-saes --license mit
      tcsae --store pythia.zarr push --store --to me/pythia-70m-activations

    Each run becomes a folder that SAELens loads by name, with its settings, its evaluation and a model card: figures
    with intervals, hook, store, data and its licence, the commands that repeat it. A store is pushed object by object;
    interrupted, the same command goes on, and the manifest comes last. Log in once: hf auth login.
    """
    from pathlib import Path

    from tcsae.shared.base.console import echo, progress
    from tcsae.shared.base.signals import stop_on_signals
    from tcsae.shared.hub.client import check_repo_name
    from tcsae.shared.hub.push import PushOptions, push_runs, push_store
    from tcsae.shared.sae.folder import find_runs
    from tcsae.shared.store.copy import copy_bytes
    from tcsae.shared.store.reader import open_store

    check_repo_name("--to", repo)
    if with_store == bool(runs):
        raise ConfigError(
            "push: name runs, or give --store: a model repository holds the first, a data set the second."
        )
    if with_store:
        store = open_store(place.store)
        with stop_on_signals() as stop, progress(f"push {place.store}", copy_bytes(store), unit="bytes") as advance:
            url = push_store(store, repo, private, stop, advance)
        echo(f"{place.store}, content {store.content[:12]}: {url}")
        return
    paths = find_runs(Path(place.runs), runs)
    url = push_runs(paths, repo, place.store, PushOptions(private, **licences))
    echo(f"{', '.join(path.name for path in paths)}: {url}")


@click.command(cls=StageCommand, short_help="Bring SAEs, or a store, from the Hugging Face Hub.")
@click.option("--from", "repo", required=True, metavar="OWNER/NAME", help="The repository.")
@click.option("--run", "names", multiple=True, metavar="NAME", help="A folder of it; repeatable. Default: all.")
@click.option("--store", "with_store", is_flag=True, help="Pull a store into --store (that before the command).")
@click.option("--revision", metavar="REV", help="Branch, tag or commit.")
@click.pass_obj
def pull(place: Place, repo: str, **options: Any) -> None:
    """Bring SAEs from the Hugging Face Hub into --runs, or a store into --store.

    \b
      tcsae pull --from me/pythia-70m-saes --run topk
      tcsae --store mine.zarr pull --store --from me/pythia-70m-activations

    SAEs of others are taken too, where they are in SAELens' layout. Files are checked against the digests that they
    were written with. What is in the Hub's cache already needs no network (HF_HUB_OFFLINE).
    """
    from pathlib import Path

    from tcsae.shared.base.console import echo, progress
    from tcsae.shared.hub.client import check_repo_name
    from tcsae.shared.hub.pull import pull_runs, pull_store
    from tcsae.shared.store.copy import copy_bytes, copy_store
    from tcsae.shared.store.reader import open_store

    check_repo_name("--from", repo)
    if not options["with_store"]:
        for path in pull_runs(repo, Path(place.runs), options["names"], options["revision"]):
            echo(str(path))
        return
    source = str(pull_store(repo, options["revision"]))
    with progress(f"{repo} to {place.store}", copy_bytes(open_store(source)), unit="bytes") as advance:
        store = copy_store(source, place.store, advance)
    echo(f"{place.store}: content {store.content[:12]}, from {repo}")
