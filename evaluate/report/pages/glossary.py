"""What the words in headings mean: the glossary of data/README.md, and the definitions of all figures beside it."""

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

HEADING = "## Glossary"


class Entry(NamedTuple):
    """One line of the glossary."""

    slug: str
    """Its anchor on the page."""
    terms: list[str]
    text: str


class Glossary:
    """Entries in order: those of the README, then the figures that it does not explain, by name."""

    def __init__(self, definitions: Mapping[str, str], readme: str | None = None) -> None:
        if readme is None:
            readme = (files("tcsae") / "data" / "README.md").read_text(encoding="utf-8")
        self.entries = _entries(readme)
        self._slugs = {_key(term): entry.slug for entry in self.entries for term in entry.terms}
        for name, text in sorted(definitions.items()):
            if _key(name) not in self._slugs:
                self.entries.append(Entry(_slug(name), [name], text))
                self._slugs[_key(name)] = _slug(name)

    def slug(self, name: str, label: str = "") -> str:
        """The anchor of a figure's or a column's entry, by its name or its heading; "" if there is none."""
        return self._slugs.get(_key(name)) or self._slugs.get(_key(label), "")


def _entries(readme: str) -> list[Entry]:
    _, heading, rest = readme.partition(f"{HEADING}\n")
    if not heading:
        return []
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    entries = []
    for item in re.findall(r"^[-*] (.+?)(?=^[-*] |^\S|\n\n|\Z)", section, flags=re.MULTILINE | re.DOTALL):
        terms, colon, text = _plain(item).partition(": ")
        if colon:
            named = [term.strip() for term in terms.split(",") if term.strip()]
            entries.append(Entry(_slug(named[0]), named, text))
    return entries


def _plain(item: str) -> str:
    """Without Markdown's signs and line ends."""
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(item.split()))
    return text.replace("`", "").replace("**", "")


def _key(term: str) -> str:
    return re.sub(r"[\s_-]+", " ", term.strip().lower())


def _slug(term: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")
