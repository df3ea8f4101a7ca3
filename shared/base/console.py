"""What people see: progress on stderr, tables on stdout, so that `tcsae eval > table.txt` holds results only."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TextIO

from tcsae.shared.base.meter import Meter, si
from tcsae.shared.base.meter import duration as duration

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


class Output:
    """Where messages go besides stderr. One for the process: the command line sets it before the first stage."""

    def __init__(self) -> None:
        self.quiet = False
        self.log: TextIO | None = None

    def record(self, text: str) -> None:
        """Append lines to the log file, with the time of day, if there is one."""
        if self.log is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            self.log.write("".join(f"{stamp} {line}\n" for line in legible_lines(text).splitlines()))
            self.log.flush()


OUTPUT = Output()


def say(text: str) -> None:
    """One line about what is going on, on stderr and in the log file. Nothing on stderr with --quiet."""
    from rich.console import Console

    OUTPUT.record(text)
    if not OUTPUT.quiet:
        Console(stderr=True, highlight=False, soft_wrap=True).print(legible_lines(text), markup=False)


def complain(text: str) -> None:
    """One line about an error that ends nothing yet, on stderr and in the log file, also with --quiet."""
    import click

    OUTPUT.record(f"Error: {text}")
    click.echo(f"Error: {legible_lines(text)}", err=True)


@contextmanager
def progress(title: str, total: int, unit: str = "tokens", done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left; on a stderr that is no terminal, a plain line every 30 s and one at the end.

    Both say when the stage has become many times slower than at its best. With --quiet there is neither; a log file
    gets the plain lines always.
    Yields advance(n, note=""): n more units are done. `done` units were done before (a resumed stage).
    """
    from rich.console import Console

    console, title, meter = Console(stderr=True), legible(title), Meter(total, unit, done)
    if OUTPUT.quiet or not console.is_terminal:
        with _lines(title, meter, say) as advance:
            yield advance
        return
    with _lines(title, meter, OUTPUT.record) as log, _bar(console, title, meter) as draw:

        def advance_both(n: int, note: str = "") -> None:
            log(n, note)
            draw(note)

        yield advance_both


@contextmanager
def _bar(console: object, title: str, meter: Meter) -> Iterator[Callable[[str], None]]:
    """A bar; yields draw(note), which shows what the meter has counted."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    fields = [TextColumn("{task.fields[" + name + "]}", markup=False) for name in ("rate", "left", "note")]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), *fields)
    last_note = ""
    with Progress(*columns, console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task(title, total=meter.total, completed=meter.done, rate="", left="", note="")

        def draw(note: str) -> None:
            nonlocal last_note
            last_note = note or last_note
            shown = ", ".join(filter(None, (legible(last_note), meter.slow)))
            bar.update(task, completed=meter.done, rate=meter.rate, left=meter.left, note=shown)

        yield draw


@contextmanager
def _lines(title: str, meter: Meter, write: Callable[[str], None]) -> Iterator[Callable[..., None]]:
    last, last_note = time.monotonic(), ""

    def advance(n: int, note: str = "") -> None:
        nonlocal last_note, last
        meter.add(n)
        last_note = note or last_note
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            write(f"{title}: {meter.line(last_note)}")

    yield advance
    write(f"{title}: {meter.line(last_note)}")


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


def size(n_bytes: int) -> str:
    """Bytes for people: 3.4 MB (powers of 1000)."""
    return f"{si(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes} B"
