"""The folder of runs: finding trained SAEs, saving and loading them, reading what lies beside their weights.

    tcsae.json               our record, written last: a folder without it holds no finished SAE
    cfg.json                 SAELens' config
    sae_weights.safetensors  SAELens' weights
    metrics.jsonl            a line every few training steps
    eval.json                the last evaluation

A run's files come from anywhere (a colleague, a full disk, a newer version), so nothing read here is trusted: whatever
is damaged is named in one line, and no code of a folder is ever run.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tcsae.shared.base.console import say
from tcsae.shared.base.errors import ConfigError, RunError, unknown
from tcsae.shared.base.files import PARTIAL, disk_errors, file_digest, is_utf8, json_digest
from tcsae.shared.base.settings import from_dict, to_dict
from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.layout import (
    CONFIG,
    INPUT_SCALE,
    METRICS,
    RECORD,
    WEIGHTS,
    SaeConfig,
    SaeMetadata,
    record_digest,
    saelens_config,
    write_sae,
)
from tcsae.shared.sae.module import SparseAutoencoder

EVALUATION = "eval.json"
TRAIN_AGAIN = "Train that run again."


def run_folders(runs_path: Path) -> list[Path]:
    """Every run's folder, finished or not, by name. Empty if there is no such folder of runs."""
    try:
        if not runs_path.is_dir():
            return []
        return sorted(path for path in runs_path.iterdir() if path.is_dir() and _is_run_name(path.name))
    except OSError as error:
        raise RunError(f"{runs_path} cannot be read ({reason(error)}). Allow it, or give another --runs.") from error


def is_finished(run_path: Path) -> bool:
    """Whether a run has been trained to its end: its record is written last."""
    return (run_path / RECORD).is_file()


def find_runs(runs_path: Path, names: Collection[str] = ()) -> list[Path]:
    """The folders of the named runs, in the order named, each once; without names: of all runs.

    Raises RunError if there is no run at all, or none of a given name (with the nearest).
    """
    folders = {path.name: path for path in run_folders(runs_path)}
    if not folders:
        raise RunError(f"No runs in {runs_path}. Train one: tcsae --runs {runs_path} train")
    for name in names:
        if name not in folders:
            raise RunError(f"{runs_path}: {unknown('run', name, folders)}")
    return [folders[name] for name in dict.fromkeys(names or folders)]


def _is_run_name(name: str) -> bool:
    """No training makes a name that is not UTF-8, and no safetensors file can be opened below it."""
    return not name.startswith(".") and not name.endswith(PARTIAL) and is_utf8(name)


def save_sae(sae: SparseAutoencoder, path: Path, record: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Write an SAE's files into its run folder: SAELens' cfg.json and sae_weights.safetensors, then our tcsae.json.

    tcsae.json comes last, with the digests of the others, of the history (metrics.jsonl) and of itself: a folder
    without it holds no finished SAE. `record` is ours (settings, store content, steps, tokens, versions); `metadata` is
    SAELens' (model_name, hook_name ...).
    """
    config = saelens_config(sae.config, metadata, sae.input_scale)
    write_sae(path, sae.tensors(), config, {"sae": to_dict(sae.config), **record})


def load_record(path: str | Path) -> dict[str, Any]:
    """tcsae.json of an SAE folder. Raises RunError if it is missing, damaged, or says nothing of an SAE."""
    file = Path(path) / RECORD
    if not file.is_file():
        raise RunError(f"{path} has no {RECORD}: no trained SAE is there. Train one: tcsae train")
    record = read_object(file, TRAIN_AGAIN)
    if _digests(record).get(RECORD) not in (None, record_digest(record)):
        raise RunError(f"{file} is damaged: its digest does not fit. {TRAIN_AGAIN}")
    _config(record, file)
    return record


def _config(record: Mapping[str, Any], file: Path) -> SaeConfig:
    try:
        return from_dict(SaeConfig, record["sae"])
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{file} describes no SAE ({reason(error)}). {TRAIN_AGAIN}") from error


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Load a trained SAE from its folder, in evaluation mode, float32, on the CPU; it reads x as the store holds it.

    Raises RunError if the folder holds none, its weights do not fit its config, one of them is NaN or infinite, or a
    file is not the one that was written with its record.
    """
    record = load_record(path)
    config = _config(record, Path(path) / RECORD)
    file = Path(path) / WEIGHTS
    try:
        with torch.device("meta"):  # shapes alone: nothing is allocated before they are those of the file
            shapes = {name: tuple(one.shape) for name, one in new_sae(config).tensors().items() if one.ndim == 2}
        tensors = load_tensors(file, shapes)
        sae = new_sae(config)
        sae.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{file} does not hold this SAE's weights ({reason(error)}). {TRAIN_AGAIN}") from error
    check_finite(sae.tensors(), WEIGHTS, TRAIN_AGAIN)
    check_files(Path(path), record)
    sae.metadata = _metadata(Path(path), record)
    if config.attends:
        sae.input_scale = _input_scale(Path(path) / CONFIG)
    return sae.eval()


def _input_scale(file: Path) -> float:
    scale = read_object(file, TRAIN_AGAIN).get(INPUT_SCALE)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise RunError(f"{file}: {INPUT_SCALE}={scale!r} is no number above 0. {TRAIN_AGAIN}")
    return float(scale)


def _metadata(path: Path, record: Mapping[str, Any]) -> SaeMetadata:
    """As far as a record, which may be of an old version, and cfg.json say it."""
    theirs = read_object(path / CONFIG, TRAIN_AGAIN).get("metadata") if (path / CONFIG).is_file() else None
    theirs = theirs if isinstance(theirs, dict) else {}
    try:
        skip_first = int(record["train"]["data"]["skip_first"])
        content = record["store"]["content"]
    except (KeyError, TypeError, ValueError):
        skip_first, content = 0, None
    return SaeMetadata(
        hook=record.get("hook"),
        model=theirs.get("model_name"),
        dataset=theirs.get("dataset_path"),
        store=content,
        context_size=theirs.get("context_size"),
        prepend_bos=theirs.get("prepend_bos"),
        skip_first=skip_first,
        record=record,
    )


def check_files(path: Path, record: Mapping[str, Any]) -> None:
    """Raises RunError, naming it, if a file of a run is not the one that its record was written with.

    Records of older versions name no files.
    """
    digests = _digests(record)
    for name in [name for name in (WEIGHTS, CONFIG) if name in digests]:
        file = path / name
        try:
            differs = file_digest(file) != digests[name]
        except OSError as error:
            raise RunError(f"{file} cannot be read ({reason(error)}). {TRAIN_AGAIN}") from error
        if differs:
            raise RunError(f"{file} is damaged or of another run: its digest is not that in {RECORD}. {TRAIN_AGAIN}")
    if digests:
        _check_agreement(path, record)


def _digests(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of older versions' records: none."""
    files = record.get("files")
    return files if isinstance(files, dict) else {}


def _check_agreement(path: Path, record: Mapping[str, Any]) -> None:
    """Raises RunError if the record and cfg.json, whose digest it has, describe two SAEs."""
    theirs = read_object(path / CONFIG, TRAIN_AGAIN)
    for key, value in saelens_config(_config(record, path / RECORD), {}).items():
        if key not in ("metadata", INPUT_SCALE) and theirs.get(key) != value:
            raise RunError(f"{path / RECORD} says {key}={value!r}, {CONFIG} {theirs.get(key)!r}. {TRAIN_AGAIN}")


def load_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises ValueError before anything is allocated if one of `shapes` differs; else what safetensors raises.
    """
    with safetensors.safe_open(file, "pt") as opened:
        for name, expected in (shapes or {}).items():
            shape = tuple(opened.get_slice(name).get_shape())
            if shape != expected:
                raise ValueError(f"{name} is {list(shape)}, its config says {list(expected)}")
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)


def check_finite(tensors: Mapping[str, Tensor], file: str | Path, cure: str) -> None:
    """Raises RunError, naming the tensor, if a value is NaN or infinite: such figures may still look normal."""
    for name, tensor in tensors.items():
        n_bad = int((~tensor.isfinite()).sum())
        if n_bad:
            raise RunError(f"{n_bad} values of {name} in {file} are NaN or infinite. {cure}")


def load_evaluation(run_path: Path, content: str, file: str = EVALUATION) -> dict[str, Any] | None:
    """A run's eval.json if it is about the weights that lie there now and the store of this `content`; else None.

    None, too, if it is damaged, or a file written with it is of another evaluation (a kill in between): evaluating
    again replaces all of them. `file`: that of the run's smoothed codes instead.
    """
    try:
        evaluation = read_object(run_path / file, "")
        is_current = (
            evaluation["store"]["content"] == content
            and evaluation["weights"] == file_digest(run_path / WEIGHTS)
            and isinstance(evaluation["metrics"], dict)
            and evaluation.get("digest") in (None, evaluation_digest(evaluation))
            and all(_is_file(run_path, name, one) for name, one in evaluation.get("files", {}).items())
        )
        return evaluation if is_current else None
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_file(run_path: Path, name: str, digest: str) -> bool:
    """Whether a file right in the folder has this digest; a name that leads elsewhere is not followed."""
    return Path(name).name == name and file_digest(run_path / name) == digest


def evaluation_digest(evaluation: Mapping[str, Any]) -> str:
    """sha256 of an evaluation without its digest."""
    return json_digest({key: value for key, value in evaluation.items() if key != "digest"})


def read_metrics(run_path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl: events, and steps with their figures. None if it has not been written.

    A line that is neither (torn, overwritten with zeros, not JSON) is left out, and how many were is said; so is that a
    finished run's is gone, or is not what its training wrote. A damaged history stops nothing.
    """
    file, digest = Path(run_path) / METRICS, _metrics_digest(Path(run_path))
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if digest is not None:
            say(f"{file} is missing: there is no history of this run.")
        return []
    except OSError as error:
        say(f"{file} cannot be read ({reason(error)}): there is no history of this run.")
        return []
    texts = data.splitlines()
    lines = [line for line in map(_metrics_line, texts) if line is not None]
    if n_bad := len(texts) - len(lines):
        say(f"{file}: {n_bad} of {len(texts)} lines are damaged and left out.")
    elif digest not in (None, hashlib.sha256(data).hexdigest()):
        say(f"{file} is not what the training wrote: its digest is not that in {RECORD}.")
    return lines


def _metrics_digest(run_path: Path) -> object:
    """What a finished run's record has; None of older ones, and where there is no record."""
    try:
        return _digests(read_object(run_path / RECORD, "")).get(METRICS)
    except RunError:
        return None


def _metrics_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode())
        figures = line.values() if "event" not in line else [line["step"]]
        is_step = math.isfinite(line["step"]) and all(value is None or _is_number(value) for value in figures)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return line if is_step else None


def _is_number(value: object) -> bool:
    """Raises OverflowError for an integer that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isinstance(float(value), float)


def writing(path: Path, cure: str) -> AbstractContextManager[None]:
    """What the disk refuses within, raised as RunError that names what cannot be written and the cure."""
    return disk_errors(path, RunError, cure)


def read_object(file: Path, cure: str) -> dict[str, Any]:
    """A JSON object. Raises RunError, naming the file, if it cannot be read or is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file} cannot be read ({reason(error)}). {cure}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is no JSON ({reason(error)}). {cure}") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} holds a JSON {type(values).__name__}, not an object. {cure}")
    return values


def reason(error: BaseException) -> str:
    """What an error says, in one short line: of an OSError without the path, which the message has."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
