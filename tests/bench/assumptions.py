"""Assumptions of a script's arithmetic: each a flag, printed with where its default comes from."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Assumption:
    """A flag: its default, what it is, and where the default comes from."""

    default: float
    about: str
    source: str


def parse_number(text: str) -> float:
    """300, 250K, 9G."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1].upper(), 1.0)
    return float(text[:-1] if scale > 1 else text) * scale


def parse_assumptions(
    parser: argparse.ArgumentParser, assumptions: Mapping[str, Assumption]
) -> tuple[argparse.Namespace, dict[str, float]]:
    """The command line with a flag for each assumption, and their values, which are printed."""
    for name, one in assumptions.items():
        help_text = f"{one.about} ({one.default:g}: {one.source})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse_number, default=one.default, help=help_text)
    arguments = parser.parse_args()
    values = {name: getattr(arguments, name) for name in assumptions}
    print("assumptions, each a flag:")
    for name, one in assumptions.items():
        source = one.source if values[name] == one.default else "given"
        print(f"  --{name.replace('_', '-'):17s} {values[name]:<12g} {one.about}; {source}")
    return arguments, values
