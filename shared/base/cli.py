"""Parts of the command line: the commands' common class, its help page, and types of values."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import click

from tcsae.shared.base.distributed import has_rendezvous, ranks
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.files import is_utf8
from tcsae.shared.base.settings import parse_count

GROUP_OPTIONS = {"--store": " PATH", "--runs": " PATH", "--quiet": "", "--log-file": " FILE"}
"""Options of `tcsae` itself, and what follows them."""
OTHERS = "Other options"

CHAIN = "tcsae.chain"
"""Where a context keeps the names of the commands that were given."""


def check_alone(ctx: click.Context) -> None:
    """Raises ConfigError for a chain of commands in parallel processes without a rendezvous."""
    if len(chain := ctx.meta.get(CHAIN, [])) > 1 and ranks().parallel and not has_rendezvous():
        raise ConfigError(
            f"{' '.join(chain)}: processes that WORLD_SIZE counts cannot wait for each other between two commands. "
            "Start each command on its own, or start them with torchrun."
        )


def check_texts(values: Mapping[str, object]) -> None:
    """Raises ConfigError for the value of an option that no file can be named by, or that is not UTF-8."""
    for option, value in values.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and ("\0" in text or not is_utf8(text)):
                what = "a NUL" if "\0" in text else "bytes that are no UTF-8"
                raise ConfigError(f"{option} {text!a} has {what}. Give another name.")


class Place:
    """Where a chain of commands works: the store and the folder of runs."""

    def __init__(self, store: str, runs: str) -> None:
        check_texts({"--store": store, "--runs": runs})
        self.store = store
        self.runs = runs


class StageCommand(click.Command):
    """A command that says where --store and its like belong when they are given to it, and what it cannot be part of.

    Its help begins with the examples of its docstring (paragraphs after \\b whose first line calls a program), and
    lists the options under the titles of `groups`; those that no title names come last.
    """

    groups: Mapping[str, Sequence[str]] = {}
    """Title -> options, as in {"Store": ["--codec"]}."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in GROUP_OPTIONS:
                value = GROUP_OPTIONS[error.option_name]
                where = f"tcsae {error.option_name}{value} {ctx.info_name} ..."
                raise click.UsageError(f"{error.option_name} belongs before the command: {where}", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> object:
        check_alone(ctx)
        check_texts({param.opts[0]: ctx.params.get(param.name or "") for param in self.params})
        return super().invoke(ctx)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(examples_first(inspect.cleandoc(self.help or "")))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {option.opts[0]: row for option in self.get_params(ctx) if (row := option.get_help_record(ctx))}
        for title, names in self.groups.items():
            if listed := [rows.pop(name) for name in names if name in rows]:
                with formatter.section(title):
                    formatter.write_dl(listed)
        with formatter.section(OTHERS if self.groups else "Options"):
            formatter.write_dl(list(rows.values()))


PROGRAMS = ("tcsae", "torchrun", "eval ")


def examples_first(text: str) -> str:
    """A docstring with its examples right below the first paragraph. A paragraph after \\b is one if its first line
    calls a program.
    """
    summary, *rest = text.split("\n\n")
    return "\n\n".join([summary, *sorted(rest, key=lambda paragraph: not _is_example(paragraph))])


def _is_example(paragraph: str) -> bool:
    lines = [line.strip() for line in paragraph.splitlines()]
    return len(lines) > 1 and lines[0] == "\b" and lines[1].startswith(PROGRAMS)


class Count(click.ParamType):
    """A count on the command line: 300, 40K, 1.5M, 2G."""

    name = "count"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_count(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def device_option(what: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """--device; `what` says what runs there."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cuda", "mps", "cpu"]),
        default="auto",
        show_default=True,
        help=f"Where {what}; auto: the first of the others that is there.",
    )


def precision_option(about: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """--precision; `about` says what bf16 is of, and what stays exact."""
    return click.option(
        "--precision",
        type=click.Choice(["float32", "tf32", "bf16"]),
        default="float32",
        show_default=True,
        help=f"Of matrix products on a GPU; bf16: {about}",
    )


def codec_option(about: str, default: str | None = None) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """--codec; `about` says of what, and what holds without it."""
    return click.option(
        "--codec",
        type=click.Choice(["float16", "float32", "bfloat16", "int8", "compact"]),
        default=default,
        show_default=default is not None,
        help=about,
    )
