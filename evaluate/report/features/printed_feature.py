"""`tcsae feature`: one latent in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

from tcsae.evaluate.report.features.shown_feature import LABELS, ShownFeature
from tcsae.shared.base.console import legible, sparkline

BARS = " ▁▂▃▄▅▆▇█"
SHADES = ("", "on #4a3608", "on #6b4a06", "on #8f6000", "on #b87a00")
"""Backgrounds of active tokens, from weak to strong; the text on them is near white."""
FAR = 8
"""Lag of the measure called persistence."""


def print_feature(shown: ShownFeature, n_contexts: int) -> None:
    """Print it."""
    from rich.console import Console
    from rich.text import Text

    console, feature = Console(highlight=False), shown.feature
    console.print(Text(f"Latent {shown.latent} of {legible(shown.run)}", style="bold"))
    if feature is None:
        console.print(f"It is active at none of the {shown.n_tokens:,} counted {shown.split} tokens.")
        return
    console.print(_measures(shown))
    console.print(_persistence(feature), soft_wrap=True)
    console.print(_sizes(feature), soft_wrap=True)
    console.print(_chips("fires on", [(shown.text(token), None) for token in shown.fires]), soft_wrap=True)
    for line in _lens(shown):
        console.print(line, soft_wrap=True)
    for line in _window(shown):
        console.print(line, soft_wrap=True)
    likes = (
        ("near, by decoder", "near"),
        ("opposite decoder", "opposite"),
        ("fires jointly", "joint"),
        ("correlated", "correlated"),
    )
    for title, name in likes:
        pairs = [(str(other), f"{likeness:.2f}") for other, likeness in feature[name]]
        console.print(_chips(title, pairs), soft_wrap=True)
    for one in feature["contexts"][:n_contexts]:
        console.print()
        for line in _context(one, shown, console.is_terminal):
            console.print(line, soft_wrap=True)


def _persistence(feature: Any) -> str:
    """The autocorrelation over lags; a dash where no pair of tokens tells it."""
    rho, null = feature["rho"], feature["null"]
    shown = ["-" if value is None else f"{value:.3f}" for value in (rho[0], rho[FAR - 1], null)]
    known = [max(0.0, value) for value in rho if value is not None]
    curve = f"{sparkline([*known, 0.0], len(known) + 1)[:-1]} " if known else ""
    return (
        f"persistence       {curve}autocorrelation within documents, lags 1 to {len(rho)}: "
        f"{shown[0]}, {shown[1]} at {FAR}; permuted {shown[2]}"
    )


def _sizes(feature: Any) -> str:
    """Its activations as a histogram."""
    width, counts = feature["histogram"]
    bars = sparkline([*map(float, counts), 0.0], len(counts) + 1)[:-1]
    return f"activations       {bars} 0 to {width * len(counts):.3g}, {sum(counts):,} of them"


def _measures(shown: ShownFeature) -> str:
    parts = [f"{LABELS[name]} {_figure(value)}" for name, value in shown.measures.items()]
    return f"on {shown.n_tokens:,} counted {shown.split} tokens: {', '.join(parts)}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.3g}"


def _lens(shown: ShownFeature) -> list[Any]:
    from rich.text import Text

    feature = shown.feature or {}
    if "up" not in feature:
        return [Text(f"no logit lens: {shown.no_lens}")]
    return [
        _chips(title, [(shown.text(token), f"{change:+.1f}") for token, change in feature[name]])
        for title, name in (("promotes", "up"), ("suppresses", "down"))
    ]


def _window(shown: ShownFeature) -> list[Any]:
    """What a crosscoder's latent adds at each position of its window."""
    window = (shown.feature or {}).get("window", [])
    titles = [f"at t{at}" if at else "at t" for at in range(1 - len(window), 1)]
    return [
        _chips(
            title, [(f"{share:.0%}", f"of its norm², cosine {cosine:.2f} with t"), *((shown.text(t), None) for t in up)]
        )
        for title, (share, cosine, up) in zip(titles, window, strict=True)
    ]


def _chips(title: str, values: Sequence[tuple[str, str | None]]) -> Any:
    from rich.text import Text

    line = Text(f"{title:<18}")
    for i, (value, note) in enumerate(values):
        line.append("  " if i else "")
        line.append(value.replace(" ", "␣"), style="bold")
        line.append(f" {note}" if note else "", style="dim")
    return line


def _context(context: list[Any], shown: ShownFeature, shaded: bool) -> list[Any]:
    """Where it is from; the text; a bar a token."""
    from rich.text import Text

    number, quantile, positions, values = context
    document, start, tokens = shown.sequences[number]
    peak, largest = max(values), float(shown.measures["max"] or 1)
    active = dict(zip(positions, values, strict=True))
    strongest = positions[values.index(peak)]
    which = "one of the strongest" if quantile is None else f"around the {100 * quantile:.0f}% quantile"
    text, was_active = Text(), False
    for position, token in enumerate(tokens):
        share = active.get(position, 0.0) / largest
        if shaded:
            style = f"#f4f4f0 {SHADES[min(4, 1 + int(share * 4))]}" if share > 0 else ""
            text.append(shown.text(token), style=f"{style} bold underline" if position == strongest else style)
        else:  # a pair of brackets around each run
            text.append(("" if (share > 0) == was_active else "⟦" if share > 0 else "⟧") + shown.text(token))
        was_active = share > 0
    if was_active and not shaded:
        text.append("⟧")
    shares = [active.get(position, 0.0) / largest for position in range(len(tokens))]
    bars = "".join(BARS[min(8, math.ceil(share * 8))] for share in shares)
    header = Text(f"{which}: peak {peak:.3g}, document {document}, from token {start}", style="dim")
    return [header, text, Text(f"▕{bars}▏", style="dim")]
