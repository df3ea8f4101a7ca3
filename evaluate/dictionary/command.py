"""The command `stability`."""

import click

from tcsae.shared.base.cli import Place, StageCommand


@click.command(cls=StageCommand, short_help="Compare the decoders of runs: what they repeat, what they share.")
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option("--pairs", "n_pairs", type=click.IntRange(min=0), default=0, help="Also print so many matched latents.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@click.pass_obj
def stability(place: Place, names: tuple[str, ...], n_pairs: int, as_json: bool) -> None:
    """Compare the decoders of runs, from weights alone: redundancy of each, and how many latents two of them share.

    Compare runs that differ only in the seed: latents they share come from the data, the rest from chance.

    \b
      tcsae train --preset topk --sweep init_seed=0,1,2 stability
    """
    import itertools
    import json

    from tcsae.evaluate.dictionary.runs_compared import compared, show

    result = compared(place.runs, names)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    if n_pairs:
        for one in result["pairs"]:
            one["shown"] = list(itertools.islice(one["matched"], n_pairs))
    show(result)
