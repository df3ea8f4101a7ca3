"""The `eval` command."""

from typing import Any, Literal

import click

from tcsae.shared.base.cli import Place, StageCommand


@click.command(name="eval", cls=StageCommand)
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option("--compare", metavar="A", help="Print the paired differences between run A and the run of --with.")
@click.option("--with", "other", metavar="B", help="The run that --compare is with. Either may be as RUN+ema=0.3.")
@click.option("--force", is_flag=True, help="Evaluate again what is evaluated already.")
@click.option("--temporal/--no-temporal", default=True, show_default=True, help="Temporal and position measures.")
@click.option("--details", is_flag=True, help="Also print every temporal measure with its null and interval.")
@click.option(
    "--smooth",
    multiple=True,
    metavar="KIND=VALUE",
    help="Also score each SAE with its codes smoothed along every sequence: ema=0.3 (memory; ema-topk=0.3: of it "
    "the k largest), mean=3 (last positions), hysteresis=2 (latents stay on while among the 2 k largest), scale=0.9 "
    "(only smaller: a control). Repeatable; named like RUN+ema=0.3.",
)
@click.option("--baselines", is_flag=True, help="Also score PCA-k, random directions and an untrained SAE.")
@click.option(
    "--splice",
    type=click.Choice(("counted", "all")),
    default="counted",
    show_default=True,
    help="Where the tail reads reconstructions: at the counted positions (as SAELens), or at all (as SAEBench).",
)
@click.option(
    "--skip-first",
    type=click.IntRange(min=0),
    metavar="N",
    help="First positions of each sequence that are not counted. Default: each run's own in training.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "mps", "cpu"]),
    default="auto",
    show_default=True,
    help="Where SAEs and tail run; auto: the first of the others that is there.",
)
@click.pass_obj
def evaluate(
    place: Place,
    names: tuple[str, ...],
    compare: str | None,
    other: str | None,
    splice: Literal["counted", "all"],
    details: bool,
    smooth: tuple[str, ...],
    device: str,
    **settings: Any,
) -> None:
    """Score trained SAEs on the store's eval split, without the language model.

    Also scores SAEs of others: folders below --runs in SAELens' layout. Writes eval.json into each folder, and
    saebench_core.json, the same in SAEBench's form; prints tables with 95% intervals over documents. The
    cross-entropies and KL divergences need the tail: the layers after the hook, which the store holds. In several
    processes (torchrun) the SAEs are dealt out to them, or the split's documents where there are fewer SAEs than
    processes.
    """
    if (compare is None) != (other is None):
        raise click.UsageError("--compare A needs --with B, and --with needs --compare.")

    from pathlib import Path

    from tcsae.evaluate.candidates import EvalRequest
    from tcsae.evaluate.measures.smoothing import split_name
    from tcsae.evaluate.printed_tables import show, show_differences
    from tcsae.evaluate.run import evaluate_parallel, evaluate_runs
    from tcsae.shared.base.console import say
    from tcsae.shared.base.device import choose_device
    from tcsae.shared.base.distributed import device_of, ranks
    from tcsae.shared.base.errors import RunError
    from tcsae.shared.store.reader import open_store

    runs_path, pair = Path(place.runs), [compare, other] if compare and other else []
    found = [split_name(name) for name in pair]
    smooth += tuple(one for _, one in found if one)
    request = EvalRequest(names=[run for run, _ in found] or names, splice=splice, smooth=smooth, **settings)
    ours = ranks()
    chosen = device_of(ours, choose_device(device))
    if ours.parallel:
        evaluations, refused = evaluate_parallel(open_store(place.store), runs_path, request, ours, chosen)
    else:
        evaluations, refused = evaluate_runs(open_store(place.store), runs_path, request, device=chosen)
    by_name = {one["name"]: one for one in evaluations}
    wanted = ["+".join(filter(None, one)) for one in found]
    if pair and not refused and all(name in by_name for name in wanted):  # without a rendezvous each has its own
        show_differences(runs_path, *(by_name[name] for name in wanted))
    elif evaluations or not ours.parallel:
        show(evaluations, place.runs, details)
    if refused:
        for line in refused[:-1]:
            say(f"Error: {line}")
        raise RunError(refused[-1])
