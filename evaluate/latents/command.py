"""The command `latents`."""

from typing import Any

import click

from tcsae.shared.base.cli import Count, Place, StageCommand

PARTS = ("effects", "bits", "redundancy", "tokens", "text")


@click.command(cls=StageCommand, short_help="Measure latents: use, length, redundancy, splitting, readability.")
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), help="One part alone; repeatable. Default: all five."
)
@click.option("--latents", metavar="IDS", help="These latents, as in 3,17,99, in place of drawn and widest ones.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Live latents drawn at random. Default: 32.")
@click.option("--widest", type=click.IntRange(min=0), metavar="N", help="Latents with the widest output. Default: 8.")
@click.option("--tokens", type=Count(), metavar="N", help="Eval tokens looked at, about. Default: 100K.")
@click.option(
    "--tail-tokens",
    type=Count(),
    metavar="N",
    help="Positions the tail is run on for an SAE, at most about. Default: 1M.",
)
@click.option("--quick", is_flag=True, help="25K tokens, 16 latents drawn and 4 widest, less of all else.")
@click.option("--force", is_flag=True, help="Measure again what is measured already.")
@click.option("--details", is_flag=True, help="Also print definitions, every latent looked at, and every label.")
@click.option("--json", "as_json", is_flag=True, help="Print what the files hold as one JSON document.")
@click.pass_obj
def latents(
    place: Place,
    names: tuple[str, ...],
    parts: tuple[str, ...],
    latents: str | None,
    quick: bool,
    details: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure what the latents of SAEs are worth, without the language model: the figures to choose an SAE by.

    \b
      tcsae latents --quick
      tcsae latents --run topk --part effects --latents 3,17,99 --details

    effects: what explained variance and cross-entropy lose without a latent; KL at the 17 tokens from an ablation on;
    steering at equal KL, its side effect and the tokens promoted. Through the tail, exact for the stored activations.
    bits: description length of the code. redundancy: of decoder rows and of firing together. tokens: splitting and
    absorption of first letters, spaces and digits. text: how well ids, their order and labels of the text predict
    firing on held-out documents, and an intruder test.

    Beside each figure stands what it is compared with: random directions, firings shifted in time, permuted ids, x.
    Writes latents.json into each run's folder; a report has a table of it.
    """
    import json
    from pathlib import Path

    from tcsae.evaluate.latents.latents_tables import show
    from tcsae.evaluate.latents.run import measure_latents
    from tcsae.evaluate.latents.settings_of_latents import FULL, QUICK, LatentsRequest
    from tcsae.shared.base.console import say
    from tcsae.shared.base.distributed import ranks
    from tcsae.shared.store.reader import open_store

    numbers = latent_numbers(latents)
    if ranks().rank:
        return  # of several processes the first measures
    request = LatentsRequest(
        names=names,
        parts=tuple(one for one in PARTS if not parts or one in parts),
        latents=numbers,
        budget=QUICK if quick else FULL,
        force=asked.pop("force"),
    ).with_counts(**asked)
    measured = measure_latents(open_store(place.store), Path(place.runs), request)
    if as_json:
        click.echo(json.dumps({"runs": measured.runs}, indent=2))
    else:
        show(measured, request.parts, details)
    for line in measured.refused:
        say(f"Left out: {line}")


def latent_numbers(text: str | None) -> tuple[int, ...]:
    """Raises a usage error for what is no list of numbers."""
    parts = [one.strip() for one in (text or "").split(",") if one.strip()]
    if text is not None and not (parts and all(one.isdecimal() for one in parts)):
        raise click.UsageError(f"--latents {text!r}: give numbers of latents with commas between, as in 3,17,99.")
    return tuple(dict.fromkeys(int(one) for one in parts))
