"""The command `export`."""

from typing import Any

import click

from tcsae.shared.base.cli import Count, Place, StageCommand


@click.command(cls=StageCommand, short_help="Write a trained SAE, or its features, in another tool's format.")
@click.option(
    "--to",
    "form",
    type=click.Choice(["dictionary_learning", "saelens", "sparsify", "neuronpedia", "delphi"]),
    required=True,
    help="The tool whose format is written.",
)
@click.option("--run", "name", metavar="NAME", required=True, help="A run below --runs.")
@click.option("--out", metavar="PATH", help="Folder to write. Default: export-TOOL in the run's folder.")
@click.option(
    "--split",
    type=click.Choice(["eval", "train"]),
    default="eval",
    show_default=True,
    help="Of neuronpedia and delphi: the sequences that the SAE is run over.",
)
@click.option("--max-tokens", type=Count(), help="Of neuronpedia and delphi: about so many tokens. Default: all.")
@click.option(
    "--context-length",
    type=click.IntRange(min=1),
    help="Of delphi: positions of a context, a multiple of its example_ctx_len.  [default: 32]",
)
@click.pass_obj
def export(place: Place, form: str, name: str, out: str | None, **options: Any) -> None:
    """Write a trained SAE in another library's format, with the same codes and reconstructions there; or its features.

    \b
      tcsae export --to dictionary_learning --run topk
      dictionary_learning.utils.load_dictionary("data/runs/topk/export-dictionary_learning", device="cpu")

    \b
    dictionary_learning  ae.pt and config.json: relu, topk, batchtopk and jumprelu have a form there
    saelens              cfg.json and sae_weights.safetensors alone (SAE.load_from_disk reads the run's folder as well)
    sparsify             cfg.json and sae.safetensors: topk, and relu as a topk of all latents (slow there)
    neuronpedia          batch-N.json as SAEDashboard writes them, for Neuronpedia's converter
    delphi               cached latents (LatentDataset), so that delphi explains features without the language model

    GELU, layer norms, crosscoders and persistent SAEs have no form in the first three; TFA has one in saelens. The last
    two run the SAE over the store. An earlier export in the folder is replaced; one that is interrupted leaves it as it
    was.
    """
    from pathlib import Path
    from typing import cast

    from tcsae.shared.base.console import echo
    from tcsae.shared.sae.export import Format, export_run
    from tcsae.shared.sae.folder import find_runs

    path = find_runs(Path(place.runs), [name])[0]
    target = Path(out) if out is not None else None
    if form in ("neuronpedia", "delphi"):
        from tcsae.evaluate.exports.feature_source import ExportRequest
        from tcsae.evaluate.exports.run import FeatureForm, export_features
        from tcsae.shared.store.reader import open_store

        request = ExportRequest(name=name, **options)
        target = target or path / f"export-{form}"
        echo(export_features(open_store(place.store), Path(place.runs), request, cast(FeatureForm, form), target))
        return
    folder = export_run(path, cast(Format, form), target)
    echo(f"{name} as {form}: {folder}")
