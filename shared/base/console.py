"""What people see: progress on stderr, tables on stdout, so that `tcsae eval > table.txt` holds results only."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

PLAIN_EVERY_S = 30.0
LEGIBLE = {ord("\n"): "⏎", ord("\r"): "␍", ord("\t"): "⇥", 0x2028: "⏎", 0x2029: "⏎"}


def legible(text: str) -> str:
    """Text as one line that a terminal cannot take for commands: line ends and tabs as signs, control codes and marks
    that turn the direction of writing escaped.
    """
    return "".join(
        LEGIBLE.get(ord(one)) or (one if one.isprintable() else one.encode("unicode_escape").decode()) for one in text
    )


def legible_lines(text: str) -> str:
    """`legible` for what has lines of its own."""
    return "\n".join(legible(line) for line in text.split("\n"))


def echo(text: str) -> None:
    """A line of results on stdout, whatever names it holds. Commands print names by this, not by click.echo."""
    import click

    click.echo(legible_lines(text))


def say(text: str) -> None:
    """One line about what is going on, on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(legible_lines(text), markup=False)


@contextmanager
def progress(title: str, total: int, unit: str = "tokens", done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left; on a stderr that is no terminal, a plain line every 30 s and one at the end.

    Yields advance(n, note=""): n more units are done. `done` units were done before (a resumed stage).
    """
    from rich.console import Console

    console, title = Console(stderr=True), legible(title)
    manager = _bar(console, title, total, unit, done) if console.is_terminal else _lines(title, total, unit, done)
    with manager as advance:
        yield advance


@contextmanager
def _bar(console: object, title: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    start = time.monotonic()
    with Progress(*columns, console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def advance(n: int, note: str = "") -> None:
            new = bar.tasks[0].completed + n - done
            rate = f"{_si(new / max(time.monotonic() - start, 1e-9))} {unit}/s"
            bar.update(task, advance=n, rate=rate, note=legible(note))

        yield advance


@contextmanager
def _lines(title: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    now_done, last_note = done, ""

    def line() -> None:
        seconds = max(time.monotonic() - start, 1e-9)
        rate = (now_done - done) / seconds
        left = f", {(total - now_done) / rate:.0f} s left" if rate and now_done < total else ""
        note = f", {last_note}" if last_note else ""
        say(f"{title}: {_si(now_done)} of {_si(total)} {unit}, {_si(rate)} {unit}/s, {seconds:.0f} s{left}{note}")

    def advance(n: int, note: str = "") -> None:
        nonlocal now_done, last_note, last
        now_done, last_note = now_done + n, note or last_note
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            line()

    yield advance
    line()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: the first column left, numbers right; floats with 4 significant digits, None as a dash."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table()
    for i, column in enumerate(columns):
        grid.add_column(legible(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*map(_cell, row))
    # A pipe has no width: never cut a column there. Names are data, not markup.
    width = None if Console().is_terminal else 200
    console = Console(highlight=False, markup=False, width=width)
    # A line of its own: as part of the table it would be broken to the width of its columns.
    console.print(Text(legible(title), style="table.title"), soft_wrap=True)
    console.print(grid)


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """A curve in a few characters, from its least to its largest value."""
    if len(values) < 2:
        return ""
    picked = [
        values[round(i * (len(values) - 1) / (min(width, len(values)) - 1))] for i in range(min(width, len(values)))
    ]
    low, high = min(picked), max(picked)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1))] for value in picked)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return legible_lines(str(value))


def _si(value: float) -> str:
    for scale, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def size(n_bytes: int) -> str:
    """Bytes for people: 3.4 MB (powers of 1000)."""
    return f"{_si(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes} B"


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 34 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
