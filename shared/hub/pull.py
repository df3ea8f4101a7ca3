"""Runs and stores from the Hub, each file checked against the digest that it was pushed with."""

import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from tcsae.shared.base.errors import RemoteError, RunError, unknown
from tcsae.shared.base.files import file_digest, write_folder
from tcsae.shared.hub.client import hub_api, hub_errors
from tcsae.shared.sae.folder import CONFIG, RECORD, TRAIN_AGAIN, WEIGHTS, load_record, read_object, writing
from tcsae.shared.store.integrity import ROOT

SUFFIXES = (".json", ".safetensors", ".toml")
"""Of the files of a run that are taken: data, no code."""
CURE = "Free some space, or give another --runs."


def pull_runs(repo: str, runs_path: Path, names: Collection[str] = (), revision: str | None = None) -> list[Path]:
    """Bring a repository's runs (or those named) into the folder of runs; returns their folders.

    One that is there already with the same weights is left as it is. Raises RemoteError for what the Hub refuses or
    does not have; RunError if something else has a run's name, or a file is not what its record says.
    """
    api = hub_api()
    with hub_errors(repo, "model"):
        snapshot = Path(
            api.snapshot_download(repo, revision=revision, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
        )
    folders = run_folders_of(snapshot)
    if not folders:
        raise RemoteError(f"{repo} has no folder with {CONFIG} and {WEIGHTS}: no SAE in SAELens' layout. Give another.")
    for name in names:
        if name not in folders:
            raise RunError(f"{repo}: {unknown('run', name, folders)}")
    return [_place(folders[name], runs_path / name) for name in names or folders]


def run_folders_of(snapshot: Path) -> dict[str, Path]:
    """Folders of a repository that hold an SAE, by the name that they get: the path with - for /, or the repository's
    own name where they are its root."""
    folders = {}
    for config in sorted(snapshot.rglob(CONFIG)):
        if (config.parent / WEIGHTS).is_file():
            relative = PurePosixPath(config.parent.relative_to(snapshot).as_posix())
            name = "-".join(relative.parts) or snapshot.parents[1].name.rpartition("--")[2]
            folders[name.lstrip(".")] = config.parent
    return folders


def _place(source: Path, target: Path) -> Path:
    _check(source)
    if target.exists():
        if (target / WEIGHTS).is_file() and file_digest(target / WEIGHTS) == file_digest(source / WEIGHTS):
            return target
        raise RunError(f"{target} is there already, and another run. Move it away, or give another --runs.")

    def fill(folder: Path) -> None:
        for file in sorted(path for path in source.iterdir() if path.is_file() and path.suffix in SUFFIXES):
            shutil.copyfile(file, folder / file.name)  # a copy: the cache has links

    with writing(target, CURE):
        write_folder(target, fill)
    return target


def _check(folder: Path) -> None:
    """Raises RunError for a file that is not what the run's record says."""
    if not (folder / RECORD).is_file():
        read_object(folder / CONFIG, "It is no SAE's config.")
        return
    for name, digest in load_record(folder).get("files", {}).items():
        if name in (WEIGHTS, CONFIG) and file_digest(folder / name) != digest:
            raise RunError(f"{name} of {folder.name} is not the file that its {RECORD} names. {TRAIN_AGAIN}")


def pull_store(repo: str, revision: str | None = None) -> Path:
    """Bring a store's files into the Hub's cache; returns the folder, to copy and check from there.

    Interrupted, the same call goes on. Raises RemoteError for what the Hub refuses, or if there is no store.
    """
    api = hub_api()
    with hub_errors(repo, "dataset"):
        folder = Path(api.snapshot_download(repo, repo_type="dataset", revision=revision))
    if not (folder / ROOT).is_file():
        raise RemoteError(f"{repo} holds no store (no {ROOT} in it). Give another --from.")
    return folder
