"""Promise: nothing that a folder is called, or a file says, reaches the terminal as a command of it."""

import json
from pathlib import Path

import pytest
import toy_eval as toy
from click.testing import CliRunner

from tcsae.shared.base.console import legible, progress, say, table
from tcsae.shared.commands.group import cli

HOSTILE = "a\x1b[31m\u202eb\x07\u2066c"
RAW = ("\x1b", "\u202e", "\x07", "\u2066")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[str, Path]:
    """A store, and an evaluated run with a hostile name, preset and architecture."""
    folder = tmp_path_factory.mktemp("place")
    store = toy.write_store(folder / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    toy.make_run(folder / "runs", HOSTILE, toy.make_sae(), store, preset=HOSTILE)
    (folder / "runs" / f"{HOSTILE}-unfinished").mkdir()
    (folder / "runs" / HOSTILE / "metrics.jsonl").write_text(json.dumps({HOSTILE: 1}) + "\n")
    return store.location, folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "--details", "--force"),
        ("eval",),
        ("report", "--force"),
        ("feature", "--id", "1", "--run", HOSTILE),
        ("export", "--to", "saelens", "--run", HOSTILE),
        ("inspect",),
    ],
)
def test_names_of_runs_are_escaped(place, arguments):
    store, runs = place
    done = CliRunner().invoke(cli, ["--store", store, "--runs", str(runs), *arguments])
    assert done.exit_code == 0, done.output
    assert not [one for one in RAW if one in done.output]
    assert "a\\x1b[31m\\u202eb\\x07\\u2066c" in done.output.replace("\n", "")


def test_every_way_to_the_console_escapes(capsys):
    say(HOSTILE)
    table(HOSTILE, (HOSTILE, "x"), [[HOSTILE, HOSTILE]])
    with progress(HOSTILE, total=1):
        pass
    shown = capsys.readouterr()
    assert not [one for one in RAW if one in shown.out + shown.err]
    assert shown.out.count(legible(HOSTILE)) == 4


def test_legible_text_is_left_alone():
    assert legible(legible(HOSTILE)) == legible(HOSTILE)
    assert legible("\udc80") == "\\udc80", "part of a file name that is no UTF-8"


def test_a_title_is_one_line_however_narrow_its_table(capsys):
    title = "a long title of a table that has next to no columns: autocorrelation by lag"
    table(title, ("", "x"), [["a", None]])
    assert capsys.readouterr().out.splitlines()[0] == title
