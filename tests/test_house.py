"""Promise: the house keeps its shape: who may import whom, how large files and functions grow, what a command loads."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from tcsae.shared.base.windows import positions

ROOT = Path(__file__).parent.parent
ROOMS = ("api", "harvest", "train", "evaluate", "shared", "data", "paper", "serve", "synthetic")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SHARED = {"shared/base", "shared/store", "shared/sae", "shared/lm"}
MAY_IMPORT = {
    "shared": set(),
    "shared/base": {"shared/base"},
    "shared/sae": {"shared/base", "shared/sae"},
    "shared/store": SHARED,
    "shared/lm": SHARED,
    "shared/commands": {"shared/commands", *SHARED},
    "shared/hub": {"shared/hub", *SHARED},
    "data": {"data", *SHARED},
    "harvest": {"harvest", "data", *SHARED},
    "harvest/imports": {"harvest", "harvest/imports", "data", *SHARED},
    "train": {"train", *SHARED},
    "evaluate/measures": {"evaluate", "evaluate/measures", "evaluate/planted", *SHARED},
    "evaluate/planted": {"evaluate", "evaluate/measures", "evaluate/planted", *SHARED},
    "evaluate": {"evaluate", "evaluate/measures", "evaluate/planted", *SHARED},
    "evaluate/dictionary": {"evaluate", "evaluate/dictionary", "evaluate/planted", *SHARED},
    "evaluate/probing": {"evaluate", "evaluate/measures", "evaluate/probing", *SHARED},
    "evaluate/latents": {"evaluate", "evaluate/dictionary", "evaluate/latents", "evaluate/probing", *SHARED},
    "evaluate/report": {"evaluate", "evaluate/latents", "evaluate/measures", "evaluate/report", *SHARED},
    "evaluate/exports": {"evaluate", "evaluate/measures", "evaluate/report", "evaluate/exports", *SHARED},
    # On top of the stages, as a user is.
    "api": {"api", "harvest", "train", "evaluate", "evaluate/measures", "evaluate/report", *SHARED},
    "serve": {"serve", "harvest", "evaluate", "evaluate/measures", "evaluate/report", *SHARED},
    "synthetic": {"synthetic", "harvest", "train", "evaluate", "evaluate/planted", *SHARED},
    "paper": {"paper", "harvest", "train", "evaluate", "evaluate/measures", "evaluate/report", *SHARED},
}
"""Layers, lowest first; the store reads run folders for `inspect`, and text for a few sequences."""
SAME_NAME_ALLOWED = {"__init__", "command", "run"}
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 16, 500, 60
HEAVY = ("torch", "zarr", "transformers", "transformer_lens", "datasets", "numpy", "safetensors")


def imports(tree: ast.AST) -> set[str]:
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: between files of the package write tcsae...."
            result |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return result


def room_of(path: Path) -> str:
    """The deepest listed room that a source file lies in."""
    folder = str(path.relative_to(ROOT).parent)
    return max((room for room in MAY_IMPORT if f"{folder}/".startswith(f"{room}/")), key=len)


def module_name(path: Path) -> str:
    return ".".join(("tcsae", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(path: Path) -> set[str]:
    """Our modules that a file imports, late imports included."""
    return {name for name in imports(ast.parse(path.read_text())) if name in MODULES}


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downwards_only(path):
    assert {room_of(MODULES[name]) for name in imported_modules(path)} <= MAY_IMPORT[room_of(path)]


@pytest.mark.slow
def test_no_import_circle():
    """By taking away, again and again, whatever imports nothing that is left."""
    left = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    # A package's __init__ that names its own files does so for others, and is not needed by them.
    while leaves := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert not left, "in a circle, or above one"


def test_the_circle_test_can_fail():
    left = {"a": {"b"}, "b": {"a"}}
    assert not {name for name, needs in left.items() if not needs & left.keys()}


def test_each_file_name_is_used_once():
    names = [path.stem for path in SOURCES if path.stem not in SAME_NAME_ALLOWED]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_folders_stay_small():
    folders = {path.parent for path in SOURCES}
    assert {str(folder): n for folder in folders if (n := len(list(folder.glob("*.py")))) > MAX_FILES} == {}


@pytest.mark.parametrize(
    "library, allowed", [("transformer_lens", {"harvest"}), ("datasets", {"harvest", "data", "shared"})]
)
def test_language_model_libraries_stay_in_their_rooms(library, allowed):
    users = {
        str(place) if str(place := path.relative_to(ROOT)) in allowed else place.parts[0]
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
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or 0) - node.lineno + 1
            assert n_lines <= MAX_FUNCTION_LINES, f"{node.name} has {n_lines} lines"


def test_packages_are_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == {"tcsae"} | {module_name(path) for path in SOURCES if path.name == "__init__.py"}


def test_declared_dependencies_are_the_imported_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["trackers"]]
    lines += [line for extra in ("remote", "map", "serve") for line in project["optional-dependencies"][extra]]
    declared = {line.split(">")[0].split("[")[0].replace("-", "_") for line in lines}
    ours = {name.split(".")[0] for path in SOURCES for name in imports(ast.parse(path.read_text()))}
    foreign = {name for name in ours if name not in sys.stdlib_module_names | {"tcsae", "pydoc_data"}}
    foreign = {"umap_learn" if name == "umap" else name for name in foreign}  # what the package umap-learn is called
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
    assert loaded_by(f"from tcsae.shared.commands.group import cli\n{call}") == set()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import tcsae") == set()
    assert "torch" in loaded_by("import tcsae; tcsae.load_sae"), "the check itself has to be able to fail"


def test_shapes_are_checked_in_tests():
    """Proof that the hook in pyproject.toml is on: a wrong rank is refused at the signature."""
    with pytest.raises(jaxtyping.TypeCheckError, match="lengths"):
        positions(np.zeros((2, 3), dtype=np.int64))
