"""The command that acts on a trained SAE: export."""

import click

from tcsae.shared.base.cli import Place, StageCommand


@click.command(cls=StageCommand)
@click.option(
    "--to",
    "form",
    type=click.Choice(["dictionary_learning", "saelens"]),
    required=True,
    help="The library whose format is written.",
)
@click.option("--run", "name", metavar="NAME", required=True, help="A run below --runs.")
@click.option("--out", metavar="PATH", help="Folder to write. Default: export-LIBRARY in the run's folder.")
@click.pass_obj
def export(place: Place, form: str, name: str, out: str | None) -> None:
    """Write a trained SAE in another library's format, with the same codes and reconstructions there.

    \b
      tcsae export --to dictionary_learning --run topk
      dictionary_learning.utils.load_dictionary("data/runs/topk/export-dictionary_learning", device="cpu")

    \b
    dictionary_learning  ae.pt and config.json: relu, topk, batchtopk and jumprelu have a form there
    saelens              cfg.json and sae_weights.safetensors alone (SAE.load_from_disk reads the run's folder as well)

    gelu and layer-norm variants have no form in either. An earlier export in the folder is replaced.
    """
    from pathlib import Path
    from typing import cast

    from tcsae.shared.base.console import legible
    from tcsae.shared.sae.export import Format, export_run
    from tcsae.shared.sae.folder import find_runs

    path = find_runs(Path(place.runs), [name])[0]
    folder = export_run(path, cast(Format, form), None if out is None else Path(out))
    click.echo(legible(f"{name} as {form}: {folder}"))
