"""SAEs that others trained, in SAELens' folder layout: read into our module, so that one code scores all.

Everything that SAELens applies at run time and that is linear is folded into the weights. What cannot be is refused.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.folder import CONFIG, RECORD, WEIGHTS
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder

ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "gated": "relu"}
"""Architectures that are read, and the activation function that each infers with."""
NEUTRAL = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
}
"""Settings that change what an SAE computes, and their values that do not."""


class GatedAutoencoder(SparseAutoencoder):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv:2404.16014): one matrix decides what is on, rescaled, how much.

    f = 1[z + b_gate > 0] * relu(z * exp(r_mag) + b_mag), z = (x - b_dec) W_enc. `b_enc` is b_mag, as in SAEBench.
    """

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.b_gate = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, as a dense tensor."""
        z = torch.nn.functional.linear(x - self.b_dec, self.W_enc_rows)
        return (z * self.r_mag.exp() + self.b_enc).relu() * (z + self.b_gate > 0)


def is_foreign(path: Path) -> bool:
    """Whether a folder holds an SAE in SAELens' layout that is none of ours."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not (path / RECORD).is_file()


def foreign_config(path: Path) -> dict[str, Any]:
    """cfg.json in one flat form: that of SAELens 6 with nested metadata, or an older one.

    Raises RunError if it cannot be read, or says something that is not supported.
    """
    file = path / CONFIG
    try:
        config = json.loads(file.read_text())
        flat = {key: value for key, value in config.items() if key != "metadata"} | (config.get("metadata") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{file} is no SAE's config in SAELens' layout ({error}).") from error
    flat.setdefault("hook_name", flat.get("hook_point"))
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    if activation == "topk":  # before SAELens 6 a topk was a standard SAE with another function
        flat |= {"architecture": "topk", "k": (flat.get("activation_fn_kwargs") or {}).get("k")}
    elif activation not in ("relu", None) and flat.get("architecture", "standard") == "standard":
        raise RunError(f"{file}: activation_fn {activation!r} is not supported; relu and topk are.")
    flat.setdefault("architecture", "standard")
    if flat["architecture"] not in ACTIVATIONS:
        raise RunError(f"{file}: architecture {flat['architecture']!r} is not supported; {', '.join(ACTIVATIONS)} are.")
    for key, allowed in NEUTRAL.items():
        if flat.get(key) not in allowed:
            raise RunError(f"{file}: {key}={flat[key]!r} is not supported. Fold it into the weights with SAELens.")
    return flat


def load_foreign(path: Path) -> SparseAutoencoder:
    """The SAE of a folder in SAELens' layout, as float32 on the CPU.

    Raises RunError if it is not supported, or its weights are missing or do not fit.
    """
    config, file = foreign_config(path), path / WEIGHTS
    try:
        weights = {name: tensor.float() for name, tensor in safetensors.torch.load_file(file).items()}
        d_model, d_sae = weights["W_enc"].shape
        architecture = config["architecture"]
        if architecture == "jumprelu" and "threshold" not in weights and "topk_threshold" in weights:
            architecture = "batchtopk"
        k = config["k"] if architecture == "topk" else min(32, d_sae)
        sae_config = SaeConfig(d_model=d_model, d_sae=d_sae, activation=ACTIVATIONS[architecture], k=int(k))  # type: ignore[arg-type]
        made = GatedAutoencoder(sae_config) if architecture == "gated" else SparseAutoencoder(sae_config)
        made.load_state_dict(_state(config | {"architecture": architecture}, weights))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{file} does not hold the weights that {CONFIG} speaks of ({reason}).") from error
    return made.eval()


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
