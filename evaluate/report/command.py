"""The `report` and `feature` commands."""

from typing import TYPE_CHECKING, Any

import click

from tcsae.shared.base.cli import Count, Place, StageCommand, device_option

if TYPE_CHECKING:
    from pathlib import Path

    from tcsae.evaluate.report.report import Written

SPLIT = click.Choice(("train", "eval"))


def report_folder(runs_path: "Path", out: str | None) -> "Path":
    """Where the report of a folder of runs lies: beside it, unless another place is given."""
    return runs_path.parent / "report" if out is None else type(runs_path)(out)


@click.command(cls=StageCommand)
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option("--out", metavar="PATH", help="The folder to write. Default: report, beside the folder of runs.")
@click.option("--split", type=SPLIT, default="eval", show_default=True, help="Where the features' text is from.")
@click.option("--max-tokens", type=Count(), help="Look at so many of its tokens only. Default: all.")
@click.option("--force", is_flag=True, help="Write it again, even if nothing has changed.")
@device_option("SAEs encode")
@click.option("--tracker", metavar="NAME", help="Log figures and report to each run's tensorboard or wandb.")
@click.pass_obj
def report(place: Place, tracker: str | None, **asked: Any) -> None:
    """Write the report: one folder of pages that opens from disk, with a browser of every feature.

    Made from the store, the SAEs and their evaluations alone, without the language model, a server or a network: open
    index.html, or send the folder as a zip. Runs that are not evaluated are named as left out, and why.

    \b
      tcsae train --preset topk --preset temporal-topk-centred eval report
      tcsae report --run topk --split train --max-tokens 1M --out topk-report
    """
    from pathlib import Path

    from tcsae.evaluate.report.report import folder_bytes
    from tcsae.shared.base.console import legible, say, size
    from tcsae.shared.base.distributed import ranks
    from tcsae.shared.base.trackers import check_tracker, log_results

    if ranks().rank:
        return  # of several processes the first writes it
    if tracker:
        check_tracker(tracker)
    written = write_as_asked(place, asked)
    for one in written.excluded:
        say(f"{one.name}: left out. {one.why}")
    if not written.is_new:
        say("Nothing has changed since it was written. Write it again with --force.")
    for run in written.included if tracker else ():
        figures = {name: value for name, value in run.evaluation["metrics"].items() if value is not None}
        log_results(str(tracker), Path(place.runs) / run.name, figures, written.folder)
    n = len(written.included)
    place_of_report = legible(str(written.folder / "index.html"))
    click.echo(f"Report of {n} SAE{'s' * (n != 1)}, {size(folder_bytes(written.folder))}: {place_of_report}")


def write_as_asked(place: Place, asked: dict[str, Any]) -> "Written":
    """Write the report that the command's options ask for."""
    from pathlib import Path

    from tcsae.evaluate.report.report import ReportRequest, write_report
    from tcsae.shared.base.device import choose_device
    from tcsae.shared.store.reader import open_store

    runs_path = Path(place.runs)
    folder = report_folder(runs_path, asked["out"])
    settings = {name: value for name, value in asked.items() if name != "out"}
    request = ReportRequest(**settings | {"device": str(choose_device(asked["device"]))})
    return write_report(open_store(place.store), runs_path, folder, request)


@click.command(cls=StageCommand)
@click.option("--run", "name", metavar="NAME", help="A run below --runs. Default: the only one.")
@click.option("--id", "latent", type=click.IntRange(min=0), required=True, metavar="N", help="Number of the latent.")
@click.option("--split", type=SPLIT, default="eval", show_default=True, help="Where its text is from.")
@click.option("--max-tokens", type=Count(), help="Look at so many of its tokens only. Default: all.")
@click.option(
    "--contexts",
    "n_contexts",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Sequences shown, at most.",
)
@click.option("--report", "kept_in", metavar="PATH", help="The report to read. Default: report, beside the runs.")
@click.pass_obj
def feature(
    place: Place,
    name: str | None,
    latent: int,
    split: str,
    max_tokens: int | None,
    n_contexts: int,
    kept_in: str | None,
) -> None:
    """Show one feature: its measures, where it fires, what it promotes, and the latents most like it.

    Read from the report where it has this SAE's current figures and the same text, in a second; else from a pass of the
    SAE over the store.

    Under each sequence is one bar for each token. In a terminal the active tokens are shaded, and the strongest is bold
    and underlined; elsewhere they stand in brackets: ⟦this⟧.

    \b
      tcsae feature --run topk --id 12
    """
    from pathlib import Path

    from tcsae.evaluate.report.features.printed_feature import print_feature
    from tcsae.evaluate.report.features.shown_feature import FeatureRequest, feature_of_report

    runs_path, request = Path(place.runs), FeatureRequest(name, latent, split, max_tokens)
    shown = feature_of_report(place.store, runs_path, report_folder(runs_path, kept_in), request)
    if shown is None:
        from tcsae.evaluate.report.features.feature_computed import computed_feature
        from tcsae.shared.store.reader import open_store

        shown = computed_feature(open_store(place.store), runs_path, request)
    print_feature(shown, n_contexts)
