"""Runs and stores to the Hub: files that are there already are not sent again, so an interrupted push goes on."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.shared.base.errors import RunError, TcsaeError
from tcsae.shared.base.signals import StopRequest
from tcsae.shared.hub.card import TRAIN_FILE, Pushed, make_card, store_card, train_file
from tcsae.shared.hub.client import hub_api, hub_errors
from tcsae.shared.sae.folder import CONFIG, EVALUATION, RECORD, TRAIN_AGAIN, WEIGHTS, load_record, read_object
from tcsae.shared.store.format import Recipe
from tcsae.shared.store.integrity import CHECKSUMS, CHECKSUMS_METADATA, ROOT
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import Store, open_store

RUN_FILES = (CONFIG, WEIGHTS, RECORD, EVALUATION, "saebench_core.json", "latents.json")
"""Of a run's folder, as far as they are there."""
COMMIT_FILES, COMMIT_BYTES = 64, 256 << 20
"""Of a store, in one commit: what an interruption may cost."""
CARD = "README.md"


class PushOptions(NamedTuple):
    """How runs are pushed."""

    private: bool = False
    licence: str | None = None
    """Of the weights."""
    data_licence: str | None = None
    """None: what the Hub says of the data set, if it is from there."""


def push_runs(paths: Sequence[Path], repo: str, store_location: str, options: PushOptions) -> str:
    """Push finished runs, a folder each, with a model card; returns the repository's URL.

    The store, where it is the one that they were trained on, gives the card its recipe. Raises RunError for a run that
    is unfinished or damaged, RemoteError for what the Hub refuses.
    """
    runs = [_read(path) for path in paths]
    recipe = _recipe(runs, store_location)
    api = hub_api()
    data_licence = options.data_licence or _data_licence(api, recipe)
    card = make_card(repo, runs, recipe, licence=options.licence, data_licence=data_licence)
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(CARD, card.encode())]
    for path, run in zip(paths, runs, strict=True):
        operations += [
            CommitOperationAdd(f"{run.name}/{name}", str(path / name)) for name in RUN_FILES if (path / name).is_file()
        ]
        operations.append(CommitOperationAdd(f"{run.name}/{TRAIN_FILE}", train_file(run.record).encode()))
    with hub_errors(repo, "model"):
        url = api.create_repo(repo, private=options.private, exist_ok=True)
        names = ", ".join(run.name for run in runs)
        api.create_commit(repo, operations, commit_message=f"{names}"[:200])
    return str(url)


def _read(path: Path) -> Pushed:
    record, config = load_record(path), read_object(path / CONFIG, TRAIN_AGAIN)
    evaluation = read_object(path / EVALUATION, "Evaluate that run again.") if (path / EVALUATION).is_file() else None
    lacking = [name for name in ("hook", "steps", "tokens", "preset", "train", "store") if name not in record]
    if lacking or not isinstance(config.get("metadata"), dict):
        raise RunError(f"{path / RECORD} lacks {lacking[0] if lacking else 'metadata'}. {TRAIN_AGAIN}")
    return Pushed(path.name, record, config, evaluation)


def _recipe(runs: Sequence[Pushed], location: str) -> Recipe | None:
    """Of the store at `location`, if these runs were trained on it."""
    with suppress(TcsaeError):
        store = open_store(location)
        if all(run.record["store"].get("content") == store.content for run in runs):
            return store.manifest.recipe
    return None


def _data_licence(api: Any, recipe: Recipe | None) -> str | None:
    if recipe is None or recipe.corpus.revision.startswith("sha256:") or "/" not in recipe.corpus.name:
        own = recipe is not None and recipe.corpus.name == "pydocs"
        return (
            "documentation of the packages installed where it was harvested, each under its own licence"
            if own
            else None
        )
    with suppress(TcsaeError), hub_errors(recipe.corpus.name, "dataset"):
        card = api.dataset_info(recipe.corpus.name).card_data
        licence = getattr(card, "license", None) if card is not None else None
        return ", ".join(licence) if isinstance(licence, list) else licence
    return None


def push_store(store: Store, repo: str, private: bool, stop: StopRequest, advance: Callable[[int], None]) -> str:
    """Push a store, an object a file, its manifest last; returns the repository's URL. `advance` is told bytes.

    What the repository has already, byte for byte, is not sent again. Raises RemoteError for what the Hub refuses, and
    if another store is there; Stopped after a signal, between two commits.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours goes over all of it
    api = hub_api()
    with hub_errors(repo, "dataset"):
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        there = {one.path: one for one in api.list_repo_tree(repo, repo_type="dataset", recursive=True)}
        _check_place(api, store, repo, there)
        batch: list[Any] = []
        n_bytes = 0

        def commit() -> None:
            nonlocal batch, n_bytes
            if batch:
                api.create_commit(repo, batch, commit_message=f"{len(batch)} objects", repo_type="dataset")
            advance(n_bytes)
            batch, n_bytes = [], 0
            stop.check(f"what {repo} holds by now stays there")

        for key, digest in store_objects(store):
            size = store.objects.size(key) or 0
            if _is_there(there.get(key), digest):
                advance(size)
                continue
            batch.append(CommitOperationAdd(key, _payload(store, key)))
            n_bytes += size
            if len(batch) >= COMMIT_FILES or n_bytes >= COMMIT_BYTES:
                commit()
        commit()
        manifest = store.manifest
        card = store_card(repo, manifest.recipe, manifest.counts, store.content)
        last = [CommitOperationAdd(CARD, card.encode()), CommitOperationAdd(ROOT, _payload(store, ROOT))]
        api.create_commit(repo, last, commit_message=f"Sealed: {store.content[:12]}", repo_type="dataset")
    return str(url)


def store_objects(store: Store) -> Iterator[tuple[str, str]]:
    """Every object but the root, with its sha256; of the checksums' own, "" where none is recorded."""
    for key in store.manifest.objects():
        yield key, store.digests.digest(key)
    yield CHECKSUMS, ""
    yield CHECKSUMS_METADATA, store.manifest.checksums_metadata


def _payload(store: Store, key: str) -> str | bytes:
    """A path where there is one: the Hub's client reads it piece by piece."""
    if isinstance(store.objects, LocalObjects):
        return str(store.objects.root / key)
    return store.objects.get(key)


def _is_there(listed: Any, digest: str) -> bool:
    """Whether a file of the repository has these bytes, as far as its listing says: LFS files by their sha256."""
    lfs = getattr(listed, "lfs", None)
    return bool(digest) and lfs is not None and getattr(lfs, "sha256", None) == digest


def _check_place(api: Any, store: Store, repo: str, there: dict[str, Any]) -> None:
    """Raises RunError if the repository holds another sealed store, or no store at all but other files."""
    if ROOT in there:
        path = api.hf_hub_download(repo, ROOT, repo_type="dataset")
        content = json.loads(Path(path).read_bytes()).get("attributes", {}).get("tcsae", {}).get("content")
        if content != store.content:
            raise RunError(f"{repo} holds another store ({str(content)[:12]}). Give another --to.")
    ours = {key for key, _ in store_objects(store)} | {ROOT, CARD, ".gitattributes"}
    if others := sorted(path for path, one in there.items() if path not in ours and hasattr(one, "size")):
        raise RunError(f"{repo} holds {others[0]}, which is none of this store's. Give another --to.")
