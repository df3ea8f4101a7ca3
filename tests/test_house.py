"""Promise: the house keeps its shape: who may import whom, how large files and functions grow, what a command loads."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from tcsae.shared.windows import positions

ROOT = Path(__file__).parent.parent
ROOMS = ("harvest", "train", "evaluate", "shared", "data", "paper")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MAY_IMPORT = {
    "shared": {"shared"},
    "data": {"data", "shared"},
    "harvest": {"harvest", "shared", "data"},
    "train": {"train", "shared"},
    "evaluate": {"evaluate", "shared"},
    "paper": {"paper", "harvest", "train", "evaluate", "shared"},  # on top of the stages, as a user is
}
HEAVY = ("torch", "zarr", "transformers", "transformer_lens", "datasets", "numpy", "safetensors")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: between files of the package write tcsae...."
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_meet_on_disk_only(path):
    room = path.relative_to(ROOT).parts[0]
    found = imports(ast.parse(path.read_text()))
    rooms = {name.split(".")[1] for name in found if name.startswith("tcsae.")}
    assert rooms & set(ROOMS) <= MAY_IMPORT[room]


@pytest.mark.parametrize("library, allowed", [("transformer_lens", {"harvest"}), ("datasets", {"harvest", "data"})])
def test_language_model_libraries_stay_in_their_rooms(library, allowed):
    users = {
        path.relative_to(ROOT).parts[0]
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imports(ast.parse(path.read_text())))
    }
    assert users <= allowed
    assert users, "the rule would hold of nothing"


@pytest.mark.parametrize(
    "path", SOURCES + sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    limit = 450 if "tests" in path.parts else 300
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or 0) - node.lineno + 1
            assert n_lines <= 60, f"{node.name} has {n_lines} lines"


def test_packages_are_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == {"tcsae"} | {f"tcsae.{room}" for room in ROOMS}


def test_declared_dependencies_are_the_imported_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["trackers"]]
    lines += project["optional-dependencies"]["remote"]
    declared = {line.split(">")[0].split("[")[0].replace("-", "_") for line in lines}
    ours = {name.split(".")[0] for path in SOURCES for name in imports(ast.parse(path.read_text()))}
    foreign = {name for name in ours if name not in sys.stdlib_module_names | {"tcsae", "pydoc_data"}}
    assert foreign <= declared
    # Zarr uses numcodecs, torch TensorBoard, datasets zstandard, obstore boto3: nothing of ours calls them by name.
    assert declared - foreign <= {"boto3", "numcodecs", "tensorboard", "zstandard"}


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name for name in HEAVY if name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("command", [[], ["harvest"], ["train"], ["eval"], ["inspect"]])
def test_help_loads_nothing_heavy(command):
    arguments = [*command, "--help"]
    call = f"try:\n    cli({arguments!r})\nexcept SystemExit as end:\n    assert not end.code"
    assert loaded_by(f"from tcsae.shared.cli import cli\n{call}") == set()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import tcsae") == set()
    assert "torch" in loaded_by("import tcsae; tcsae.load_sae"), "the check itself has to be able to fail"


def test_shapes_are_checked_in_tests():
    """Proof that the hook in pyproject.toml is on: a wrong rank is refused at the signature."""
    with pytest.raises(jaxtyping.TypeCheckError, match="lengths"):
        positions(np.zeros((2, 3), dtype=np.int64))
