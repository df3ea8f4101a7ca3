"""Two starts of one command on one place; both must end well or refuse, and what they leave is what one would."""

import random
import time
from collections.abc import Iterator

from kills import finish
from stages import HUNG, Child, Stage, Workshop


def trials(workshop: Workshop, rng: random.Random, n: int) -> Iterator[tuple[str, str, str]]:
    """(stage, outcome, detail) of n trials a stage."""
    for stage in workshop.stages:
        for _ in range(n):
            yield stage.name, *trial(workshop, stage, rng)


def trial(workshop: Workshop, stage: Stage, rng: random.Random) -> tuple[str, str]:
    """The second starts while the first is at work; then the command once more."""
    place = workshop.set_out(stage)
    after = rng.choice([0.0, rng.uniform(0, workshop.seconds[stage.name])])
    children = [Child(place, stage.arguments)]
    time.sleep(after)
    children.append(Child(place, stage.arguments))
    both = [child.wait() for child in children]
    told = f"second after {after:.3f} s"
    for ended in both:
        if ended.code == HUNG:
            return "hung", told
        if ended.code and not ended.refused:
            return "traceback", f"{told}: exit code {ended.code}: {ended.output[-500:]}"
    if all(ended.code for ended in both):
        return "lost", f"{told}: both gave up: {both[0].output[-200:]} {both[1].output[-200:]}"
    if wrong := workshop.is_as_undisturbed(stage):
        return "lost", f"{told}: {wrong}"
    return finish(workshop, stage, told)
