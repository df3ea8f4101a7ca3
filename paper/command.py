"""The command `paper`."""

from typing import Any

import click
from click.core import ParameterSource

from tcsae.shared.base.cli import Count, StageCommand


@click.command(cls=StageCommand)
@click.option("--quick", is_flag=True, help="Minutes: few tokens, few steps, one seed. Shows that everything runs.")
@click.option(
    "--only", "keys", multiple=True, metavar="QUESTION", help="One of the questions; repeatable. Default: all."
)
@click.option("--model", default="embedded", show_default=True, metavar="NAME", help="As of `harvest`.")
@click.option("--dataset", default="pydocs", show_default=True, metavar="NAME", help="As of `harvest`.")
@click.option("--tokens", type=Count(), help="Tokens of the store. Default: 1M, of --quick 60K.")
@click.option("--work", default="data/paper", show_default=True, metavar="PATH", help="Folder of stores and runs.")
@click.option("--out", default="docs/results", show_default=True, metavar="PATH", help="Folder that the page goes to.")
@click.pass_context
def paper(
    ctx: click.Context,
    quick: bool,
    keys: tuple[str, ...],
    model: str,
    dataset: str,
    tokens: int | None,
    **where: Any,
) -> None:
    """Reproduce the paper's table, train its equations, test its claim: harvest, train, evaluate, write the page.

    The whole takes about an hour on two cores with the embedded model. What is done is not done again, so that it can
    be stopped and started; --only takes one question at a time, and the page shows all that are complete.

    \b
      tcsae paper --quick --out /tmp/results
      tcsae paper
      tcsae paper --model EleutherAI/pythia-70m --dataset openwebtext --tokens 10M --work pythia-paper
      torchrun --nproc-per-node 2 -m tcsae paper        runs dealt out to two processes

    Questions: table, frontier, shuffled, smoothing, boundary, probes, frequency, position, nulls, windows, sparsity,
    lengths, without, default.
    """
    assert ctx.parent is not None
    for name in ("store", "runs"):
        if ctx.parent.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is not for paper, which has stores and runs of its own below --work.")

    from pathlib import Path

    from tcsae.paper.results import Place, Source
    from tcsae.paper.run import FULL, QUICK, answer

    size = QUICK if quick else FULL
    asked = Source(model=model, dataset=dataset, n_tokens=tokens or size.n_tokens)
    answer(Place(Path(where["work"])), Path(where["out"]), keys, asked, size)
