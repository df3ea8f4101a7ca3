"""The `tcsae` program: one chained group. It names the stages as strings and imports one when it is asked for.

Errors that the user can cure end here as one line and exit code 1: `TcsaeError`, and whatever the disk or the memory
refuses. Any other exception is a bug of ours and keeps its traceback.
"""

import errno
import importlib
import sys

import click

from tcsae import __version__
from tcsae.shared.base.cli import CHAIN, Place
from tcsae.shared.base.console import legible
from tcsae.shared.base.errors import Stopped, TcsaeError, unknown
from tcsae.shared.base.files import disk_line

STAGES = {
    "harvest": "tcsae.harvest.command:harvest",
    "train": "tcsae.train.command:train",
    "eval": "tcsae.evaluate.command:evaluate",
    "probe": "tcsae.evaluate.probing.command:probe",
    "report": "tcsae.evaluate.report.command:report",
    "feature": "tcsae.evaluate.report.command:feature",
    "presets": "tcsae.train.command:presets",
    "inspect": "tcsae.shared.commands.store_commands:inspect",
    "verify": "tcsae.shared.commands.store_commands:verify",
    "copy": "tcsae.shared.commands.store_commands:copy",
    "export": "tcsae.shared.commands.store_commands:export",
    "paper": "tcsae.paper.command:paper",
    "synthetic": "tcsae.synthetic.command:synthetic",
    "planted": "tcsae.synthetic.command:planted",
}


def one_line(text: str) -> str:
    return legible(" ".join(text.split()))


class StageGroup(click.Group):
    """Imports a stage on demand; strings keep `shared` free of the other rooms."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(STAGES)  # the order the data flows in, not the alphabet's

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in STAGES:
            return None
        module, _, name = STAGES[cmd_name].partition(":")
        return getattr(importlib.import_module(module), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in STAGES and not args[0].startswith("-"):
            raise click.UsageError(unknown("command", args[0], STAGES), ctx)
        found = super().resolve_command(ctx, args)
        ctx.meta.setdefault(CHAIN, []).append(found[0])
        return found

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TcsaeError as error:
            raise click.ClickException(one_line(str(error))) from error
        except Stopped as stop:
            click.echo(legible(str(stop)), err=True)
            sys.exit(stop.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MemoryError as error:
            raise click.ClickException(
                f"Out of memory ({one_line(str(error)) or 'no more could be had'}). Ask for less at a time, or use a "
                "machine with more."
            ) from error
        except Exception as error:
            line = disk_line(error)
            if line is None or getattr(error, "errno", None) == errno.EPIPE:  # a closed pipe is click's
                raise
            raise click.ClickException(one_line(line)) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. The same command goes on from what is on disk.", err=True)
            sys.exit(130)


@click.group(cls=StageGroup, chain=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    default="data/activations.zarr",
    show_default=True,
    metavar="STORE",
    help="The activation store: a folder, or s3://, gs://, az:// (http(s):// to read).",
)
@click.option(
    "--runs",
    default="data/runs",
    show_default=True,
    metavar="PATH",
    help="The folder of trained SAEs.",
)
@click.version_option(__version__, prog_name="tcsae")
@click.pass_context
def cli(ctx: click.Context, store: str, runs: str) -> None:
    """Harvest a language model's activations once, train many sparse autoencoders on them, evaluate them again and
    again without the language model. Commands chain:

    \b
      tcsae harvest train eval          the embedded model and corpus, no network
      tcsae harvest --model EleutherAI/pythia-70m --dataset openwebtext --tokens 50M
      tcsae train --preset topk --preset written-run3
      tcsae eval
    """
    ctx.obj = Place(store, runs)


def main() -> None:
    """Entry point of the `tcsae` script and of `python -m tcsae`."""
    cli(prog_name="tcsae")
