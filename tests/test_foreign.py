"""Promise: an SAE in SAELens' layout is read as SAELens computes it, or refused by the name of what is unsupported."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.saelens import is_foreign, load_foreign

D_MODEL, D_SAE = 6, 11


def weights_of(architecture: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {"W_enc": rng.normal(size=(D_MODEL, D_SAE)), "W_dec": rng.normal(size=(D_SAE, D_MODEL)) * 2}
    made |= {"b_dec": rng.normal(size=D_MODEL), "b_enc": rng.normal(size=D_SAE)}
    if architecture == "jumprelu":
        made["threshold"] = rng.normal(size=D_SAE)  # some below 0
    if architecture == "batchtopk":
        made["topk_threshold"] = np.array(1.7)
    if architecture == "gated":
        made["b_gate"], made["r_mag"], made["b_mag"] = rng.normal(size=(3, D_SAE)) * 0.5
        del made["b_enc"]
    return {key: value if key == "topk_threshold" else value.astype(np.float32) for key, value in made.items()}


def write(folder: Path, kind: str, weights: dict[str, np.ndarray] | None = None, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    base = {"architecture": kind, "d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": True}
    base |= {"normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    safetensors.numpy.save_file(weights or weights_of(kind), folder / "sae_weights.safetensors")
    return folder


def plain(w: dict[str, np.ndarray], x: np.ndarray, architecture: str, config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Code and reconstruction, as SAELens writes them down."""
    z = (x - w["b_dec"] if config.get("apply_b_dec_to_input", True) else x) @ w["W_enc"]
    scale = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else 1.0
    if architecture == "gated":
        f = (z + w["b_gate"] > 0) * np.maximum(z * np.exp(w["r_mag"]) + w["b_mag"], 0)
    else:
        pre = (z + w["b_enc"]) * scale
        f = np.maximum(pre, 0)
        if architecture == "topk":
            f = np.where(pre >= np.sort(pre, 1)[:, [-config["k"]]], f, 0)
        if architecture == "jumprelu":
            f = f * (pre > w["threshold"])
        if architecture == "batchtopk":
            f = f * (pre > w["topk_threshold"])
    return f, (f / scale) @ w["W_dec"] + w["b_dec"]


CASES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 3}),
    ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("batchtopk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    ("batchtopk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
]


@pytest.mark.parametrize("architecture, config", CASES)
def test_it_computes_what_saelens_writes_down(tmp_path, architecture, config):
    sae = load_foreign(write(tmp_path, architecture, **config))
    x = np.random.default_rng(1).normal(size=(50, D_MODEL)).astype(np.float32)
    f, x_hat = plain(weights_of(architecture), x, architecture, config)
    with torch.no_grad():
        code = sae.encode_sparse(torch.from_numpy(x))
        found = sae.decode_sparse(code, torch.from_numpy(x))
    np.testing.assert_allclose(code.dense().numpy(), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.numpy(), x_hat, rtol=1e-4, atol=1e-4)
    assert 0 < (f > 0).mean() < 1


def test_configs_from_before_saelens_6(tmp_path):
    old = {"metadata": None, "hook_point": "blocks.1.hook_resid_post", "activation_fn_str": "topk"}
    sae = load_foreign(write(tmp_path, "standard", activation_fn_kwargs={"k": 4}, **old))
    assert (sae.config.activation, sae.config.k) == ("topk", 4)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported; standard, topk,"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not supported"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not supported"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' is not supported"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index=3 is not supported"),
        ({"architecture": "jumprelu"}, "does not hold the weights that cfg.json speaks of"),
        ({"architecture": "topk", "k": None}, "k=None is no value of an SAE in SAELens' layout"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, message):
    with pytest.raises(RunError, match=message):
        load_foreign(write(tmp_path, "standard", weights_of("standard"), **config))


def test_damaged_folders_are_refused(tmp_path):
    folder = write(tmp_path / "a", "standard")
    (folder / "cfg.json").write_text("{")
    with pytest.raises(RunError, match="no SAE's config in SAELens' layout"):
        load_foreign(folder)
    (write(tmp_path / "b", "standard") / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="does not hold the weights"):
        load_foreign(tmp_path / "b")


def test_what_we_save_is_read_alike_without_our_record(tmp_path):
    """Our own folders in SAELens' layout, as a stranger reads them."""
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, activation="batchtopk", k=3))
    for tensor in sae.parameters():
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path / "run", {}, {"hook_name": "blocks.1.hook_resid_post"})
    assert not is_foreign(tmp_path / "run")
    (tmp_path / "run" / "tcsae.json").unlink()
    assert is_foreign(tmp_path / "run")
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(1))
    theirs = load_foreign(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x).clamp(min=0))
