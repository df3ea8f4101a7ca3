"""Promise: every help page begins with what the command does and examples of it, and lists options under titles."""

import os
import re

import click
import pytest
from click.testing import CliRunner

from tcsae.paper.pages.page import title_of
from tcsae.paper.sections import KEYS
from tcsae.shared.base.cli import OTHERS, examples_first
from tcsae.shared.commands import group
from tcsae.shared.commands.group import STAGES, cli
from tcsae.shared.commands.help_groups import GROUPS, LINES


def page(*command: str) -> str:
    done = CliRunner().invoke(cli, [*command, "--help"], terminal_width=80, prog_name="tcsae")
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", STAGES)
def test_examples_stand_right_below_the_first_paragraph(name):
    blocks = page(name).split("\n\n")
    assert blocks[0].startswith(f"Usage: tcsae {name}")
    assert blocks[2].split()[0] in ("tcsae", "torchrun", "eval"), blocks[2]


@pytest.mark.parametrize("name", STAGES)
def test_examples_parse(name):
    """Options of each example exist: parsed, not run."""
    command = cli.get_command(click.Context(cli), name)
    known = {
        option
        for one in STAGES
        for param in cli.get_command(click.Context(cli), one).params
        for option in (*param.opts, *param.secondary_opts)
    }
    known |= {option for param in cli.params for option in param.opts} | {"--nproc-per-node"}
    lines = [line for line in command.help.splitlines() if line.strip().startswith(("tcsae ", "torchrun "))]
    assert lines
    for option in re.findall(r"(?<!\S)--[a-z-]+", "\n".join(lines)):
        assert option in known, option


@pytest.mark.parametrize("name", GROUPS)
def test_titles_name_options_that_exist(name):
    command = cli.get_command(click.Context(cli), name)
    options = {option for param in command.params for option in param.opts}
    listed = [option for options_ in GROUPS[name].values() for option in options_]
    assert set(listed) <= options
    assert len(set(listed)) == len(listed)
    shown = page(name)
    assert shown.count(f"\n{OTHERS}:") == 1
    assert all(f"\n{title}:\n" in shown for title in GROUPS[name])
    first = [param.opts[0] for param in command.params if not getattr(param, "hidden", False)]
    assert {option for option in first if option.startswith("-")} == set(listed), "--help alone is under no title"
    for option in first:
        assert re.search(rf"^  (-\w, )?{option}[\s,]|/ {option}", shown, re.MULTILINE), option


def test_the_paper_s_questions_are_those_of_its_page():
    shown = page("paper")
    for key in KEYS:
        assert f"\n    {key:11}{title_of(key)}\n" in shown


def test_what_compare_takes_by_default_is_said():
    shown = " ".join(page("compare").split())
    assert "Default, if --runs holds just two: the temporal one." in shown
    assert "Default: the other of the two; needed if there are more." in shown


def test_every_command_has_a_line_that_is_not_cut():
    shown = page()
    assert LINES.keys() == STAGES.keys()
    for name, line in LINES.items():
        assert f"  {name:10}  {line}\n" in shown


def test_examples_come_first_and_the_rest_keeps_its_order():
    text = "It does.\n\nWhy.\n\n\b\nkey  meaning\n\n\b\n  tcsae do\n\nMore."
    assert examples_first(text) == "It does.\n\n\b\n  tcsae do\n\nWhy.\n\n\b\nkey  meaning\n\nMore."


@pytest.mark.parametrize("given, there", [(None, group.SPINS), ("77", "77")])
def test_openmp_spins_less_unless_the_user_says(monkeypatch, given, there):
    seen = {}
    monkeypatch.setattr(group, "cli", lambda **_: seen.update(os.environ))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    group.main()
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is as before after the test
    assert seen["GOMP_SPINCOUNT"] == there
