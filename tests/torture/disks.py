"""A disk of a few MB that runs full; after room is made the same command ends with the undisturbed result."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kills import finish
from stages import Stage, Workshop, run

ROOM = "size=512m"


def size_of(folder: Path) -> int:
    """Bytes of a folder's files in pages of a tmpfs, folders included."""
    return sum(-(-max(path.stat().st_size, 1) // 4096) * 4096 for path in folder.rglob("*"))


def trials(workshop: Workshop, rng: random.Random, n: int) -> Iterator[tuple[str, str, str]]:
    """(stage, outcome, detail) of n trials a stage; one line where nothing can be mounted."""
    disk = workshop.root / "disk"
    disk.mkdir(exist_ok=True)
    if os.name != "posix" or subprocess.run(mount(disk, ROOM), capture_output=True).returncode:
        yield "no disk", "skipped", "mounting a tmpfs is not permitted here (it takes root)"
        return
    subprocess.run(["umount", str(disk)], check=True)
    place = workshop.place
    for stage in workshop.stages:
        before = size_of(workshop.set_out(stage))
        run(place, stage.arguments)
        written = max(4096, size_of(place) - before)
        for _ in range(n):
            share = rng.uniform(0, 1.0)
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run(mount(disk, ROOM), check=True)
            workshop.place = disk / "place"
            try:
                yield stage.name, *trial(workshop, stage, disk, int(before + share * written))
            finally:
                workshop.place = place
                subprocess.run(["umount", str(disk)], check=True)


def mount(disk: Path, option: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(disk)]


def trial(workshop: Workshop, stage: Stage, disk: Path, n_bytes: int) -> tuple[str, str]:
    """The command on a disk of `n_bytes`, then on a larger one."""
    workshop.set_out(stage)
    subprocess.run(["mount", "-o", f"remount,size={n_bytes // 1024 + 8}k", str(disk)], check=True)
    done = run(workshop.place, stage.arguments)
    told = f"a disk of {n_bytes:,} bytes"
    subprocess.run(["mount", "-o", f"remount,{ROOM}", str(disk)], check=True)
    if done.code and not done.refused:
        return "traceback", f"{told}: exit code {done.code}: {done.output[-500:]}"
    return finish(workshop, stage, told)
