"""SAEs that others trained, in SAELens' folder layout: read into our module, so that one code scores all.

Everything that SAELens applies at run time and that is linear is folded into the weights. What cannot be is refused by
its name, and so are folders of other libraries. Only JSON and safetensors are read: no code of a folder ever runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.sae.folder import CONFIG, METRICS, RECORD, WEIGHTS, check_finite, load_tensors, read_object, reason
from tcsae.shared.sae.layout import SaeConfig, SaeMetadata
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, positive_code

ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "gated": "relu"}
"""Architectures that are read, and the activation function that each infers with."""
NEUTRAL = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
}
"""Settings that change what an SAE computes, and their values that do not."""
OTHER_FORMATS = {
    "ae.pt": "dictionary_learning's format (ae.pt)",
    "sae.safetensors": "sparsify's format (sae.safetensors)",
    "sae.pt": "an older format of sparsify (sae.pt)",
    "params.npz": "Gemma Scope's format (params.npz)",
    "sae_weights.pt": "an older format of SAELens (sae_weights.pt)",
}
"""Files by which SAEs of other libraries are known."""
DO_CONVERT = f"Convert it to SAELens' layout ({CONFIG}, {WEIGHTS})."


class GatedAutoencoder(SparseAutoencoder):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv:2404.16014): one matrix decides what is on, rescaled, how much.

    f = 1[z + b_gate > 0] * relu(z * exp(r_mag) + b_mag), z = (x - b_dec) W_enc. `b_enc` is b_mag, as in SAEBench.
    """

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.b_gate = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))

    def tensors(self) -> dict[str, Tensor]:
        """The weights by SAELens' names."""
        names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
        names |= {"b_gate": "b_gate", "b_mag": "b_enc", "r_mag": "r_mag"}
        return {name: getattr(self, ours).detach() for name, ours in names.items()}

    def saelens_config(self) -> dict[str, Any]:
        """cfg.json of this SAE."""
        return super().saelens_config() | {"architecture": "gated"}

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, as a dense tensor of the weights' dtype."""
        z = torch.nn.functional.linear(x.to(self.W_dec.dtype) - self.b_dec, self.W_enc_rows)
        return (z * self.r_mag.exp() + self.b_enc).relu() * (z + self.b_gate > 0)

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseCode:
        """The code's non-zero entries; see SparseAutoencoder."""
        return positive_code(self.encode(x.reshape(-1, self.config.d_model)))


def is_foreign(path: Path) -> bool:
    """Whether a folder holds an SAE in SAELens' layout that is none of ours.

    A run of ours that was killed just before its record has them, too, and the metrics of its training.
    """
    is_ours = any((path / name).is_file() for name in (RECORD, METRICS))
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not is_ours


def other_format(path: Path) -> str | None:
    """The name of another library's format that a folder, or one right below it, is in; None if in none known."""
    for name, form in OTHER_FORMATS.items():
        if (path / name).is_file() or any(path.glob(f"*/{name}")):
            return form
    return None


def foreign_config(path: Path) -> dict[str, Any]:
    """cfg.json in one flat form: that of SAELens 6 with nested metadata, or an older one.

    Raises RunError if it cannot be read, a value is nonsense, or it says something that is not supported.
    """
    file = path / CONFIG
    config = read_object(file, "It is no SAE's config in SAELens' layout.")
    metadata = config.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise _no_config(file, "metadata", metadata, "an object")
    flat = config | metadata
    flat.setdefault("hook_name", flat.get("hook_point"))
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    if activation == "topk":  # before SAELens 6 a topk was a standard SAE with another function
        arguments = flat.get("activation_fn_kwargs") or {}
        if not isinstance(arguments, dict):
            raise _no_config(file, "activation_fn_kwargs", arguments, "an object")
        flat |= {"architecture": "topk", "k": arguments.get("k")}
    elif activation not in ("relu", None) and flat.get("architecture", "standard") == "standard":
        raise RunError(f"{file}: activation_fn {activation!r} is not supported; relu and topk are.")
    flat.setdefault("architecture", "standard")
    if flat["architecture"] not in list(ACTIVATIONS):
        raise RunError(f"{file}: architecture {flat['architecture']!r} is not supported; {', '.join(ACTIVATIONS)} are.")
    for key, allowed in NEUTRAL.items():
        if flat.get(key) not in allowed:
            raise RunError(f"{file}: {key}={flat[key]!r} is not supported. Fold it into the weights with SAELens.")
    _check_values(file, flat)
    return flat


def _check_values(file: Path, flat: dict[str, Any]) -> None:
    """Raises RunError for a value that a folder of SAELens cannot have."""
    if not isinstance(flat["hook_name"], str | None):
        raise _no_config(file, "hook_name", flat["hook_name"], "a hook's name")
    for key in ("d_in", "d_sae"):
        if flat.get(key) is not None and not _is_count(flat[key]):
            raise _no_config(file, key, flat[key], "a whole number from 1 on")
    if flat["architecture"] == "topk" and not _is_count(flat.get("k")):
        raise _no_config(file, "k", flat.get("k"), "a whole number from 1 on")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "prepend_bos"):
        if not isinstance(flat.get(key), bool | None):
            raise _no_config(file, key, flat[key], "true or false")
    positions = flat.get("seqpos_slice")
    if positions is None:
        return
    fits = isinstance(positions, list) and len(positions) in (1, 2, 3)
    if not fits or not all(one is None or isinstance(one, int) for one in positions) or positions[2:] == [0]:
        raise _no_config(file, "seqpos_slice", positions, "a list of up to three whole numbers or null")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _no_config(file: Path, key: str, value: object, allowed: str) -> RunError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    return RunError(f"{file}: {key}={shown} is no value of an SAE in SAELens' layout; {allowed} is. {DO_CONVERT}")


def trained_positions(config: Mapping[str, Any]) -> slice:
    """The positions of each sequence that the SAE was trained on, as far as cfg.json says."""
    return slice(*(config.get("seqpos_slice") or [None]))


def load_foreign(path: Path) -> SparseAutoencoder:
    """The SAE of a folder in SAELens' layout, as float32 on the CPU.

    Raises RunError if it is not supported, its weights are missing or do not fit, or one of them is NaN or infinite.
    """
    config, file = foreign_config(path), path / WEIGHTS
    try:
        weights = {name: tensor.float() for name, tensor in load_tensors(file).items()}
        d_model, d_sae = weights["W_enc"].shape
        _check_shape(config, d_model, d_sae)
        check_finite(weights, file, "No figure of it could be trusted.")
        architecture = config["architecture"]
        if architecture == "jumprelu" and "threshold" not in weights and "topk_threshold" in weights:
            architecture = "batchtopk"
        k = config["k"] if architecture == "topk" else min(32, d_sae)
        sae_config = SaeConfig(d_model=d_model, d_sae=d_sae, activation=ACTIVATIONS[architecture], k=k)
        sae = GatedAutoencoder(sae_config) if architecture == "gated" else SparseAutoencoder(sae_config)
        sae.load_state_dict(_state(config | {"architecture": architecture}, weights))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ConfigError, safetensors.SafetensorError) as error:
        raise RunError(f"{file} does not hold the weights that {CONFIG} speaks of ({reason(error)}).") from error
    folded: dict[str, Tensor] = dict(sae.named_parameters())
    if isinstance(sae, GatedAutoencoder):
        folded["exp(r_mag)"] = sae.r_mag.exp()
    check_finite(folded, file, "Its weights leave float32's range as they are folded.")
    sae.metadata = _metadata(config)
    return sae.eval()


def _metadata(config: Mapping[str, Any]) -> SaeMetadata:
    first = trained_positions(config).start or 0
    text = {
        name: config.get(name) if isinstance(config.get(name), str) else None for name in ("model_name", "dataset_path")
    }
    length = config.get("context_size")
    return SaeMetadata(
        form="saelens",
        hook=config["hook_name"],
        model=text["model_name"],
        dataset=text["dataset_path"],
        context_size=length if _is_count(length) else None,
        prepend_bos=config.get("prepend_bos"),
        skip_first=max(0, first),
    )


def _check_shape(config: dict[str, Any], d_model: int, d_sae: int) -> None:
    for key, size in (("d_in", d_model), ("d_sae", d_sae)):
        if config.get(key) not in (None, size):
            raise ValueError(f"W_enc is [{d_model}, {d_sae}], {key} is {config[key]}")


def _state(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our module's weights: run-time options folded in."""
    architecture, W_dec = config["architecture"], weights["W_dec"]
    W_enc_rows, b_dec = weights["W_enc"].T.contiguous(), weights["b_dec"]
    bias = weights["b_mag" if architecture == "gated" else "b_enc"]
    state = {"W_dec": W_dec, "b_dec": b_dec}
    if not config.get("apply_b_dec_to_input", True):  # ours always takes b_dec away: give the encoder its share back
        shift = W_enc_rows @ b_dec
        bias = bias + (shift * weights["r_mag"].exp() if architecture == "gated" else shift)
        if architecture == "gated":
            weights = weights | {"b_gate": weights["b_gate"] + shift}
    rescales = config.get("rescale_acts_by_decoder_norm", architecture == "batchtopk")
    if architecture in ("topk", "batchtopk") and rescales:
        norms = W_dec.norm(dim=1)
        W_enc_rows, bias = W_enc_rows * norms[:, None], bias * norms
        state["W_dec"] = W_dec / norms[:, None]
    match architecture:
        case "gated":
            state |= {"b_gate": weights["b_gate"], "r_mag": weights["r_mag"]}
        case "batchtopk":
            state["threshold"] = weights["topk_threshold"].clamp(min=0).expand(len(bias)).clone()
        case "jumprelu":  # SAELens also applies a relu, so a threshold below 0 acts as 0
            state["threshold"] = weights["threshold"].clamp(min=0)
    return state | {"W_enc_rows": W_enc_rows, "b_enc": bias}
