"""The `serve` command."""

from pathlib import Path

import click

from tcsae.shared.base.cli import Place, StageCommand


@click.command(cls=StageCommand)
@click.option("--run", "names", multiple=True, metavar="NAME", help="A run below --runs; repeatable. Default: all.")
@click.option("--report", "report_path", metavar="PATH", help="The report to serve. Default: report, beside the runs.")
@click.option("--model", metavar="PATH", help="Where the store's language model lies, if it was a local folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="Default: a free one.")
@click.pass_obj
def serve(place: Place, names: tuple[str, ...], report_path: str | None, model: str | None, port: int) -> None:
    """Serve the report to this machine, with the language model and the SAEs loaded.

    Type a text and see every token's features; ablate, clamp or steer one and read what changes; follow the training
    curves. The address that is printed has a secret in it; nothing is written. Stop with Ctrl-C.

    \b
      tcsae eval report serve
    """
    from tcsae.serve.server import ServeRequest, start

    runs_path = Path(place.runs)
    report = Path(report_path) if report_path else runs_path.parent / "report"
    start(place.store, ServeRequest(runs_path=runs_path, report=report, names=names, model=model, port=port))
