"""The `tcsae` program: one chained group. It names the stages as strings and imports one when it is asked for.

Errors that the user can cure end here as one line and exit code 1: `TcsaeError`, and whatever the disk or the memory
refuses. Any other exception is a bug of ours and keeps its traceback.
"""

import errno
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click

from tcsae import __version__
from tcsae.shared.base.cli import CHAIN, Place, StageCommand
from tcsae.shared.base.console import OUTPUT, legible
from tcsae.shared.base.errors import DiskError, Stopped, TcsaeError, unknown
from tcsae.shared.base.files import disk_line
from tcsae.shared.base.signals import end_on_interrupt
from tcsae.shared.commands.completion import with_values
from tcsae.shared.commands.help_groups import GROUPS, LINES

STAGES = {
    "harvest": "tcsae.harvest.command:harvest",
    "import": "tcsae.harvest.imports.command:import_",
    "train": "tcsae.train.command:train",
    "eval": "tcsae.evaluate.command:evaluate",
    "compare": "tcsae.evaluate.command:compare",
    "probe": "tcsae.evaluate.probing.command:probe",
    "latents": "tcsae.evaluate.latents.command:latents",
    "stability": "tcsae.evaluate.dictionary.command:stability",
    "report": "tcsae.evaluate.report.command:report",
    "feature": "tcsae.api.command:feature",
    "convert": "tcsae.api.command:convert",
    "serve": "tcsae.serve.command:serve",
    "presets": "tcsae.train.command:presets",
    "inspect": "tcsae.shared.commands.store_commands:inspect",
    "verify": "tcsae.shared.commands.store_commands:verify",
    "copy": "tcsae.shared.commands.store_commands:copy",
    "export": "tcsae.evaluate.exports.command:export",
    "push": "tcsae.shared.hub.command:push",
    "pull": "tcsae.shared.hub.command:pull",
    "paper": "tcsae.paper.command:paper",
    "methods": "tcsae.paper.command:methods",
    "real-lm": "tcsae.paper.command:real_lm",
    "synthetic": "tcsae.synthetic.command:synthetic",
    "planted": "tcsae.synthetic.command:planted",
    "completion": "tcsae.shared.commands.completion:completion",
}
SPINS = "10000"
"""Times that an idle OpenMP thread looks for work before it sleeps. By default it hardly ever sleeps, and one busy
process beside it costs training most of its speed (`python tests/bench/busy.py`)."""


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
        command = with_values(getattr(importlib.import_module(module), name))
        if isinstance(command, StageCommand):
            command.groups = GROUPS.get(cmd_name, {})
            command.short_help = LINES.get(cmd_name, command.short_help)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in STAGES and not args[0].startswith("-"):
            raise click.UsageError(unknown("command", args[0], STAGES), ctx)
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta.setdefault(CHAIN, []).append(name)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TcsaeError as error:
            raise failure(str(error)) from error
        except Stopped as stop:
            OUTPUT.record(str(stop))
            click.echo(legible(str(stop)), err=True)
            sys.exit(stop.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MemoryError as error:
            raise failure(
                f"Out of memory ({one_line(str(error)) or 'no more could be had'}). Lower the sizes, or use a machine "
                "with more."
            ) from error
        except Exception as error:
            line = disk_line(error)
            if line is None or getattr(error, "errno", None) == errno.EPIPE:  # a closed pipe is click's
                raise
            raise failure(line) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. The same command goes on from what is on disk.", err=True)
            sys.exit(130)


def failure(text: str) -> click.ClickException:
    """An error as one line, which the log file gets as well."""
    OUTPUT.record(f"Error: {one_line(text)}")
    return click.ClickException(one_line(text))


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
@click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks on stderr: results and errors only.")
@click.option("--log-file", metavar="FILE", help="Also append progress, remarks and errors to a file, with the time.")
@click.version_option(__version__, prog_name="tcsae")
@click.pass_context
def cli(ctx: click.Context, store: str, runs: str, quiet: bool, log_file: str | None) -> None:
    """Store a language model's activations once, then train and evaluate any number of sparse autoencoders without
    the model. Commands chain.

    \b
      tcsae harvest train eval report       the embedded model and corpus, no network
      tcsae --store pythia.zarr --runs pythia harvest --model EleutherAI/pythia-70m --dataset openwebtext train eval
      tcsae compare --run temporal-topk-centred --with topk

    Every stage goes on where it was interrupted. Each command has its own page: tcsae train --help.
    """
    ctx.obj = Place(store, runs)
    OUTPUT.quiet = quiet
    if log_file is not None:
        OUTPUT.log = ctx.with_resource(opened_log(log_file))
        OUTPUT.record(f"tcsae {' '.join(sys.argv[1:])}")


@contextmanager
def opened_log(path: str) -> Iterator[TextIO]:
    """The log file, open for appending. Raises DiskError if the disk refuses it."""
    try:
        file = Path(path).open("a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DiskError(f"--log-file {path} cannot be written ({error.strerror}). Give another file.") from error
    try:
        yield file
    finally:
        OUTPUT.log = None
        file.close()


def main() -> None:
    """Entry point of the `tcsae` script and of `python -m tcsae`."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    end_on_interrupt()
    cli(prog_name="tcsae")
