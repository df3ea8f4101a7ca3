"""Figures as small SVGs that take the page's colours, light or dark. Runs are distinguished by numbers, never by
colour alone.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = ("#010102", "#010103", "#010104", "#010105", "#010106", "#010107")
COLOURS = {INK: "--ink", FAINT: "--ink-2", GRID: "--grid"} | {one: f"--c{i}" for i, one in enumerate(SERIES, start=1)}
"""Colours drawn with, and the page's variables that stand for them."""
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
MARKERS = "osD^vPX*<>ph"
BESIDE = ((6, 3), (-11, 3), (6, -9), (-11, -9))
"""Where a point's number stands, in turn: neighbours seldom meet."""
SPREAD = 4.0
"""Ratio of the largest x to the smallest from which on an axis is logarithmic."""
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tcsae",
    "font.size": 9.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlesize": 9.0,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Series(NamedTuple):
    """One curve, or one set of values."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class Point(NamedTuple):
    """One SAE among others."""

    number: int
    x: float
    y: float
    y_interval: list[float] | None = None


def lines(curves: Sequence[Series], labels: tuple[str, str], nulls: Sequence[tuple[float, str]] = ()) -> str:
    """Curves with a legend; `nulls` are dashed levels with a name each."""
    with _figure(4.6, 2.7) as (figure, axes):
        for i, curve in enumerate(curves):
            axes.plot(curve.x, curve.y, color=_colour(i), linestyle=DASHES[i % 4], linewidth=1.7, label=curve.label)
        for i, (level, name) in enumerate(nulls):
            axes.axhline(level, color=_colour(i), linestyle=(0, (1, 2)), linewidth=1.1, label=name)
        _label(axes, labels)
        axes.legend(loc="best")
        return _svg(figure)


def curves_by_number(curves: Sequence[tuple[int, Series]], labels: tuple[str, str]) -> str:
    """One curve a run, its number at its end."""
    with _figure(6.2, 3.0) as (figure, axes):
        ends = []
        for i, (number, curve) in enumerate(curves):
            axes.plot(curve.x, curve.y, color=_colour(i), linestyle=DASHES[i % 4], linewidth=1.5)
            ends.append((curve.y[-1], number, curve.x[-1], _colour(i)))
        every = [value for _, curve in curves for value in curve.y[len(curve.y) // 10 :] if np.isfinite(value)]
        if every:  # the first steps would squeeze the rest
            low, high = float(np.quantile(every, 0.04)), max(every)
            room = 0.06 * (high - low or 1.0)
            axes.set_ylim(low - room, high + room)
            for y, number, x, colour in _apart(ends, 1.1 * room):
                axes.annotate(f" {number}", (x, y), color=colour, va="center", fontweight="bold", fontsize=8.5)
        _label(axes, labels)
        return _svg(figure)


def frontier(points: Sequence[Point], labels: tuple[str, str]) -> str:
    """Runs as numbered markers, with the interval of y."""
    with _figure(3.3, 2.5) as (figure, axes):
        for i, point in enumerate(points):
            if point.y_interval:
                axes.plot([point.x] * 2, point.y_interval, color=_colour(i), linewidth=1.2)
            axes.plot([point.x], [point.y], MARKERS[i % len(MARKERS)], color=_colour(i), markersize=6)
            at = (point.x, point.y)
            axes.annotate(str(point.number), at, BESIDE[i % 4], textcoords="offset points", fontsize=8.5)
        axes.margins(0.14)
        _scale_x(axes, [point.x for point in points])
        _label(axes, labels)
        return _svg(figure)


def _scale_x(axes: "Axes", values: Sequence[float]) -> None:
    """Logarithmic where values are far apart; never so wide that next to no difference looks like one."""
    axes.ticklabel_format(useOffset=False)
    if min(values) > 0 and max(values) > SPREAD * min(values):
        ticks = [one for one in TICKS if min(values) / 2 < one < 2 * max(values)]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
        axes.minorticks_off()
        return
    left, right = axes.get_xlim()
    middle, room = (left + right) / 2, (right - left) / 2
    room = max(room, 0.01 * abs(middle))
    axes.set_xlim(middle - room, middle + room)


def histogram(groups: Sequence[tuple[str, np.ndarray]], label: str, log: bool = False) -> str:
    """Outlines of one or two histograms over the same bins; the second is dashed, and both are shares of their group.

    With `log` the axis is that of powers of ten. Without any finite value: the empty text.
    """
    finite = [(name, values[np.isfinite(values) & ((values > 0) | (not log))]) for name, values in groups]
    pooled = np.concatenate([values for _, values in finite])
    if not len(pooled):
        return ""
    edges = _edges(pooled, log)
    with _figure(3.3, 2.1) as (figure, axes):
        for i, (name, values) in enumerate(finite):
            counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(1, len(values))
            style: dict[str, Any] = {"color": _colour(i), "linewidth": 1.3, "label": name, "linestyle": DASHES[i % 4]}
            if i == 0:
                axes.stairs(counts, edges, color=_colour(0), fill=True, alpha=0.25, linewidth=0)
            axes.stairs(counts, edges, **style)
        if log:
            axes.set_xscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        _label(axes, (label, "of latents"))
        if not log:
            axes.locator_params(axis="x", nbins=5)  # more labels of four digits would overlap
        if len(groups) > 1:
            axes.legend(loc="best")
        return _svg(figure)


def _edges(values: np.ndarray, log: bool, n: int = 36) -> np.ndarray:
    if log:
        low, high = np.log10(values.min()), np.log10(values.max())
        return np.logspace(low - 1e-9, high + 1e-9 if high > low else low + 1, n + 1)
    low, high = np.quantile(values, [0.0, 0.998])  # a few far values would squeeze the rest: they count in the last bin
    return np.linspace(low, high if high > low else low + 1, n + 1)


def _apart(ends: list[tuple[float, int, float, str]], gap: float) -> Iterator[tuple[float, int, float, str]]:
    """The same, moved up where two would stand closer than `gap`."""
    last = -np.inf
    for y, *rest in sorted(ends):
        last = max(y, last + gap)
        yield last, *rest  # type: ignore[misc]


def _colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _label(axes: "Axes", labels: tuple[str, str]) -> None:
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, "Axes"]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """The figure as an <svg> element for the page: no background, the page's font and colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(file.getvalue())


def themed(svg: str) -> str:
    """Colours become the page's variables; what a page with several figures cannot have twice is left out."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # figure_1, axes_1 ...: nothing refers to them
    for colour, name in _longest_first(COLOURS.items()):
        svg = svg.replace(colour, f"var({name})")
    svg = re.sub(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', _opening, svg, count=1)
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg)).strip()


def _opening(match: re.Match[str]) -> str:
    width, height = match[1], match[2]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-hidden="true" '
        f'style="max-width:{float(width) * 1.33:.0f}px">'
    )


def _longest_first(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pairs, key=lambda pair: -len(pair[0]))
