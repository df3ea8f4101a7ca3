"""Promise: names and tokens never reach the terminal as commands to it, whoever prints them."""

import re

import pytest
from click.testing import CliRunner

from tcsae.shared.base.console import echo, legible, legible_lines, progress, say, table
from tcsae.shared.commands.group import cli

HOSTILE = {
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "C1": "\x9b31m",
    "override": "\u202etxt.exe",
    "isolate": "\u2066a\u2069",
    "zero width": "a\u200bb\ufeff",
    "carriage return": "evil\rgood",
    "backspace": "evil\b\b\b\bgood",
    "lone surrogate": "a\udcffb",
    "markup": "[red]x[/red] {0}",
}
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def print_progress(name: str) -> None:
    with progress(name, 3) as advance:
        advance(3, name)


PLACES = {
    "say": say,
    "echo": echo,
    "progress": print_progress,
    "table title": lambda name: table(name, ["a"], [[1]]),
    "table column": lambda name: table("", [name, name], [[1, 2]]),
    "table cell": lambda name: table("", ["a", "b"], [[name, name]]),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", PLACES)
def test_what_prints_a_name_prints_it_legibly(place, kind, capsys):
    name = HOSTILE[kind]
    PLACES[place](name)
    printed = "".join(capsys.readouterr())
    assert not RAW.search(printed), repr(printed)
    assert "".join(legible(name).split()) in "".join(printed.split()), "a narrow table folds its title"


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "lone surrogate"])
@pytest.mark.parametrize(
    "option", ["--model", "--dataset", "--hook", "--text-field", "--revision", "--dataset-revision", "--split"]
)
def test_an_error_line_names_what_was_asked_legibly(option, kind, tiny_lm, tiny_corpus, tmp_path):
    given = {"--model": str(tiny_lm), "--dataset": str(tiny_corpus), "--sequence-length": "32"}
    given |= {"--hook": "blocks.0.hook_resid_post", option: HOSTILE[kind]}
    arguments = [part for pair in given.items() for part in pair]
    done = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), "harvest", *arguments])
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert not RAW.search(line), repr(line)


def test_ordinary_text_stays():
    assert legible("Grüße, 世界 🙂 naïve [x]") == "Grüße, 世界 🙂 naïve [x]"
    assert legible_lines("a\nb\x1b") == "a\nb\\x1b"
