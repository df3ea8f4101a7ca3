"""The commands that are tortured, in forked children, and what each leaves on disk."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tcsae.shared.base.signals import STOPPING, end_on_interrupt

TESTS = Path(__file__).resolve().parent.parent
PATIENCE_S = 600
"""A child that runs longer hangs."""


def load(name: str):
    """A module of tests/, by its file."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load("toy_place")


@dataclass(frozen=True)
class Stage:
    """A command, and where it writes (globs below the place)."""

    name: str
    arguments: tuple[str, ...]
    writes: tuple[str, ...]
    needs: tuple[str, ...] = ("a.zarr", "runs")
    """What lies there before it starts."""


TRAIN = (
    *toy.TRAIN,
    "--preset",
    "topk",
    "--preset",
    "temporal-topk",
    "--set",
    "guard.checkpoint_steps=4",
    "--steps",
    "24",
)
HARVEST = ("harvest", "--model", "model", "--dataset", "corpus.jsonl", "--hook", toy.HOOK, "--batch-size", "4")
HARVEST += ("--tokens", "2K", "--sequence-length", "32", "--eval-every", "4")
STAGES = [
    Stage("harvest", HARVEST, ("a.zarr",), ()),
    Stage("train", ("train", *TRAIN), ("runs",), ("a.zarr",)),
    Stage("eval", ("eval",), ("runs",)),
    Stage("report", ("report",), ("report",)),
    Stage("export", ("export", "--to", "dictionary_learning", "--run", "RUN"), ("runs",)),
    Stage("copy", ("copy", "--from", "a.zarr", "--to", "b.zarr"), ("b.zarr",), ("a.zarr",)),
    Stage("copy zip", ("copy", "--from", "a.zarr", "--to", "b.zarr.zip"), ("b.zarr.zip",), ("a.zarr",)),
    Stage("copy int8", ("copy", "--from", "a.zarr", "--to", "c.zarr", "--codec", "int8"), ("c.zarr",), ("a.zarr",)),
]


class Ended(NamedTuple):
    """How a child ended: exit code (negative: its signal), and what it printed."""

    code: int
    output: str

    @property
    def refused(self) -> bool:
        """One line said why, as for every error that the user can cure."""
        last = self.output.strip().splitlines()[-1:]
        return self.code in (1, 2) and self.clean and bool(last) and last[0].startswith("Error: ")

    @property
    def clean(self) -> bool:
        return "Traceback (most recent call last)" not in self.output and self.code != CRASHED


CRASHED = 70
HUNG = -999


class Child:
    """`tcsae ARGUMENTS` in a fork of this process, which has imported everything."""

    def __init__(self, place: Path, arguments: tuple[str, ...]) -> None:
        self.log = place.parent / f"log-{time.monotonic_ns()}"
        # A signal that comes before the child is the program is the program's first.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_program(place, arguments, self.log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        deadline = time.monotonic() + PATIENCE_S
        while (done := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(HUNG, self._output())
            time.sleep(0.002)
        return Ended(os.waitstatus_to_exitcode(done[1]), self._output())

    def _output(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text


def _be_the_program(place: Path, arguments: tuple[str, ...], log: Path) -> None:
    """Run the command line in this (forked) process, and end it."""
    code = CRASHED
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_on_interrupt()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.chdir(place)
        from tcsae.shared.commands.group import cli

        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        cli(["--store", "a.zarr", "--runs", "runs", *arguments], prog_name="tcsae")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(place: Path, arguments: tuple[str, ...]) -> Ended:
    return Child(place, arguments).wait()


# Places


class Workshop:
    """The folder of all trials: what each stage starts from, and what it should leave."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, root / "place"
        self.stages = STAGES
        self.seconds: dict[str, float] = {}
        self.reference: dict[str, dict[str, bytes]] = {}
        self.finished = root / "finished"

    def prepare(self) -> None:
        """Make the inputs, then run each stage twice. Raises RuntimeError if the results differ in more than times."""
        os.environ["TCSAE_CACHE"] = str(self.root / "cache")
        load("toy_harvest").small_steps(pytest.MonkeyPatch(), 4, 2)  # never undone: this process makes nothing else
        inputs = self.root / "inputs"
        toy.make_model(inputs / "model")
        rng = random.Random(0)
        texts = [
            " ".join(rng.choices(["the", "a", "model", "stream", "reads", "of"], k=rng.randint(5, 90)))
            for _ in range(90)
        ]
        (inputs / "corpus.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts))
        )
        shutil.copytree(inputs, self.finished)
        for number in range(len(self.stages)):
            stage, results = self.stages[number], []
            for _ in range(2):
                self.set_out(stage)
                start = time.monotonic()
                done = run(self.place, stage.arguments)
                self.seconds[stage.name] = time.monotonic() - start
                if done.code:
                    raise RuntimeError(f"{stage.name} fails undisturbed:\n{done.output}")
                results.append(timeless(contents(self.place, stage.writes)))
            same(stage.name, *results)
            self.reference[stage.name] = results[1]
            self.keep(stage)
            if stage.name == "train":
                name = next(path.name for path in sorted((self.finished / "runs").glob("topk-*")))
                self.stages = [name_run(one, name) for one in self.stages]

    def keep(self, stage: Stage) -> None:
        """What a stage wrote becomes part of what is finished."""
        for name in stage.writes:
            source, target = self.place / name, self.finished / name
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)

    def set_out(self, stage: Stage | None = None) -> Path:
        """The place anew: with what a stage needs and nothing that it writes; without a stage, all that is finished."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        if stage is None:
            shutil.copytree(self.finished, self.place)
            return self.place
        self.place.mkdir()
        for name in ("model", "corpus.jsonl", *stage.needs):
            source = self.finished / name
            if source.is_dir():
                shutil.copytree(source, self.place / name)
            elif source.exists():
                shutil.copy2(source, self.place / name)
        for path in self.place.glob("runs/*/export-*"):
            shutil.rmtree(path)
        if stage.name == "eval":
            for path in [*self.place.glob("runs/*/eval*"), *self.place.glob("runs/*/saebench*")]:
                path.unlink()
            shutil.rmtree(self.place / "runs" / ".reference", ignore_errors=True)
        return self.place

    def is_as_undisturbed(self, stage: Stage) -> str | None:
        """None, or what differs from the undisturbed result."""
        wrong = differences(timeless(contents(self.place, stage.writes)), self.reference[stage.name])
        return f"{len(wrong)} files differ: {', '.join(wrong[:3])}" if wrong else None


def name_run(stage: Stage, name: str) -> Stage:
    arguments = tuple(name if one == "RUN" else one for one in stage.arguments)
    return Stage(stage.name, arguments, stage.writes, stage.needs)


def contents(place: Path, writes: tuple[str, ...]) -> dict[str, bytes]:
    """The bytes of every file that a stage writes, checkpoints and logs of it included."""
    files = {}
    for name in writes:
        path = place / name
        result = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        files |= {one.relative_to(place).as_posix(): one.read_bytes() for one in result}
    return files


def flat(value: object, where: str = "") -> dict[str, object]:
    """A JSON value as {dotted key: leaf}."""
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{where}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, one in enumerate(value) for k, v in flat(one, f"{where}.{i}").items()}
    return {where: value}


def parsed(name: str, data: bytes) -> dict[str, object] | None:
    """JSON, JSON lines, or the JSON that a script of the report holds, flat; None for other files."""
    try:
        if name.endswith(".jsonl"):
            return flat([json.loads(line) for line in data.splitlines()])
        if name.endswith(".json"):
            return flat(json.loads(data))
    except ValueError:
        return None
    return None


TIMES = re.compile(
    r"seconds|\.times\.|per_s$|eval_id|datetime|\.digest$|\.files\.(saebench_core\.json|metrics\.jsonl|tcsae\.json)$"
)
"""Dotted keys of JSON files that hold times, ids, or the digest of JSON that does (a manifest, an evaluation, a
record).
"""


def timeless(files: dict[str, bytes]) -> dict[str, bytes]:
    """`files`, of JSON without times."""
    out = dict(files)
    for name, data in files.items():
        if TIMES_IN.search(name) and (values := parsed(name, data)) is not None:
            out[name] = json.dumps({key: one for key, one in values.items() if not TIMES.search(key)}).encode()
    return out


TIMES_IN = re.compile(r"^\w\.zarr/zarr\.json$|^runs/[^/]+/[^/]+\.jsonl?$")
"""Files that hold times; all others are compared byte for byte."""


def same(stage: str, first: dict[str, bytes], second: dict[str, bytes]) -> None:
    """Raises RuntimeError if two undisturbed results differ in more than times."""
    if wrong := differences(first, second):
        raise RuntimeError(f"{stage}: two undisturbed starts differ in {wrong[:5]}")


def differences(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    """Names of the files that differ."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
