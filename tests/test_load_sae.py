"""Promise: tcsae.load_sae reads an SAE from each library's files, here or on the Hub, with that library's codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import tcsae
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.sae.export import dictionary_config, dictionary_tensors
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.sources import LOADERS

D_MODEL, D_SAE, K = 6, 20, 3
HOOK = "blocks.4.hook_resid_post"
RECORD = {
    "name": "one",
    "hook": HOOK,
    "train": {"optimizer": {"lr": 2e-3}, "init_seed": 3, "data": {"skip_first": 2}},
    "steps": 7,
    "store": {"content": "c0ffee"},
    "libraries": {"tcsae": "0"},
}
METADATA = {"model_name": "toy", "hook_name": HOOK, "context_size": 32, "prepend_bos": False}


def random_weights(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D_MODEL, D_SAE), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    weights = {name: torch.randn(shapes.get(name, (D_SAE,)), generator=generator) for name in names}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].abs()
    return weights


def sae_of(activation: str) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=K, activation=activation)).eval()
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if sae.threshold is not None else [])]
    weights = random_weights(*names)
    if activation == "batchtopk":
        weights["threshold"] = torch.full((D_SAE,), 0.4)
    sae.load_state_dict(weights)
    return sae


def write_dictionary(folder: Path, tensors: dict[str, Tensor], **trainer: object) -> None:
    torch.save(tensors, folder / "ae.pt")
    values = {"trainer": {"layer": 4, "lm_name": "toy", **trainer}, "buffer": {"ctx_len": 32}}
    (folder / "config.json").write_text(json.dumps(values))


def write_own(folder: Path, activation: str) -> Tensor:
    sae = sae_of(activation)
    save_sae(sae, folder, RECORD, METADATA)
    return sae.encode(X)


def write_saelens(folder: Path) -> Tensor:
    code = write_own(folder, "jumprelu")
    (folder / "tcsae.json").unlink()
    return code


def write_ours_as_dictionary(folder: Path, activation: str) -> Tensor:
    sae = sae_of(activation)
    torch.save(dictionary_tensors(sae), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(dictionary_config(sae, RECORD, METADATA)))
    return sae.encode(X)


def write_gated(folder: Path) -> Tensor:
    w = random_weights("W_enc", "W_dec", "b_dec", "r_mag", "gate_bias", "mag_bias")
    w = {"encoder.weight": w.pop("W_enc").T, "decoder.weight": w.pop("W_dec").T, "decoder_bias": w.pop("b_dec"), **w}
    write_dictionary(folder, w, dict_class="GatedAutoEncoder")
    z = (X - w["decoder_bias"]) @ w["encoder.weight"].T
    return (z + w["gate_bias"] > 0) * (w["r_mag"].exp() * z + w["mag_bias"]).relu()


def write_matryoshka(folder: Path) -> Tensor:
    w = random_weights("W_enc", "b_enc", "W_dec", "b_dec") | {"threshold": torch.tensor(0.5), "k": torch.tensor(K)}
    write_dictionary(folder, w, dict_class="MatryoshkaBatchTopKSAE", k=K)
    post = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    return post * (post > 0.5)


def write_sparsify(folder: Path) -> Tensor:
    w = random_weights("W_enc", "b_enc", "W_dec", "b_dec")
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    safetensors.torch.save_file(tensors | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    config = {"activation": "topk", "k": K, "num_latents": D_SAE, "d_in": D_MODEL, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    post = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    top = post.topk(K)
    return torch.zeros_like(post).scatter(-1, top.indices, top.values)


def write_gemma_scope(folder: Path) -> Tensor:
    w = random_weights("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in w.items()})
    pre = X @ w["W_enc"] + w["b_enc"]
    return pre.relu() * (pre > w["threshold"])


X = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2))
WRITERS = {f"own-{name}": lambda folder, name=name: write_own(folder, name) for name in ("topk", "gelu", "batchtopk")}
WRITERS |= {
    f"dictionary_learning-{name}": lambda folder, name=name: write_ours_as_dictionary(folder, name)
    for name in ("relu", "topk", "batchtopk", "jumprelu")
}
WRITERS |= {
    "saelens": write_saelens,
    "dictionary_learning-gated": write_gated,
    "dictionary_learning-matryoshka": write_matryoshka,
    "sparsify/layers.4": write_sparsify,
    "gemma_scope/layer_4": write_gemma_scope,
}


@pytest.mark.parametrize("form", WRITERS)
@torch.no_grad()
def test_each_form_gives_its_codes_and_survives_saving(tmp_path, form):
    folder = tmp_path / form
    folder.mkdir(parents=True)
    expected = WRITERS[form](folder)
    sae = tcsae.load_sae(folder)
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-4, atol=1e-5)
    assert sae.metadata.hook == HOOK
    assert not sae.training
    sae.save(tmp_path / "saved")
    saved = tcsae.load_sae(tmp_path / "saved")
    assert torch.equal(saved.encode(X), sae.encode(X))
    assert torch.equal(saved(X), sae(X))
    assert (saved.metadata.hook, saved.metadata.model) == (sae.metadata.hook, sae.metadata.model)


def test_metadata_of_a_run(tmp_path):
    write_own(tmp_path, "topk")
    result = tcsae.load_sae(tmp_path).metadata
    assert (result.form, result.model, result.store) == ("tcsae", "toy", "c0ffee")
    assert (result.context_size, result.prepend_bos, result.skip_first) == (32, False, 2)
    assert result.record["steps"] == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float16"])
@torch.no_grad()
def test_device_and_dtype(tmp_path, dtype):
    expected = write_own(tmp_path, "jumprelu")
    sae = tcsae.load_sae(tmp_path, dtype=dtype, device="cpu")
    assert sae.dtype == (torch.float16 if dtype == "float16" else dtype)
    assert sae.encode(X.half()).dtype == sae.dtype
    torch.testing.assert_close(sae.encode(X).float(), expected, rtol=0.05, atol=0.3)
    assert sae.to("meta").device.type == "meta"


@pytest.mark.parametrize("nested", [False, True])
def test_the_state_dict_has_the_fields_names(nested):
    sae = sae_of("jumprelu")
    module = torch.nn.ModuleDict({"sae": sae}) if nested else sae
    prefix = "sae." if nested else ""
    state = module.state_dict()
    assert sorted(state) == sorted(prefix + name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    assert torch.equal(state[f"{prefix}W_enc"], sae.W_enc)
    assert safetensors.torch.save(state)
    other = SparseAutoencoder(sae.config)
    (torch.nn.ModuleDict({"sae": other}) if nested else other).load_state_dict(state)
    assert torch.equal(other.encode(X), sae.encode(X))
    with pytest.raises(RuntimeError, match="W_enc"):
        other.load_state_dict({name: value for name, value in sae.state_dict().items() if name != "W_enc"})


def folder_of(tmp_path: Path, fault: str) -> Path:
    folder = tmp_path / "layers.4"
    folder.mkdir()
    write_sparsify(folder)
    config = json.loads((folder / "cfg.json").read_text())
    match fault:
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case "transcoder":
            (folder / "cfg.json").write_text(json.dumps(config | {"transcode": True}))
        case "groupmax":
            (folder / "cfg.json").write_text(json.dumps(config | {"activation": "groupmax"}))
        case "no config":
            (folder / "cfg.json").unlink()
        case "no k":
            (folder / "cfg.json").write_text(json.dumps({"activation": "topk"}))
        case "torn":
            (folder / "sae.safetensors").write_bytes((folder / "sae.safetensors").read_bytes()[:-9])
        case "below":
            return tmp_path
        case "unknown class":
            (folder / "sae.safetensors").unlink()
            write_dictionary(folder, {}, dict_class="CrossCoder")
        case "code in ae.pt":
            (folder / "sae.safetensors").unlink()
            write_dictionary(folder, {}, dict_class="AutoEncoder")
            torch.save({"bias": Path("x")}, folder / "ae.pt")  # a pickle that calls something
        case "not a number":
            tensors = {name: torch.full_like(value, torch.nan) for name, value in read(folder).items()}
            safetensors.torch.save_file(tensors, folder / "sae.safetensors")
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "sae.safetensors")


FAULTS = {
    "empty": "holds no SAE: none of tcsae.json, cfg.json with sae_weights.safetensors, ae.pt",
    "transcoder": "transcode=True is not supported",
    "groupmax": "activation='groupmax' is not supported; 'topk' is",
    "no config": "cfg.json cannot be read",
    "no k": "does not hold the weights of such an SAE",
    "torn": "does not hold the weights of such an SAE .* a format that is read: ours, .* sparsify's, Gemma Scope's.",
    "below": r"holds its SAEs in subfolders: layers.4. Name one: subfolder='layers.4'",
    "unknown class": "Unknown dict_class 'CrossCoder'. There is: AutoEncoder",
    "code in ae.pt": "does not hold the weights of such an SAE",
    "not a number": "NaN or infinite",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, fault):
    with pytest.raises(RunError, match=FAULTS[fault]):
        tcsae.load_sae(folder_of(tmp_path, fault))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"source": "no such folder"}, RunError, "is no folder, and no Hub id"),
        ({"source": "{}", "revision": "v1"}, ConfigError, "is a local folder and has no revision 'v1'"),
        ({"source": "{}", "subfolder": "layers.5"}, RunError, "Unknown subfolder 'layers.5'. Did you mean 'layers.4'"),
        ({"source": "{}", "dtype": "int8"}, ConfigError, "dtype='int8': float32, bfloat16"),
        ({"source": "owner/name"}, RunError, "not in the Hub's cache here, and the Hub cannot be reached"),
    ],
)
def test_a_wrong_place_is_refused_in_one_line(tmp_path, arguments, error, message):
    folder_of(tmp_path, "none")
    arguments = {name: value.format(tmp_path) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        tcsae.load_sae(**arguments)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the Hub's as a download leaves it, read with HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--owner--name", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for subfolder in ("", "layers.4"):
        folder = repository / "snapshots" / commit / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        write_sparsify(folder) if subfolder else write_saelens(folder)
    return commit


@torch.no_grad()
def test_a_hub_id_comes_from_the_cache(hub_cache):
    assert tcsae.load_sae("owner/name").metadata.form == "saelens"
    sae = tcsae.load_sae("owner/name", subfolder="layers.4", revision=hub_cache)
    assert (sae.metadata.form, sae.metadata.hook) == ("sparsify", HOOK)
    with pytest.raises(RunError, match="owner/name has no SAE at layers.5/"):
        tcsae.load_sae("owner/name", subfolder="layers.5")
    with pytest.raises(RunError, match="owner/name at revision v2 is not in the Hub's cache"):
        tcsae.load_sae("owner/name", revision="v2")


def test_every_loader_is_tried():
    named = {"ae.pt": "dictionary_learning", "sae.safetensors": "sparsify", "params.npz": "gemma_scope"}
    assert {named[file] for file in LOADERS} <= {form.partition("/")[0].partition("-")[0] for form in WRITERS}


def test_codes_as_torch_sparse_tensors_and_elsewhere():
    code = sae_of("jumprelu").encode_sparse(X)
    assert torch.equal(code.to_torch_sparse().to_dense(), code.dense())
    assert code.to_torch_sparse().is_coalesced()
    moved = code.to("meta")
    assert {moved.values.device.type, moved.latents.device.type, moved.offsets.device.type} == {"meta"}
