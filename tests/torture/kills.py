"""Signals at random times; then the same command again, which must end with the undisturbed result."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from stages import CRASHED, HUNG, Child, Ended, Stage, Workshop, run

LEFT_OVER = (".partial", ".lock", "journal", "copy.json")


def trials(workshop: Workshop, rng: random.Random, n: int) -> Iterator[tuple[str, str, str]]:
    """(stage, outcome, detail) of n trials a stage."""
    for stage in workshop.stages:
        for _ in range(n):
            yield stage.name, *trial(workshop, stage, rng)


def trial(workshop: Workshop, stage: Stage, rng: random.Random) -> tuple[str, str]:
    """One to three signals, then the command to its end."""
    place, told = workshop.set_out(stage), []
    for _ in range(rng.randint(1, 3)):
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        after = rng.uniform(0, 1.1 * workshop.seconds[stage.name])
        told.append(f"{number.name} after {after:.3f} s")
        child = Child(place, stage.arguments)
        time.sleep(after)
        child.signal(number)
        ended = child.wait()
        if wrong := misbehaved(ended, number):
            return wrong, f"{', '.join(told)}: {ended.output[-400:]}"
    return finish(workshop, stage, ", ".join(told))


def misbehaved(ended: Ended, number: int) -> str | None:
    """What is wrong with how a command took a signal."""
    if ended.code == HUNG:
        return "hung"
    if ended.code == CRASHED or not ended.clean:
        return "traceback"
    # A process that has yet to install its handlers, or has put them back, dies of the signal itself.
    allowed = {0, -number, 128 + number}
    return None if ended.code in allowed else "exit code"


def finish(workshop: Workshop, stage: Stage, told: str) -> tuple[str, str]:
    """The command once more, undisturbed: the outcome, and what is wrong."""
    done = run(workshop.place, stage.arguments)
    if not done.clean:
        return "traceback", f"{told}; then: {done.output[-600:]}"
    if done.code:
        return "lost", f"{told}; then exit code {done.code}: {done.output[-300:]}"
    if wrong := workshop.is_as_undisturbed(stage):
        return "lost", f"{told}; then {wrong}"
    left = left_over(workshop.place)
    return ("left over", f"{told}; {left}") if left else ("same", "")


def left_over(place: Path) -> list[str]:
    """What only an unfinished stage has."""
    return [path.name for path in place.rglob("*") if path.name.endswith(LEFT_OVER)]
