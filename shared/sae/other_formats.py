"""SAEs in the formats of dictionary_learning, sparsify and Gemma Scope, read into our module.

Only JSON, safetensors, plain arrays and, with torch's own guard against code, ae.pt are read: no code of a folder runs.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, RunError, unknown
from tcsae.shared.sae.folder import check_finite, load_tensors, read_object, reason
from tcsae.shared.sae.layout import CONFIG, SaeConfig, SaeMetadata
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.saelens import GatedAutoencoder

NOT_READ = "Give a folder of a format that is read: ours, SAELens', dictionary_learning's, sparsify's, Gemma Scope's."


class _Read(NamedTuple):
    """What a file says, before it is our module."""

    activation: str
    state: dict[str, Tensor]
    """By the names of our state_dict."""
    k: int | None
    metadata: SaeMetadata
    gated: bool = False
    groups: tuple[float, ...] = (1.0,)
    """Shares of the latents."""


def load_dictionary(path: Path) -> SparseAutoencoder:
    """The SAE of a folder of dictionary_learning: config.json and ae.pt. Its codes are as the file's weights give them.

    (Its own loader first scales the decoder of an AutoEncoder to norm 1: `tcsae.fold_decoder_norms` does that.)
    Raises RunError as `load_foreign` does.
    """
    config = read_object(path / "config.json", "It stands beside ae.pt: copy the whole folder.")
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise RunError(f"{path / 'config.json'} has no trainer: no config of dictionary_learning. {NOT_READ}")
    kind = trainer.get("dict_class")
    if kind not in _DICTIONARIES:
        raise RunError(f"{path / 'config.json'}: {unknown('dict_class', str(kind), _DICTIONARIES)}")

    def read() -> _Read:
        weights = torch.load(path / "ae.pt", map_location="cpu", weights_only=True)
        tensors = {name: value.float() for name, value in weights.items() if isinstance(value, Tensor)}
        activation, state = _DICTIONARIES[kind](tensors)
        k = trainer.get("k", tensors.get("k"))
        metadata = SaeMetadata(
            form="dictionary_learning",
            hook=_dictionary_hook(trainer),
            model=trainer.get("lm_name"),
            context_size=(config.get("buffer") or {}).get("ctx_len"),
        )
        groups = _groups(tensors)
        return _Read(activation, state, None if k is None else int(k), metadata, kind == "GatedAutoEncoder", groups)

    return _module(path / "ae.pt", read)


def load_sparsify(path: Path) -> SparseAutoencoder:
    """The SAE of a folder of sparsify: cfg.json and sae.safetensors. Raises RunError as `load_foreign` does."""
    file = path / CONFIG
    config = read_object(file, "It stands beside sae.safetensors: copy the whole folder.")
    for name, allowed in (
        ("activation", ("topk", None)),
        ("transcode", (False, None)),
        ("skip_connection", (False, None)),
    ):
        if config.get(name) not in allowed:
            raise RunError(f"{file}: {name}={config[name]!r} is not supported; {allowed[0]!r} is.")

    def read() -> _Read:
        tensors = {name: value.float() for name, value in load_tensors(path / "sae.safetensors").items()}
        state = {
            "W_enc": tensors["encoder.weight"].T,
            "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        }
        return _Read("topk", state, int(config["k"]), SaeMetadata(form="sparsify", hook=_sparsify_hook(path.name)))

    return _module(path / "sae.safetensors", read)


def load_gemma_scope(path: Path) -> SparseAutoencoder:
    """The SAE of a folder of Gemma Scope: params.npz. Raises RunError as `load_foreign` does."""

    def read() -> _Read:
        with np.load(path / "params.npz", allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.asarray(arrays[name])).float() for name in arrays.files}
        layer = re.search(r"layer_(\d+)", str(path))
        hook = f"blocks.{layer[1]}.hook_resid_post" if layer else None
        return _Read(
            "jumprelu", _jumprelu(tensors)[1], None, SaeMetadata(form="gemma_scope", hook=hook, prepend_bos=True)
        )

    return _module(path / "params.npz", read)


LOADERS = {"ae.pt": load_dictionary, "sae.safetensors": load_sparsify, "params.npz": load_gemma_scope}
"""By the file that a folder of that format has."""


def _module(file: Path, read: Callable[[], _Read]) -> SparseAutoencoder:
    try:
        theirs = read()
        d_model, d_sae = theirs.state["W_enc"].shape
        k = min(32, d_sae) if theirs.k is None else theirs.k
        config = SaeConfig(d_model=d_model, d_sae=d_sae, activation=theirs.activation, k=k, groups=theirs.groups)
        check_finite(theirs.state, file, "No figure of it could be trusted.")
        sae = (GatedAutoencoder if theirs.gated else SparseAutoencoder)(config)
        sae.load_state_dict(theirs.state)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        EOFError,
        ConfigError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise RunError(f"{file} does not hold the weights of such an SAE ({reason(error)}). {NOT_READ}") from error
    sae.metadata = theirs.metadata
    return sae.eval()


def _groups(tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Of a matryoshka SAE, as its file has them."""
    sizes = tensors.get("group_sizes")
    return (1.0,) if sizes is None else tuple((sizes.double() / sizes.sum()).tolist())


def _linear(tensors: Mapping[str, Tensor], b_dec: str) -> dict[str, Tensor]:
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors[b_dec],
    }


def _above(state: dict[str, Tensor], threshold: Tensor) -> tuple[str, dict[str, Tensor]]:
    """A threshold, one or one a latent, that acts on what is positive anyway; below 0 it means that none was set."""
    return "jumprelu", state | {"threshold": threshold.clamp(min=0).expand(len(state["b_enc"])).clone()}


def _jumprelu(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Theirs does not take b_dec from the encoder's input: b_enc takes it up, in double precision, here."""
    b_enc = tensors["b_enc"].double() + tensors["b_dec"].double() @ tensors["W_enc"].double()
    state = {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")} | {"b_enc": b_enc.float()}
    return _above(state, tensors["threshold"])


def _gated(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    state = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["mag_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder_bias"],
        "b_gate": tensors["gate_bias"],
        "r_mag": tensors["r_mag"],
    }
    return "relu", state


_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_DICTIONARIES: dict[str, Callable[[Mapping[str, Tensor]], tuple[str, dict[str, Tensor]]]] = {
    "AutoEncoder": lambda tensors: ("relu", _linear(tensors, "bias")),
    "AutoEncoderTopK": lambda tensors: ("topk", _linear(tensors, "b_dec")),
    "BatchTopKSAE": lambda tensors: _above(_linear(tensors, "b_dec"), tensors["threshold"]),
    "MatryoshkaBatchTopKSAE": lambda tensors: _above({name: tensors[name] for name in _NAMES}, tensors["threshold"]),
    # T-SAE's (arXiv 2511.05541): a threshold of -1 is one that training had not set yet, so that plain relu is left.
    "TemporalMatryoshkaBatchTopKSAE": lambda tensors: _above(
        {name: tensors[name] for name in _NAMES}, tensors["threshold"]
    ),
    "JumpReluAutoEncoder": _jumprelu,
    "GatedAutoEncoder": _gated,
}
"""dictionary_learning's classes: (activation, state) of their tensors."""


def _dictionary_hook(trainer: Mapping[str, Any]) -> str | None:
    """The submodule by our names: theirs are the residual stream after a layer, as SAELens reads them."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    if isinstance(name, str) and name.startswith("blocks."):
        return name
    return f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else name


def _sparsify_hook(name: str) -> str:
    """A folder's name, a module's path, by our names: layers.4 is blocks.4.hook_resid_post, layers.4.mlp its MLP's."""
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)(\.mlp)?$", name)
    return f"blocks.{match[1]}.{'hook_mlp_out' if match[2] else 'hook_resid_post'}" if match else name
