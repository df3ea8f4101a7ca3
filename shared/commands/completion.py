"""The command `completion`, and the values that a shell completes: presets, and runs below --runs."""

import ast
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from tcsae.shared.base.cli import StageCommand

PROGRAM, VARIABLE = "tcsae", "_TCSAE_COMPLETE"
RECORD = "tcsae.json"
SHELLS = ("bash", "zsh", "fish")


@click.command(cls=StageCommand)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell: commands, options, presets, and the runs below --runs.

    \b
      eval "$(tcsae completion bash)"      in ~/.bashrc
      eval "$(tcsae completion zsh)"       in ~/.zshrc
      tcsae completion fish | source       in ~/.config/fish/config.fish

    Takes effect in the next shell.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source())


class Completed(click.ParamType):
    """Text whose values a shell completes."""

    name = "text"

    def __init__(self, values: Callable[[click.Context], dict[str, str]]) -> None:
        self.values = values

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        return [
            CompletionItem(name, help=about) for name, about in self.values(ctx).items() if name.startswith(incomplete)
        ]


def preset_names(_ctx: click.Context) -> dict[str, str]:
    """Presets of `train` with a line about each, read from the source: to import it takes torch and seconds. Shuffled
    twins of presets, which are controls, are not among them.
    """
    tree = ast.parse((files("tcsae") / "train" / "presets.py").read_text(encoding="utf-8"))
    names = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Preset":
                names[ast.literal_eval(key)] = ast.literal_eval(value.args[0])  # type: ignore[arg-type]
    return names


def run_names(ctx: click.Context) -> dict[str, str]:
    """Trained runs below --runs."""
    path = Path(ctx.find_root().params.get("runs") or "data/runs")
    try:
        return {folder.name: "" for folder in sorted(path.iterdir()) if (folder / RECORD).is_file()}
    except OSError:
        return {}


COMPLETED = {
    "--preset": Completed(preset_names),
    **dict.fromkeys(("--run", "--compare", "--with", "--init-from"), Completed(run_names)),
}


def with_values(command: click.Command) -> click.Command:
    """The command, with values completed for its options named in `COMPLETED`."""
    for param in command.params:
        for name in param.opts:
            if name in COMPLETED and param.type is click.STRING:
                param.type = COMPLETED[name]
    return command
