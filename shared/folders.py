"""Folders that a library wants to read from a disk: parts of a local store as they are, of others by way of a cache."""

from pathlib import Path

from tcsae.shared.files import cache_path, write_folder
from tcsae.shared.manifest import Manifest
from tcsae.shared.objects import LocalObjects, Objects


def local_folder(objects: Objects, prefix: str, manifest: Manifest) -> Path:
    """The folder of a sealed store's files below `prefix` ("tail/<hook>", "tokenizer"), named by its manifest.

    A store that is no local one is fetched from once; its content names the copy. Raises StoreError if a file is
    missing.
    """
    if isinstance(objects, LocalObjects):
        return objects.root / prefix
    path = cache_path() / "stores" / manifest.content[:16] / prefix
    keys = [key for key in manifest.files if key.startswith(f"{prefix}/")]

    def fill(folder: Path) -> None:
        for key in keys:
            file = folder / key.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as out:
                for block in objects.blocks(key):
                    out.write(block)

    if not path.is_dir():
        write_folder(path, fill)
    return path
