"""`tcsae.load_sae`: an SAE from wherever it lies, a folder of ours or of another library, here or on the Hub."""

import re
from pathlib import Path

import torch

from tcsae.shared.base.errors import ConfigError, RunError, unknown
from tcsae.shared.sae.folder import CONFIG, METRICS, RECORD, WEIGHTS, reason
from tcsae.shared.sae.folder import load_sae as load_run
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.other_formats import LOADERS
from tcsae.shared.sae.saelens import is_foreign, load_foreign

FILES = (RECORD, METRICS, CONFIG, WEIGHTS, "config.json", *LOADERS)
"""What is fetched from the Hub: no code, no checkpoints."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MOST_SHOWN = 8


def load_sae(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    subfolder: str | None = None,
) -> SparseAutoencoder:
    """Load an SAE in evaluation mode; it reads activations as the model makes them, whatever it was trained on.

    `source`: a folder of ours, of SAELens, dictionary_learning, sparsify or Gemma Scope, or a Hub id (owner/name) of a
    repository that holds one, at `revision`. `subfolder`: where below the source it lies. `sae.metadata` says what the
    files say: hook, model, store content, position rules.
    Raises RunError if there is no SAE, it is not supported, or its files are damaged; ConfigError for a revision of a
    folder.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: float32, bfloat16, float16 or float64.")
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{source} is a local folder and has no revision {revision!r}. Leave revision out.")
        root = path
    elif _HUB_ID.fullmatch(str(source)):
        root = _fetch(str(source), revision, subfolder)
    else:
        raise RunError(f"{source} is no folder, and no Hub id (owner/name). Give one of the two.")
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise RunError(f"{source}: {unknown('subfolder', str(subfolder), _below(root))}")
    return _load(folder, str(source)).to(device=device, dtype=kind)


def _load(folder: Path, source: str) -> SparseAutoencoder:
    if (folder / RECORD).is_file():
        return load_run(folder)
    if is_foreign(folder):
        return load_foreign(folder)
    for name, load in LOADERS.items():
        if (folder / name).is_file():
            return load(folder)
    if below := _below(folder):
        shown = ", ".join(below[:MOST_SHOWN]) + (f" and {len(below) - MOST_SHOWN} more" if below[MOST_SHOWN:] else "")
        raise RunError(f"{source} holds its SAEs in subfolders: {shown}. Name one: subfolder={below[0]!r}.")
    raise RunError(
        f"{source} holds no SAE: none of {RECORD}, {CONFIG} with {WEIGHTS}, {', '.join(LOADERS)} is there. "
        "Give the folder that holds one of these."
    )


def _below(folder: Path) -> list[str]:
    """Folders below, at any depth, that hold an SAE."""
    names = {WEIGHTS, *LOADERS}
    return sorted({str(file.parent.relative_to(folder)) for name in names for file in folder.glob(f"*/**/{name}")})


def _fetch(source: str, revision: str | None, subfolder: str | None) -> Path:
    """A folder with the SAE's files of a Hub repository, from the cache where they are there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[prefix + name for name in FILES]))
    except RepositoryNotFoundError as error:
        raise RunError(
            f"{source} is no folder here and no repository of the Hub. Check the name, or log in."
        ) from error
    except LocalEntryNotFoundError as error:
        at = f" at revision {revision}" if revision else ""
        raise RunError(
            f"{source}{at} is not in the Hub's cache here, and the Hub cannot be reached ({reason(error)}). Fetch it "
            "once with a network, or give a folder."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"{source} cannot be had from the Hub ({reason(error)}). Check name and revision.") from error
    if not any((folder / (prefix + name)).is_file() for name in FILES):
        raise RunError(f"{source} has no SAE at {prefix or 'its top'}.{_listed(source, revision)}")
    return folder


def _listed(source: str, revision: str | None) -> str:
    """The subfolders of a repository that hold an SAE; nothing where the Hub cannot be asked."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = [Path(name) for name in list_repo_files(source, revision=revision)]
    except (HfHubHTTPError, OSError, ValueError):
        return " Name the one to load: subfolder=."
    below = sorted({str(file.parent) for file in files if file.name in (WEIGHTS, *LOADERS)})
    shown = ", ".join(below[:MOST_SHOWN]) + (f" and {len(below) - MOST_SHOWN} more" if below[MOST_SHOWN:] else "")
    return (
        f" Name one: subfolder={below[0]!r}. There is: {shown}." if below else " It holds none in any format we read."
    )
