"""What `inspect --json` prints: a store and its runs as plain dictionaries."""

from pathlib import Path
from typing import Any

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.settings import to_dict
from tcsae.shared.sae.folder import is_finished, load_evaluation, load_record, run_folders
from tcsae.shared.store.format import SEALED
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.reader import check_manifest, open_store, read_attributes


def summary(location: str, runs_path: Path) -> dict[str, Any]:
    """The manifest's main parts, bytes on disk of a sealed store, and the runs. Raises StoreError if there is none."""
    values = read_attributes(objects_at(location))
    manifest = check_manifest(location, values) if values is not None else open_store(location).manifest
    store: dict[str, Any] = {
        "location": location,
        "state": manifest.state,
        "version": manifest.version,
        "recipe": to_dict(manifest.recipe),
        "counts": manifest.counts,
    }
    if manifest.state == SEALED:
        store |= {
            "content": manifest.content,
            "times": manifest.times,
            "tails": manifest.tails,
            "bytes": open_store(location).n_bytes(),
        }
    return {"store": store, "runs": [_run(path, manifest.content) for path in run_folders(runs_path)]}


def _run(path: Path, content: str) -> dict[str, Any]:
    """A run's record, and its figures if it is evaluated on the store of this content."""
    if not is_finished(path):
        return {"name": path.name, "state": "unfinished"}
    try:
        record = load_record(path)
    except RunError as error:
        return {"name": path.name, "state": "damaged", "reason": str(error)}
    evaluation = load_evaluation(path, content) or {}
    return {"name": path.name, "state": "finished", "record": record, "metrics": evaluation.get("metrics")}
