"""A bit flipped, or a file cut, emptied, deleted or swapped with its neighbour; then a command, which must refuse with
one line, say which file is damaged, or give the result of the undamaged place.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from stages import Ended, Stage, Workshop, contents, differences, run, same, timeless, toy

CHANGES = ("flip", "flip", "flip", "cut", "empty", "delete", "swap")
AGAIN = ("--steps", "8", "--preset", "topk", "--set", "init_seed=7")
READERS = [
    Stage("train", ("train", *toy.TRAIN, *AGAIN), ()),
    Stage("eval", ("eval", "--force"), ()),
    Stage("report", ("report", "--force"), ("report",)),
    Stage("verify", ("verify",), ()),
]


def file_kind(name: str) -> str:
    """A file's kind: its path without numbers and without the names of hooks and runs."""
    parts = name.split("/")
    if parts[0] == "runs":
        parts[1] = "RUN" if not parts[1].startswith(".") else parts[1]
    parts = [re.sub(r"^(blocks\..*)$", "HOOK", part) for part in parts]
    parts = [re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{10,}", "N", part)) for part in parts]
    return "/".join(parts)


def kinds_of(place: Path) -> dict[str, list[str]]:
    """Every file of the store and the runs, by kind."""
    result: dict[str, list[str]] = {}
    for name in contents(place, ("a.zarr", "runs")):
        if "/export-" not in name:
            result.setdefault(file_kind(name), []).append(name)
    return result


def outputs(place: Path, reader: Stage) -> dict[str, bytes]:
    """What a reader wrote: the new run, the evaluations, or the report."""
    if reader.name == "eval":
        every = timeless(contents(place, ("runs",)))
        return {name: data for name, data in every.items() if re.search(r"/(eval|saebench)[^/]*$", name)}
    if reader.name == "train":
        every = timeless(contents(place, ("runs",)))
        return {name: data for name, data in every.items() if "init_seed7" in name}
    return timeless(contents(place, reader.writes))


def references(workshop: Workshop) -> dict[str, dict[str, bytes]]:
    """What each reader writes on the undamaged place."""
    result = {}
    for reader in READERS:
        results = []
        for _ in range(2):
            done = run(workshop.set_out(), reader.arguments)
            if done.code:
                raise RuntimeError(f"{reader.name} fails on what is undamaged:\n{done.output}")
            results.append(outputs(workshop.place, reader))
        same(reader.name, *results)
        result[reader.name] = results[1]
    return result


def trials(workshop: Workshop, rng: random.Random, n: int) -> Iterator[tuple[str, str, str]]:
    """(file kind, outcome, detail) of n trials a kind of file; readers in turn, from a random one on."""
    expected = references(workshop)
    for kind, names in kinds_of(workshop.set_out()).items():
        first = rng.randrange(len(READERS))
        for i in range(n):
            reader = READERS[(first + i) % len(READERS)]
            place, name, change = workshop.set_out(), rng.choice(names), rng.choice(CHANGES)
            if reader.name == "verify" and not name.startswith("a.zarr/"):
                continue
            told = f"{reader.name} after {change_file(place, name, names, change, rng)}"
            done = run(place, reader.arguments)
            yield kind, *judge(reader, done, outputs(place, reader), expected[reader.name], name, told)


def change_file(place: Path, name: str, names: list[str], change: str, rng: random.Random) -> str:
    """Damage one file; returns what was done."""
    file = place / name
    data = bytearray(file.read_bytes())
    others = [one for one in names if one != name and (place / one).read_bytes() != bytes(data)]
    if change == "swap" and not others:
        change = "flip"
    if change == "swap":
        other = place / rng.choice(others)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"{name} and {other.relative_to(place)} were swapped"
    if change == "delete":
        file.unlink()
        return f"{name} was deleted"
    detail = ""
    if change == "flip" and data:
        at = rng.randrange(len(data) * 8)
        data[at // 8] ^= 1 << at % 8
        detail = f" (bit {at} of {len(data) * 8})"
    elif change == "cut":
        del data[rng.randrange(len(data) + 1) :]
        detail = f" at byte {len(data)}"
    else:
        data.clear()
    file.write_bytes(data)
    return f"{name}: {change}{detail}"


def judge(
    reader: Stage, done: Ended, found: dict[str, bytes], expected: dict[str, bytes], name: str, told: str
) -> tuple[str, str]:
    """The outcome of a command on a damaged place."""
    if not done.clean or done.code < 0:
        return "traceback", f"{told}: {done.output[-500:]}"
    if done.refused:
        return "refused", ""
    if done.code:
        return "traceback", f"{told}: exit code {done.code} without a line that says why: {done.output[-300:]}"
    if reader.name == "verify":
        return "silent", f"{told}: verify finds nothing"
    if found == expected:
        return "same", ""
    parts = name.split("/")
    left_out = any("left out" in line and parts[1] in line for line in done.output.splitlines())
    if left_out or any(part in done.output for part in (name, "/".join(parts[-2:]), parts[-1])):
        return "said", ""
    wrong = differences(found, expected)
    return "silent", f"{told}: exit code 0, {len(wrong)} files differ: {', '.join(wrong[:3])}"
