"""The commands `paper` and `methods`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tcsae.shared.base.cli import Count, StageCommand, device_option

if TYPE_CHECKING:
    from pathlib import Path

    from tcsae.paper.results import Place, Source


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What both commands take."""
    options = (
        click.option(
            "--quick", is_flag=True, help="Minutes: few tokens and steps, one seed. Shows that everything runs."
        ),
        click.option("--model", default="embedded", show_default=True, metavar="NAME", help="As of `harvest`."),
        click.option("--dataset", default="pydocs", show_default=True, metavar="NAME", help="As of `harvest`."),
        click.option("--tokens", type=Count(), help="Tokens of the store. Default: 1M, of --quick 60K."),
        click.option("--out", default="docs/results", show_default=True, metavar="PATH", help="Where the page goes."),
        device_option("SAEs are trained and evaluated"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=StageCommand)
@click.option(
    "--only", "keys", multiple=True, metavar="QUESTION", help="One of the questions; repeatable. Default: all."
)
@click.option("--work", default="data/paper", show_default=True, metavar="PATH", help="Folder of stores and runs.")
@_options
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
    _check_place(ctx)

    from tcsae.paper.run import FULL, QUICK, answer

    size = QUICK if quick else FULL
    answer(*_where(where, model, dataset, tokens or size.n_tokens), keys, size)


@click.command(cls=StageCommand)
@click.option("--work", default="data/methods", show_default=True, metavar="PATH", help="Folder of store and runs.")
@_options
@click.pass_context
def methods(ctx: click.Context, quick: bool, model: str, dataset: str, tokens: int | None, **where: Any) -> None:
    """Train every temporal method on one store, with tuned learning rates and shuffled twins, and print one table.

    What is done is not done again, so that it can be stopped and started.

    \b
      tcsae methods --quick --out /tmp/results
      tcsae methods
      torchrun --nproc-per-node 2 -m tcsae methods        runs dealt out to two processes
    """
    _check_place(ctx)

    from tcsae.paper.methods_run import compare_methods
    from tcsae.paper.run import FULL, QUICK

    size = QUICK if quick else FULL
    compare_methods(*_where(where, model, dataset, tokens or size.n_tokens), size)


def _check_place(ctx: click.Context) -> None:
    """Raises UsageError for options of other commands that these have no use for."""
    assert ctx.parent is not None
    for name in ("store", "runs"):
        if ctx.parent.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name} is not for {ctx.command.name}, which has stores and runs of its own below --work."
            )


def _where(where: dict[str, Any], model: str, dataset: str, n_tokens: int) -> "tuple[Place, Path, Source]":
    from pathlib import Path

    from tcsae.paper.results import Place, Source
    from tcsae.shared.base.device import choose_device
    from tcsae.shared.base.distributed import device_of, ranks

    device = str(device_of(ranks(), choose_device(where["device"])))
    return (
        Place(Path(where["work"]), device),
        Path(where["out"]),
        Source(model=model, dataset=dataset, n_tokens=n_tokens),
    )
