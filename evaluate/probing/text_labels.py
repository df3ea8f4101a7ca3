"""Labels of tokens from the text alone, as anybody could read them off: spans, sections, depth, the shape of a word."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

SPAN, SHAPE = "span", "token"
"""Kinds: of stretches of text; of single tokens, which their ids give away."""
SECTIONS = {
    "parameters": "parameters?|args|arguments|keyword arguments|other parameters|attributes",
    "returns": "returns?|yields?",
    "raises": "raises|exceptions?|warns",
    "examples": "examples?|usage",
}
HEADING = re.compile(rf"[ \t]*({'|'.join(SECTIONS.values())}|notes?|see also|references|methods)[ \t]*(:?)[ \t]*", re.I)
UNDERLINE = re.compile(r"[ \t]*[-=~]{3,}[ \t]*")
LATE_IN_SENTENCE = 100
"""Characters."""
OPENING, CLOSING = "([{", ")]}"
LONGEST_QUOTE = 200

Marks = Bool[ndarray, " n_characters"]


def _by_pattern(pattern: str, flags: int = re.M) -> Callable[[str], Marks]:
    compiled = re.compile(pattern, flags)

    def mark(text: str) -> Marks:
        marks = np.zeros(len(text), bool)
        for match in compiled.finditer(text):
            marks[match.start() : match.end()] = True
        return marks

    return mark


def _sentence(text: str) -> Int[ndarray, " n_characters"]:
    """Characters since the sentence began."""
    starts = [0, *(match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+|\n[ \t]*\n[ \t]*", text))]
    return np.arange(len(text)) - np.repeat(starts, np.diff([*starts, len(text)]))


def _sentence_late(text: str) -> Marks:
    return _sentence(text) > LATE_IN_SENTENCE


def _sentence_first_word(text: str) -> Marks:
    marks, since = np.zeros(len(text), bool), _sentence(text)
    for start in np.flatnonzero(since == 0):
        if word := re.compile(r"\s*\S+").match(text, int(start)):
            marks[start : word.end()] = True
    return marks


def depth(text: str) -> Int[ndarray, " n_characters"]:
    """Brackets that are open before each character; a blank line closes all."""
    depths, now = np.zeros(len(text), np.int64), 0
    for i, one in enumerate(text):
        depths[i] = now
        if one in OPENING:
            now += 1
        elif one in CLOSING:
            now = max(0, now - 1)
        elif one == "\n" and text[i - 1 : i] == "\n":
            now = 0
    return depths


def indent(text: str) -> Int[ndarray, " n_characters"]:
    """Spaces that the line of each character begins with; a tab counts as 8."""
    lines = text.splitlines(keepends=True)
    widths = [len(line.expandtabs(8)) - len(line.expandtabs(8).lstrip(" ")) for line in lines]
    return np.repeat(np.array(widths, np.int64), [len(line) for line in lines])


def sections(text: str) -> dict[str, Marks]:
    """Of each section of a docstring, NumPy's (underlined) or Google's (a colon), its lines without the heading."""
    marks = {name: np.zeros(len(text), bool) for name in SECTIONS}
    lines, at, now, margin = text.splitlines(keepends=True), 0, None, -1
    for i, line in enumerate(lines):
        heading = HEADING.fullmatch(line.rstrip("\n"))
        underlined = i + 1 < len(lines) and bool(UNDERLINE.fullmatch(lines[i + 1].rstrip("\n")))
        width = len(line) - len(line.lstrip())
        if heading and (heading[2] or underlined):
            now = next((name for name, words in SECTIONS.items() if re.fullmatch(words, heading[1], re.I)), None)
            margin = width if heading[2] else -1
        elif now and line.strip() and width <= margin:
            now = None  # Google's ends where the text comes back to the heading's margin
        elif now and not UNDERLINE.fullmatch(line.rstrip("\n")):
            marks[now][at : at + len(line)] = True
        at += len(line)
    return marks


SPANS: Mapping[str, Callable[[str], Marks]] = {
    "doctest": _by_pattern(r"^[ \t]*(>>>|\.\.\.)( .*)?$"),
    "quote": _by_pattern(rf"(?<![\w\"'`])([\"'])(?=\S)[^\"'\n]{{1,{LONGEST_QUOTE}}}\1(?![\w\"'])|``[^`\n]+``", 0),
    "list_item": _by_pattern(r"^[ \t]*([-*+•]|\d{1,2}[.)]|[a-z]\))[ \t].*$"),
    "sentence_late": _sentence_late,
    "sentence_first_word": _sentence_first_word,
    "in_brackets": lambda text: depth(text) >= 1,
    "in_nested_brackets": lambda text: depth(text) >= 2,
    "indented": lambda text: indent(text) >= 4,
    "deeply_indented": lambda text: indent(text) >= 8,
    "link": _by_pattern(r"https?://\S+"),
}
SHAPES: Mapping[str, Callable[[str], bool]] = {
    "digits": lambda token: any(one.isdigit() for one in token),
    "capitalised": lambda token: token.strip()[:1].isupper(),
    "leading_space": lambda token: token[:1] == " ",
}


def text_labels(documents: Sequence[Sequence[str]]) -> dict[str, tuple[str, Int[ndarray, " n_tokens"]]]:
    """{label: (kind, 0 or 1 for each token)} of documents given as their tokens' texts, laid end to end.

    A token is what its first character is that is no space. What follows may decide (a closing quote): a label says
    what a reader of the whole text would say.
    """
    labels: dict[str, list[ndarray]] = {}
    for tokens in documents:
        text = "".join(tokens)
        lengths = np.array([len(one) for one in tokens], np.int64)
        leading = np.array([len(one) - len(one.lstrip()) for one in tokens], np.int64)
        at = lengths.cumsum() - lengths + np.where(leading < lengths, leading, 0)
        at = at.clip(max=max(0, len(text) - 1))
        marks = {name: mark(text) for name, mark in SPANS.items()}
        marks |= {f"section_{name}": one for name, one in sections(text).items()}
        for name, one in marks.items():
            labels.setdefault(name, []).append(one[at] if len(text) else np.zeros(len(tokens), bool))
        for name, is_so in SHAPES.items():
            labels.setdefault(name, []).append(np.array([is_so(one) for one in tokens], bool))
    kinds = dict.fromkeys(SHAPES, SHAPE)
    return {name: (kinds.get(name, SPAN), np.concatenate(parts).astype(np.int8)) for name, parts in labels.items()}
