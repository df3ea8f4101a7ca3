"""The command `probe`."""

from pathlib import Path

import click

from tcsae.shared.base.cli import Place, StageCommand


@click.command(cls=StageCommand, short_help="Probe latents with labels that text and corpus give for free.")
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Labels of your own in place of the free ones: .csv or .parquet, a column a label, a row for each token, "
    "sequence or document of the eval split, or for each number in a column `document`.",
)
@click.option("--quick", is_flag=True, help="The first 25K eval tokens, k = 1 and 5.")
@click.option(
    "--null",
    metavar="STORE",
    help="A null of the store (harvest --control): also print by how much more an SAE beats its baselines on the store "
    "than on the null.",
)
@click.option("--null-runs", metavar="PATH", help="The folder of runs of the same names, trained on it.")
@click.option("--details", is_flag=True, help="Also print every label.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@click.pass_obj
def probe(
    place: Place,
    names: tuple[str, ...],
    labels: Path | None,
    quick: bool,
    null: str | None,
    null_runs: str | None,
    details: bool,
    as_json: bool,
) -> None:
    """k-sparse probing without a language model or a judge: what does a latent, or five, say of a token?

    Labels come from the text and the corpus: doctest line, section of a docstring, quotes, brackets, indentation,
    sentence, digits, package. The rows to compare with are x itself, x smoothed, and each code smoothed: a temporal
    SAE says something new where it beats those. Writes probes.json below --runs.

    \b
      tcsae probe --quick
      tcsae probe --run topk --labels labels.csv --details
    """
    if (null is None) != (null_runs is None):
        raise click.UsageError("--null STORE needs --null-runs PATH, and --null-runs needs --null.")

    import json

    from tcsae.evaluate.probing.probes_run import difference, probe_runs, show, show_difference
    from tcsae.shared.base.console import say
    from tcsae.shared.store.reader import open_store

    result = probe_runs(open_store(place.store), Path(place.runs), names, labels, quick)
    if null is not None and null_runs is not None:
        of_null = probe_runs(open_store(null), Path(null_runs), names, labels, quick)
        result |= {"null": of_null, "difference": difference(result, of_null)}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show(result, details)
        if "difference" in result:
            show_difference(result["difference"], result["labels"])
    for line in result["refused"]:
        say(f"Left out: {line}")
