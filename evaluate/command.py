"""The `eval` command."""

import json
from typing import TYPE_CHECKING, Any, Literal

import click

from tcsae.shared.base.cli import Place, StageCommand, device_option, precision_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tcsae.evaluate.candidates import EvalRequest
    from tcsae.evaluate.run import Evaluated
    from tcsae.shared.store.reader import Store


@click.command(name="eval", cls=StageCommand)
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option(
    "--compare",
    multiple=True,
    metavar="A",
    help="Print the paired differences of run A and that of --with, and no more. Repeatable, as is --with, for several "
    "seeds in the same order: intervals then are over seeds and documents.",
)
@click.option(
    "--with", "other", multiple=True, metavar="B", help="The run that --compare is with. Either may be as RUN+ema=0.3."
)
@click.option("--json", "as_json", is_flag=True, help="Print the evaluations as one JSON document in place of tables.")
@click.option("--force", is_flag=True, help="Evaluate again what is evaluated already.")
@click.option("--temporal/--no-temporal", default=True, show_default=True, help="Temporal and position measures.")
@click.option(
    "--details",
    is_flag=True,
    help="Also print every temporal measure with its null and interval, variants "
    "of a figure, and figures that are equal.",
)
@click.option(
    "--smooth",
    multiple=True,
    metavar="KIND=VALUE",
    help="Also score each SAE with its codes smoothed along the sequence: ema=0.3 (exponential moving average), "
    "ema-topk=0.3 (the same, its k largest kept), mean=3 (mean of the last 3 positions), hysteresis=2 (a latent stays "
    "on while among the 2k largest), scale=0.9 (no smoothing: a control). Repeatable; the result is named RUN+ema=0.3.",
)
@click.option(
    "--documents",
    type=click.Choice(("all", "choose", "report")),
    default="all",
    show_default=True,
    help="Documents that are counted. Choose settings on one half, and report figures on the other.",
)
@click.option(
    "--ce-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cross-entropies and KL on the first documents that hold N tokens, all other figures on all: the layers after "
    "the hook run once for each token and SAE. Default: all.",
)
@click.option(
    "--probe-latents",
    type=click.IntRange(min=1),
    default=512,  # probes.PROBE_LATENTS, which would load torch
    show_default=True,
    metavar="N",
    help="Latents that the probes of --temporal read, those of largest variance; d_sae for all. Time and memory "
    "grow with its square.",
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
    "--positions",
    multiple=True,
    metavar="ROLE",
    help="Count the tokens of this role of a conversation alone; repeatable. Default: as each run was trained.",
)
@device_option("SAEs and tail run")
@precision_option("the SAEs' encoder and decoder. Sums are in float64.")
@click.pass_obj
def evaluate(
    place: Place,
    names: tuple[str, ...],
    compare: tuple[str, ...],
    other: tuple[str, ...],
    splice: Literal["counted", "all"],
    details: bool,
    smooth: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Score trained SAEs on the store's eval split, without the language model.

    \b
      tcsae eval
      tcsae eval --run topk --details
      tcsae eval --smooth ema=0.3 --smooth hysteresis=2
      tcsae eval --json > figures.json

    Writes eval.json into each run's folder, and saebench_core.json, the same figures in SAEBench's form. Prints tables
    with 95% intervals over documents. Cross-entropies and KL divergences come through the tail: the layers after the
    hook, which the store holds. SAEs of other tools are scored as well: folders below --runs in SAELens' layout.

    With torchrun the SAEs are divided among the processes, or the documents where there are fewer SAEs than processes.
    """
    if len(compare) != len(other):
        raise click.UsageError("--compare A needs --with B, and --with needs --compare: as often as each other.")

    from pathlib import Path

    from tcsae.evaluate.candidates import EvalRequest
    from tcsae.evaluate.measures.smoothing import split_name
    from tcsae.evaluate.printed_tables import show
    from tcsae.shared.base.distributed import ranks

    runs_path, pair = Path(place.runs), [*compare, *other]
    parts = [split_name(name) for name in pair]
    smooth += tuple(one for _, one in parts if one)
    processes = ranks()
    device, precision = settings.pop("device"), settings.pop("precision")
    request = EvalRequest(
        names=list(dict.fromkeys(run for run, _ in parts)) or names, splice=splice, smooth=smooth, **settings
    )
    evaluations, refused = evaluate_as_asked(place, request, device, precision)
    by_name = {one["name"]: one for one in evaluations}
    full_names = ["+".join(filter(None, one)) for one in parts]
    if pair and not refused and all(name in by_name for name in full_names):  # without a rendezvous each has its own
        chosen = [by_name[name] for name in full_names]
        show_pairs(runs_path, chosen[: len(compare)], chosen[len(compare) :], details=details, as_json=as_json)
    elif as_json and (evaluations or not processes.rank):
        click.echo(json.dumps({"evaluations": evaluations}, indent=2))
    elif evaluations or not processes.parallel:
        show(evaluations, place.runs, details)
    raise_refused(refused)


def raise_refused(refused: list[str]) -> None:
    """Raises RunError for runs without figures; all lines but the last are printed before."""
    from tcsae.shared.base.console import complain
    from tcsae.shared.base.errors import RunError

    for line in refused[:-1]:
        complain(line)
    if refused:
        raise RunError(refused[-1])


def evaluate_as_asked(place: Place, request: "EvalRequest", device: str, precision: str) -> "Evaluated":
    """Evaluate, in as many processes as there are; what this one is to show."""
    from pathlib import Path

    from tcsae.evaluate.run import evaluate_parallel, evaluate_runs
    from tcsae.shared.base.device import choose_device, set_precision
    from tcsae.shared.base.distributed import device_of, ranks
    from tcsae.shared.store.reader import open_store

    processes = ranks()
    chosen = device_of(processes, choose_device(device))
    set_precision(precision, chosen)
    if processes.parallel:
        return evaluate_parallel(open_store(place.store), Path(place.runs), request, processes, chosen)
    return evaluate_runs(open_store(place.store), Path(place.runs), request, device=chosen)


def show_pairs(
    runs_path: "Path",
    ones: "Sequence[dict[str, Any]]",
    others: "Sequence[dict[str, Any]]",
    *,
    details: bool,
    as_json: bool,
) -> None:
    """Print the paired differences of two evaluations, or of as many as there are seeds."""
    from tcsae.evaluate.printed_tables import difference_table, differences, seed_differences

    n_seeds = len(ones)
    if n_seeds == 1:
        paired = differences(runs_path, ones[0], others[0])
    else:
        paired = seed_differences(runs_path, ones, others)
    if as_json:
        names = [[one["name"] for one in side] for side in (ones, others)]
        run, other = (side[0] if n_seeds == 1 else side for side in names)
        click.echo(json.dumps({"run": run, "with": other, "differences": paired}, indent=2))
    else:
        difference_table(ones[0], others[0], paired, details, n_seeds)


@click.command(cls=StageCommand)
@click.option(
    "--run",
    "name",
    metavar="RUN",
    help="The run that is compared. Default, if --runs holds just two: the temporal one.",
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="RUN",
    help="A run to compare it with; repeatable. As RUN+ema=0.3: with its codes smoothed, as in eval --smooth. "
    "Default: the other of the two; needed if there are more.",
)
@click.option("--details", is_flag=True, help="Also print equal figures, and variants of a figure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of tables.")
@click.pass_obj
def compare(place: Place, name: str | None, others: tuple[str, ...], details: bool, as_json: bool) -> None:
    """Compare a run with others on the same documents: one table, the paired differences, and two sentences.

    \b
      tcsae compare --run temporal-topk-centred --with topk
      tcsae compare --run temporal-topk-centred --with topk --with topk+ema-topk=0.3
      tcsae compare --json

    Runs that are not evaluated yet are evaluated first. Differences are paired: both SAEs on the same resampling of the
    documents, so that a 95% interval is of the difference itself. A star: it leaves out zero.
    """
    from pathlib import Path

    from tcsae.evaluate import headline
    from tcsae.evaluate.printed_tables import difference_table, differences
    from tcsae.shared.base.console import echo, table
    from tcsae.shared.base.distributed import ranks
    from tcsae.shared.store.reader import open_store

    if ranks().rank:
        return  # of several processes the first compares
    runs_path = Path(place.runs)
    names = chosen_runs(runs_path, name, others)
    one, *rest = evaluated(open_store(place.store), runs_path, names)
    pairs = [(other, differences(runs_path, one, other)) for other in rest]
    said = [headline.sentences(one, other, paired) for other, paired in pairs]
    if as_json:
        columns = ("run", *headline.COLUMNS[1:])
        figures = [dict(zip(columns, row, strict=True)) for row in headline.rows([*rest, one])]
        compared = [
            {"run": one["name"], "with": other["name"], "differences": paired, "sentences": lines}
            for (other, paired), lines in zip(pairs, said, strict=True)
        ]
        click.echo(json.dumps({"rows": figures, "comparisons": compared}, indent=2))
        return
    for other, paired in pairs:
        difference_table(one, other, paired, details)
    table(
        f"On {one['n_tokens']:,} eval tokens",
        headline.COLUMNS,
        [headline.shown(row) for row in headline.rows([*rest, one])],
    )
    echo(headline.LEGEND)
    for lines in said:
        echo("\n" + "\n".join(lines))
    echo(f"\nEvery figure, interval and definition: {runs_path}/{one['name'].partition('+')[0]}/eval.json")
    if (page := runs_path.parent / "report" / "index.html").is_file():
        echo(f"Curves, features and text: open {page}")


def chosen_runs(runs_path: "Path", name: str | None, others: "Sequence[str]") -> list[str]:
    """The run and those it is compared with. Without options: two runs, the temporal one first.

    Raises RunError if there are not two to choose.
    """
    from tcsae.evaluate.candidates import evaluable
    from tcsae.evaluate.measures.smoothing import split_name
    from tcsae.shared.base.errors import RunError
    from tcsae.shared.sae.folder import RECORD, load_record

    folders = evaluable(runs_path, ())
    names = [folder.name for folder in folders]
    if name is not None and others:
        return list(dict.fromkeys([name, *others]))
    if len(names) != 2 or (name or names[0]) not in names:
        raise RunError(
            f"{runs_path} holds {len(names)} runs ({', '.join(names)}); without --run and --with compare takes two. "
            "Name them: --run A --with B."
        )
    records = {folder.name: load_record(folder) if (folder / RECORD).is_file() else {} for folder in folders}

    def plain(run: str) -> bool:
        temporal = records[run].get("train", {}).get("temporal", {})
        return not (temporal.get("weight") or temporal.get("budget"))

    ordered, compared = sorted(names, key=plain), {split_name(other)[0] for other in others}
    first = name or next((run for run in ordered if run not in compared), ordered[0])
    return list(dict.fromkeys([first, *(others or names)]))


def evaluated(store: "Store", runs_path: "Path", names: "Sequence[str]") -> list[dict[str, Any]]:
    """Evaluations of runs, some of them as RUN+ema=0.3, in the order named; made where there is none yet.

    Raises RunError for a run that cannot be evaluated.
    """
    from tcsae.evaluate.candidates import EvalRequest
    from tcsae.evaluate.measures.smoothing import split_name
    from tcsae.evaluate.run import evaluate_runs
    from tcsae.shared.base.errors import RunError

    smoothings: dict[str, list[str]] = {}
    for run, smooth in map(split_name, names):
        smoothings.setdefault(run, []).extend([smooth] if smooth else [])
    by_name: dict[str, dict[str, Any]] = {}
    for shared in dict.fromkeys(map(tuple, smoothings.values())):
        runs = [run for run, ones in smoothings.items() if tuple(ones) == shared]
        evaluations, refused = evaluate_runs(store, runs_path, EvalRequest(names=runs, smooth=shared))
        if refused:
            raise RunError(refused[-1])
        by_name |= {one["name"]: one for one in evaluations}
    return [by_name["+".join(filter(None, split_name(name)))] for name in names]
