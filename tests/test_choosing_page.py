"""Promise: docs/choosing.md names commands, options and figures that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from tcsae.evaluate.latents.parts import DEFINITIONS
from tcsae.shared.commands.group import STAGES, StageGroup, cli

PAGE = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(tcsae [^`]+)`", PAGE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_parse(line):
    assert isinstance(cli, StageGroup)
    context, name, words = click.Context(cli), "", {}
    for word in shlex.split(line)[1:]:
        if word in STAGES:
            name, words[word] = word, []
        else:
            words.setdefault(name, []).append(word)
    first = words.pop("", [])  # options of the program itself
    assert words, line
    cli.make_context("tcsae", [*first, *words])
    for name, rest in words.items():
        command = cli.get_command(context, name)
        assert command is not None
        command.make_context(name, rest, parent=context)


def test_its_figures_are_measured():
    figures = {name for part in DEFINITIONS.values() for name in part}
    section = PAGE.partition("## How to read")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", section))
    assert named <= figures and len(named) > 10


def test_it_leads_through_every_part():
    assert all(f"tcsae latents --part {part}`" in PAGE for part in DEFINITIONS)
