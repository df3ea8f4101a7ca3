"""A trained SAE in the file format of another library, with the same codes and reconstructions there."""

import io
import json
import re
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import write_atomic, write_folder
from tcsae.shared.sae.folder import (
    CONFIG,
    RECORD,
    TRAIN_AGAIN,
    WEIGHTS,
    load_record,
    load_sae,
    read_object,
    reason,
    writing,
)
from tcsae.shared.sae.module import SparseAutoencoder

Format = Literal["dictionary_learning", "saelens", "sparsify"]
SPARSIFY = "sae.safetensors"
DICTIONARY, DICTIONARY_CONFIG = "ae.pt", "config.json"
FILES = {
    "dictionary_learning": (DICTIONARY, DICTIONARY_CONFIG),
    "saelens": (CONFIG, WEIGHTS),
    "sparsify": (CONFIG, SPARSIFY),
}
CLASSES = {
    "relu": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
"""dictionary_learning's class and trainer of each activation; gelu has none."""
SPARSIFIED = ("topk", "relu")
"""Activations that have a form in sparsify: it has no thresholds."""


def export_run(run_path: Path, form: Format, out: Path | None = None) -> Path:
    """Write a run's SAE as `form` into `out` (default: export-FORM in the run's folder); returns that folder.

    dictionary_learning: ae.pt and config.json, for its `utils.load_dictionary`. saelens: cfg.json and
    sae_weights.safetensors, for its `SAE.load_from_disk`. sparsify: cfg.json and sae.safetensors, for its
    `SparseCoder.load_from_disk`. An earlier export there is replaced.
    Raises RunError if the SAE is not finished or has no such form, if `out` holds anything else or cannot be written.
    """
    record = load_record(run_path)
    sae = load_sae(run_path)
    _check_form(run_path.name, sae, form)
    out = (out or run_path / f"export-{form}").absolute()
    if form == "sparsify":
        files = _sparsify_files(sae)
    else:
        files = _saelens_files(run_path) if form == "saelens" else _dictionary_files(run_path, sae, record)

    def fill(folder: Path) -> None:
        for name, data in files.items():
            write_atomic(folder / name, data)

    with writing(out, "Free some space, or give another --out."):
        _check_place(out, FILES[form])
        write_folder(out, fill)
    return out


def _saelens_files(run_path: Path) -> dict[str, bytes]:
    """The run's own. Raises RunError for one that cannot be read or is no config."""
    read_object(run_path / CONFIG, TRAIN_AGAIN)
    try:
        return {name: (run_path / name).read_bytes() for name in FILES["saelens"]}
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read ({reason(error)}). {TRAIN_AGAIN}") from error


def _sparsify_files(sae: SparseAutoencoder) -> dict[str, bytes]:
    """A SparseCoder's: a relu is a topk of all latents there."""
    config = sae.config
    values = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_model),
        "normalize_decoder": False,  # as the rows are, whatever their norm
        "num_latents": config.d_sae,
        "k": config.k if config.activation == "topk" else config.d_sae,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_model,
    }
    W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    named = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}
    return {CONFIG: (json.dumps(values, indent=2) + "\n").encode(), SPARSIFY: safetensors.torch.save(tensors)}


def _dictionary_files(run_path: Path, sae: SparseAutoencoder, record: dict[str, Any]) -> dict[str, bytes]:
    """Raises RunError for a damaged cfg.json, or a record that lacks a setting."""
    config = read_object(run_path / CONFIG, TRAIN_AGAIN)
    try:
        values = dictionary_config(sae, record, config["metadata"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run_path / RECORD} or {CONFIG} lacks {reason(error)}, which config.json says. {TRAIN_AGAIN}"
        ) from error
    tensors = io.BytesIO()  # torch.save itself raises RuntimeError where a disk is full
    torch.save(dictionary_tensors(sae), tensors)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return {DICTIONARY: tensors.getvalue(), DICTIONARY_CONFIG: text.encode()}


def dictionary_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The state_dict of dictionary_learning's class for this SAE.

    Its JumpReluAutoEncoder leaves b_dec out of the encoder's input: b_enc takes it up here.
    """
    W_enc, b_enc, W_dec, b_dec = (tensor.detach().clone() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    if sae.config.activation == "jumprelu":
        b_enc = (b_enc.double() - b_dec.double() @ W_enc.double()).float()
        threshold = sae.learned_threshold.detach().clone()
        return {"W_enc": W_enc.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    linear = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous()}
    if sae.config.activation == "relu":
        return {"bias": b_dec, **linear}
    threshold = torch.tensor(-1.0)  # their mark of "none yet": a topk does without
    if sae.config.activation == "batchtopk":
        threshold = sae.learned_threshold.detach()[0].clone()
        assert (sae.learned_threshold == threshold).all(), "a batchtopk has one threshold"
    return {"b_dec": b_dec, "k": torch.tensor(sae.config.k, dtype=torch.int32), "threshold": threshold, **linear}


def dictionary_config(sae: SparseAutoencoder, record: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json: what `load_dictionary` and dictionary_learning's evaluation read, then where the SAE comes from."""
    config, hook = sae.config, record["hook"]
    dict_class, trainer = CLASSES[config.activation]
    block = re.match(r"blocks\.(\d+)\.", hook)
    return {
        "trainer": {
            "trainer_class": trainer,
            "dict_class": dict_class,
            "activation_dim": config.d_model,
            "dict_size": config.d_sae,
            **({"k": config.k} if config.activation in ("topk", "batchtopk") else {}),
            "lr": record["train"]["optimizer"]["lr"],
            "steps": record["steps"],
            "seed": record["train"]["init_seed"],
            "layer": int(block[1]) if block else None,
            "lm_name": metadata["model_name"],
            "submodule_name": hook,
            "device": "cpu",
        },
        "buffer": {"d_submodule": config.d_model, "io": "out", "ctx_len": metadata["context_size"]},
        "tcsae": {"run": record["name"], "store": record["store"]["content"], "libraries": record["libraries"]},
    }


def _check_form(name: str, sae: SparseAutoencoder, form: Format) -> None:
    config, kind = sae.config, ""
    known = SPARSIFIED if form == "sparsify" else tuple(CLASSES)
    if config.activation not in known:
        kind = f"sae.activation={config.activation}"
    elif config.layer_norm != "none":
        kind = f"sae.layer_norm={config.layer_norm}"
    elif config.reads_neighbours and not (form == "saelens" and config.predictor == "attention"):
        kind = f"sae.window={config.window}" if config.window > 1 else f"sae.predictor={config.predictor}"
    if kind:
        there = f"There is: {', '.join(known)}, without a layer norm{', and TFA' * (form == 'saelens')}."
        raise RunError(f"{name} has {kind}, which has no form in {form}. {there}")
    norms = sae.W_dec.detach().norm(dim=1)
    rescales = form == "dictionary_learning" and config.activation == "relu"
    if rescales and not torch.allclose(norms, torch.ones_like(norms)):
        raise RunError(
            f"{name} has decoder rows of norm {norms.min():.3g} to {norms.max():.3g}; {form} would rescale its codes "
            "to norm 1 on loading. Train with optimizer.unit_decoder=true and at least one step."
        )


def _check_place(out: Path, files: tuple[str, ...]) -> None:
    """What is there is replaced, so it has to be an earlier export."""
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if path.name not in files)
        if not others:
            return
        reason = f"holds {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else "")
    elif out.exists():
        reason = "is a file"
    else:
        return
    raise RunError(f"{out} {reason}; an export goes into a new folder or over an earlier one. Give another --out.")
