"""The folder of runs: which trained SAEs it has, and what their evaluations say."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors.torch

from tcsae.shared.base.errors import RunError, unknown
from tcsae.shared.base.files import PARTIAL, file_digest, write_atomic, write_json
from tcsae.shared.base.settings import from_dict, to_dict
from tcsae.shared.sae.module import SAELENS_LAYOUT, SaeConfig, SparseAutoencoder

EVALUATION = "eval.json"
METRICS = "metrics.jsonl"


def run_folders(runs_path: Path) -> list[Path]:
    """Every run's folder, finished or not, by name. Empty if there is no such folder of runs."""
    if not runs_path.is_dir():
        return []
    return sorted(path for path in runs_path.iterdir() if path.is_dir() and _is_run_name(path.name))


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


def load_evaluation(run_path: Path, content: str, file: str = EVALUATION) -> dict[str, Any] | None:
    """A run's eval.json if it is about the weights that lie there now and the store of this `content`; else None.

    `file`: that of its smoothed codes instead.
    """
    try:
        evaluation = json.loads((run_path / file).read_text())
        of_this_store = evaluation["store"]["content"] == content
        return evaluation if of_this_store and evaluation["weights"] == file_digest(run_path / WEIGHTS) else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours: evaluating again replaces it
        return None


def read_metrics(run_path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if it has not been written."""
    file = Path(run_path) / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _is_run_name(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(PARTIAL)


WEIGHTS, CONFIG, RECORD = "sae_weights.safetensors", "cfg.json", "tcsae.json"


def save_sae(sae: SparseAutoencoder, path: Path, record: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Write an SAE's files into its run folder: SAELens' cfg.json and sae_weights.safetensors, then our tcsae.json.

    tcsae.json comes last: a folder without it holds no finished SAE. `record` is ours (settings, store content, steps,
    tokens, versions); `metadata` is SAELens' (model_name, hook_name ...).
    """
    (path / RECORD).unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in sae.tensors().items()}
    write_atomic(path / WEIGHTS, safetensors.torch.save(tensors))
    write_json(path / CONFIG, saelens_config(sae.config, metadata))
    write_json(path / RECORD, {"sae": to_dict(sae.config), **record})


def saelens_config(config: SaeConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """cfg.json as SAELens 6 reads it: a batchtopk SAE infers as a jumprelu one.

    gelu and layer norms have no form there: the architecture says so, and SAELens refuses it by that name.
    """
    names = {"relu": "standard", "topk": "topk", "gelu": "gelu", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    special = {"k": config.k, "rescale_acts_by_decoder_norm": False} if config.activation == "topk" else {}
    suffix = "" if config.layer_norm == "none" else f"-layer-norm-{config.layer_norm}"
    return {
        "architecture": names[config.activation] + suffix,
        "d_in": config.d_model,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **special,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "training_architecture": config.activation, **metadata},
    }


def load_record(path: str | Path) -> dict[str, Any]:
    """tcsae.json of an SAE folder. Raises RunError if it is missing or cannot be read."""
    file = Path(path) / RECORD
    if not file.is_file():
        raise RunError(f"{path} has no {RECORD}: no trained SAE is there. Train one: tcsae train")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is no JSON ({error}). Train that run again.") from error


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Load a trained SAE from its folder, in evaluation mode, on the CPU.

    Raises RunError if the folder holds none, or its weights do not fit its config.
    """
    record = load_record(path)
    sae = SparseAutoencoder(from_dict(SaeConfig, record["sae"]))
    file = Path(path) / WEIGHTS
    try:
        tensors = safetensors.torch.load_file(file)
        tensors["W_enc_rows"] = tensors.pop("W_enc").T.contiguous()
        sae.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"{file} does not hold this SAE's weights ({error}). Train that run again.") from error
    return sae.eval()
