"""The commands `convert`, and `feature` with a text of one's own."""

import copy
from dataclasses import replace
from typing import Any

import click

from tcsae.evaluate.report.command import feature as report_feature
from tcsae.shared.base.cli import Place, StageCommand

MODEL_HELP = "The model that --text is read by. Default: the store's, by its name."


def _with_text(command: click.Command) -> click.Command:
    """The report's command `feature`, which also takes --text, and then needs no --id."""
    taken = copy.copy(command)
    taken.params = [copy.copy(one) for one in command.params]
    for one in taken.params:
        if one.name == "latent":
            one.required = False
    taken.params += [
        click.Option(
            ["--text"], metavar="TEXT", help="Show this text instead, shaded by the latents that it activates."
        ),
        click.Option(["--model"], metavar="NAME", help=MODEL_HELP),
    ]
    help_text = (command.help or "").rstrip()
    taken.help = f'{help_text}\n      tcsae feature --run topk --text "The cat sat on the mat."'
    taken.callback = click.pass_context(_feature)
    return taken


def _feature(ctx: click.Context, text: str | None, model: str | None, **options: Any) -> None:
    """With --text through the live model, else as the report has it."""
    if text is not None:
        _show_text(ctx.obj, options["name"], options["latent"], text, model)
    elif options["latent"] is None:
        raise click.UsageError("Missing option '--id' (or '--text').", ctx)
    else:
        ctx.invoke(report_feature, **options)


feature = _with_text(report_feature)


def _show_text(place: Place, name: str | None, latent: int | None, text: str, model: str | None) -> None:
    """Print a text shaded by one latent, or by those that it activates most."""
    from rich.console import Console

    from tcsae.api.text import activations
    from tcsae.harvest.language_model import stored_model
    from tcsae.shared.sae.sources import load_sae
    from tcsae.shared.store.reader import open_store

    store = open_store(place.store)
    sae = load_sae(_one_run(place, name))
    shown = activations(sae, stored_model(store.manifest.recipe, model), text, hook=sae.metadata.hook or store.hook())
    console = Console(highlight=False)
    for one in shown.shaded(*([] if latent is None else [latent])):
        console.print(one, soft_wrap=True)


def _one_run(place: Place, name: str | None) -> Any:
    """The folder of the run named, or of the only one. Raises RunError if there are several."""
    from pathlib import Path

    from tcsae.shared.base.errors import RunError
    from tcsae.shared.sae.folder import find_runs

    folders = find_runs(Path(place.runs), [name] if name else [])
    if len(folders) > 1:
        raise RunError(f"{place.runs} has {len(folders)} runs. Name one: --run {folders[0].name}")
    return folders[0]


@click.command(cls=StageCommand)
@click.option("--run", "name", metavar="NAME", help="A run below --runs. Default: the only one.")
@click.option(
    "--to", "form", type=click.Choice(("jumprelu", "unit-decoder")), required=True, help="What to make of it."
)
@click.option("--k", type=float, metavar="N", help="Of jumprelu: active latents a token. Default: the run's own.")
@click.option("--out", metavar="NAME", help="Name of the new run. Default: the run's, with the form.")
@click.pass_obj
def convert(place: Place, name: str | None, form: str, k: float | None, out: str | None) -> None:
    """Make another run of a trained one: a jumprelu of a topk, or one with decoder rows of norm 1.

    jumprelu: one threshold in place of the k largest, taken from the store's train split, so that L0 is k. A latent is
    then on or off by itself. unit-decoder: codes take up the norms of the decoder's rows, reconstructions stay.

    \b
      tcsae convert --run topk --to jumprelu eval --run topk --run topk-jumprelu
    """
    from pathlib import Path

    from tcsae.api.convert import fold_decoder_norms, to_jumprelu
    from tcsae.shared.base.console import echo
    from tcsae.shared.base.errors import ConfigError, RunError
    from tcsae.shared.sae.sources import load_sae
    from tcsae.shared.store.reader import open_store

    if k is not None and form != "jumprelu":
        raise ConfigError(f"--k {k:g} is of --to jumprelu alone. Leave it out.")
    folder = _one_run(place, name)
    target = Path(place.runs) / (out or f"{folder.name}-{form}")
    if target.exists():
        raise RunError(f"{target} is there already. Give another --out.")
    sae = load_sae(folder)
    converted = to_jumprelu(sae, open_store(place.store), k=k) if form == "jumprelu" else fold_decoder_norms(sae)
    if record := sae.metadata.record:
        about = {**record, "name": target.name, "converted": {"from": folder.name, "to": form}}
        converted.metadata = replace(sae.metadata, record=about)
    converted.save(target)
    echo(f"{target}: {folder.name} as {form}")
