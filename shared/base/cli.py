"""The `tcsae` program: one chained group. It knows the stages as strings and imports one when it is asked for."""

import click

from tcsae.shared.base.distributed import has_rendezvous, ranks
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import parse_count

GROUP_OPTIONS = ("--store", "--runs")


CHAIN = "tcsae.chain"
"""Where a context keeps the names of the commands that were given."""


def check_alone(ctx: click.Context) -> None:
    """Raises ConfigError for a chain of commands in several processes that cannot wait for each other."""
    if len(chain := ctx.meta.get(CHAIN, [])) > 1 and ranks().parallel and not has_rendezvous():
        raise ConfigError(
            f"{' '.join(chain)}: in several processes (WORLD_SIZE) each of these takes a start of its own, as the last "
            "process may still be at the first when another begins the second. Or start them with torchrun."
        )


class Place:
    """Where a chain of commands works: the store and the folder of runs."""

    def __init__(self, store: str, runs: str) -> None:
        self.store = store
        self.runs = runs


class StageCommand(click.Command):
    """A command that says where --store and --runs belong when they are given to it, and what it cannot be part of."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in GROUP_OPTIONS:
                where = f"tcsae {error.option_name} PATH {ctx.info_name} ..."
                raise click.UsageError(f"{error.option_name} belongs before the command: {where}", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> object:
        check_alone(ctx)
        return super().invoke(ctx)


class Count(click.ParamType):
    """A count on the command line: 300, 40K, 1.5M, 2G."""

    name = "count"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_count(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)
