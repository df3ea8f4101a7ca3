"""Damage for files of every kind, and what a command may answer to it. No test itself; loaded by path."""

import copy
import json
import random
import re
import resource
import shutil
import signal
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import Result
from hypothesis import strategies as st

from tcsae.shared.base.files import json_digest

CPU_SECONDS, SECONDS, MEMORY_BYTES = 20, 120, 4 << 30
"""What one command on a toy place may take: a lying number must not become work or memory."""
HOSTILE_TEXT = [
    "",
    " ",
    "x",
    "../../escaped",
    "/etc/passwd",
    "a\\b",
    "..",
    "\x1b[31mred",
    "\u202eevil",
    "\ud800",
    "\x00",
]
HOSTILE_TEXT += ["none", "nan", "-1", "0", "1" * 400, "é" * 300, "{}", "[1]", "%s{0}", "NaN", "float64", "a\nb"]
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.0, 10**6, 10**12, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")]
WEIRD = [None, True, False, [], {}, [None], [[]], {"x": 1}, [0] * 50, *NUMBERS, *HOSTILE_TEXT]
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
"""Control and bidirectional characters, which a terminal acts on."""

weird = st.sampled_from(WEIRD)


class TooLong(BaseException):
    """A command that does not end; no Exception, so that no handler takes it for its error."""


@contextmanager
def bounds() -> Iterator[None]:
    """So much time and new address space, and no more."""

    def late(*_: object) -> None:
        raise TooLong(f"longer than {CPU_SECONDS} CPU seconds or {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def complaint(call: Callable[[], Result], typed: str = "") -> str | None:
    """What is wrong with how a command ended; None if it may end so. Characters of the command line may come back."""
    try:
        with bounds():
            done = call()
    except TooLong as late:
        return f"TooLong: {late} at {_place(late)}"
    error = done.exception
    if error is not None and not isinstance(error, SystemExit):
        return f"traceback: {type(error).__name__}: {str(error)[:300]} at {_place(error)}"
    if done.exit_code not in (0, 1, 2):
        return f"exit code {done.exit_code}"
    if "Traceback (most recent call last)" in done.output:
        return f"a traceback is printed: {done.output[-500:]}"
    if unsafe := set(UNSAFE.findall(done.output)) - set(typed):
        line = next(line for line in done.output.split("\n") if unsafe & set(line))
        return f"control characters reach the terminal: {line[:300]!r}"
    last = done.stderr.strip().splitlines()[-1:]
    if done.exit_code and not (last and last[0].startswith("Error: ")):
        return f"exit code {done.exit_code} and no line that begins with Error: {done.stderr[-300:]!r}"
    return None


def _place(error: BaseException) -> str:
    """The deepest line of ours that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f for f in frames if "site-packages" not in f.filename and "/tests/" not in f.filename and f.filename[0] == "/"
    ]
    ours = [f for f in ours if "/lib/python3" not in f.filename] or frames[-1:]
    return f"{'/'.join(Path(ours[-1].filename).parts[-3:])}:{ours[-1].lineno} {ours[-1].name}"


# JSON


def _containers(value: Any) -> list[dict | list]:
    result = [value] if isinstance(value, dict | list) else []
    for one in list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []:
        result += _containers(one)
    return result


def change_json(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value is replaced, deleted, renamed, doubled, or moved within its neighbours."""
    containers = [one for one in _containers(value) if one]
    if not containers or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(WEIRD))
    inside = rng.choice(containers)
    key = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
    what = rng.choices(["replace", "delete", "rename", "double", "swap"], [6, 2, 1, 1, 1])[0]
    if what == "delete":
        del inside[key]
    elif what == "rename" and isinstance(inside, dict):
        inside[rng.choice([*HOSTILE_TEXT, f"{key}x"])] = inside.pop(key)
    elif what == "double" and isinstance(inside, list):
        inside.append(inside[key])
    elif what == "swap":
        other = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
        inside[key], inside[other] = inside[other], inside[key]
    elif isinstance(inside[key], int | float) and rng.random() < 0.5:
        inside[key] = rng.choice(NUMBERS)
    elif isinstance(inside[key], str) and rng.random() < 0.3:
        inside[key] += rng.choice(HOSTILE_TEXT)
    else:
        inside[key] = copy.deepcopy(rng.choice(WEIRD))
    return value


def change_json_file(file: Path, rng: random.Random, n_changes: int = 1) -> None:
    """Change the JSON of a file; of JSON lines, one line."""
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    i = rng.randrange(len(lines))
    value = json.loads(lines[i])
    for _ in range(n_changes):
        value = change_json(value, rng)
    lines[i] = json.dumps(value)
    file.write_text("\n".join(lines))


def change_manifest(file: Path, rng: random.Random, n_changes: int, honest: bool) -> None:
    """Change a store's manifest; `honest`: its own digest fits what it then says."""
    root = json.loads(file.read_text())
    attributes = root["attributes"]
    for _ in range(n_changes):
        attributes["tcsae"] = change_json(attributes["tcsae"], rng)
    if honest and isinstance(attributes["tcsae"], dict):
        attributes["tcsae"]["digest"] = ""
        attributes["tcsae"]["digest"] = json_digest(attributes["tcsae"])
    file.write_text(json.dumps(root))


# Bytes

BYTE_CHANGES = ["flip", "cut", "empty", "garbage", "grow", "zeros", "html", "delete", "folder"]


def change_bytes(file: Path, rng: random.Random, what: str) -> None:
    """One of BYTE_CHANGES done to a file."""
    data = bytearray(file.read_bytes())
    file.unlink()
    if what == "folder":
        file.mkdir()
    if what in ("delete", "folder"):
        return
    if what == "flip" and data:
        for _ in range(rng.choice([1, 1, 1, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif what == "empty":
        data.clear()
    elif what == "garbage":
        data[:] = rng.randbytes(rng.choice([1, 8, 100]))
    elif what == "grow":
        data += rng.randbytes(rng.choice([1, 100]))
    elif what == "zeros":
        start = rng.randrange(len(data) + 1)
        data[start:] = bytes(len(data) - start)
    elif what == "html":
        data[:] = b"<html><head><title>404 Not Found</title></head></html>\n"
    file.write_bytes(data)


def change_safetensors_header(file: Path, rng: random.Random) -> None:
    """Change the JSON at the head of a safetensors file, with the right length before it."""
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change_json(json.loads(data[8 : 8 + n]), rng)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(file: Path, rng: random.Random) -> str:
    """One change of a file, by what kind of file it is; returns which."""
    if file.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        change_json_file(file, rng, rng.choice([1, 1, 3]))
        return "json"
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        change_safetensors_header(file, rng)
        return "header"
    what = rng.choice(BYTE_CHANGES)
    change_bytes(file, rng, what)
    return what


# Places


def zip_store(folder: Path, file: Path) -> None:
    """A store's folder as an uncompressed zip, as `copy` makes it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in files_of(folder):
            archive.write(path, path.relative_to(folder).as_posix())


@contextmanager
def sandbox(place: Path, folder: Path) -> Iterator[Path]:
    """A copy of a place, three folders down; afterwards nothing else lies on the way to it."""
    inner = folder / "outer" / "middle" / "place"
    shutil.copytree(place, inner, ignore=shutil.ignore_patterns("model"))
    try:
        yield inner
        beside = {path.name for path in (*folder.iterdir(), *(folder / "outer").iterdir(), *inner.parent.iterdir())}
        assert beside <= {"outer", "middle", "place", "cache"}, f"written outside the place: {beside}"
    finally:
        shutil.rmtree(folder)
