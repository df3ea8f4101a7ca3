"""Promise: an SAE in SAELens' layout is read as SAELens computes it, or refused by the name of what is unsupported."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

from tcsae.evaluate.candidates import evaluable, foreign_differences
from tcsae.shared.base.errors import RunError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.saelens import OTHER_FORMATS, is_foreign, load_foreign
from tcsae.shared.store.format import CorpusRecipe, HookRecipe, ModelRecipe, Recipe, SequenceRecipe

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
        result = sae.decode_sparse(code, torch.from_numpy(x))
    np.testing.assert_allclose(code.dense().numpy(), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.numpy(), x_hat, rtol=1e-4, atol=1e-4)
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


# What an SAE of others says of itself, and what it cannot be.


@pytest.mark.parametrize("architecture, config", CASES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_weight_that_is_no_number_is_refused_in_whatever_tensor(tmp_path, architecture, config, value):
    """One that no figure seems to need, too, and one that float32 has no room for."""
    for name in (*weights_of(architecture), "unused"):
        weights = {**weights_of(architecture), "unused": np.zeros((2, 2), np.float32)}
        weights[name] = weights[name].astype(np.float64)
        weights[name].reshape(-1)[-1:] = value
        with pytest.raises(RunError, match=rf"1 values of {name} in .*sae_weights.safetensors are NaN or infinite"):
            load_foreign(write(tmp_path / name, architecture, weights, **config))


def test_weights_that_overflow_as_they_are_folded_are_refused(tmp_path):
    weights = weights_of("gated")
    weights["r_mag"][2] = 1e4
    with pytest.raises(RunError, match=r"1 values of exp\(r_mag\) in .* leave float32's range"):
        load_foreign(write(tmp_path, "gated", weights))


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": ["topk"]},
        {"architecture": None},
        {"metadata": {"hook_name": 5}},
        {"metadata": {"hook_name": ["a"]}},
        {"metadata": [1]},
        {"metadata": "text"},
        {"architecture": "topk", "k": float("inf")},
        {"architecture": "topk", "k": float("nan")},
        {"architecture": "topk", "k": -3},
        {"architecture": "topk", "k": True},
        {"architecture": "topk", "k": "3"},
        {"architecture": "topk", "k": 10**30},
        {"activation_fn_str": "topk", "activation_fn_kwargs": [1]},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": []}},
        {"activation_fn_str": ["topk"]},
        {"d_in": "wide"},
        {"d_in": D_MODEL + 1},
        {"d_sae": 10**12},
        {"d_sae": 0},
        {"apply_b_dec_to_input": "no"},
        {"normalize_activations": ["none"]},
        {"prepend_bos": 1.5},
        {"seqpos_slice": "all"},
        {"seqpos_slice": [1, 2, 0]},
        {"seqpos_slice": [1, 2, 3, 4]},
        {"seqpos_slice": ["a"]},
    ],
)
def test_nonsense_in_a_config_is_one_line_that_names_the_file(tmp_path, config):
    with pytest.raises(RunError, match=r"cfg\.json") as caught:
        load_foreign(write(tmp_path, "standard", weights_of("standard"), **config))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text", [b"", b"[" * 100_000, b"[]", b"null", b'"text"', b"\xff\xfe{}", bytes(40), b"<html>", b"1" * 5000]
)
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (write(tmp_path, "standard") / "cfg.json").write_bytes(text)
    with pytest.raises(RunError, match=r"cfg\.json .* It is no SAE's config in SAELens' layout"):
        load_foreign(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:0],
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: (10**15).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b"F32", b"F99"),
    ],
)  # fmt: skip
def test_damaged_weights_are_named(tmp_path, change):
    file = write(tmp_path, "standard") / "sae_weights.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RunError, match=r"sae_weights\.safetensors does not hold the weights"):
        load_foreign(tmp_path)


@pytest.mark.parametrize("name, form", OTHER_FORMATS.items())
@pytest.mark.parametrize("below", [False, True])
def test_folders_of_other_libraries_are_named_for_what_they_are(tmp_path, name, form, below):
    """And nothing of them is loaded: ae.pt is a pickle, which may run code."""
    place = tmp_path / "theirs" / "layers.4" if below else tmp_path / "theirs"
    place.mkdir(parents=True)
    (place / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (place / "config.json").write_text("{}")
    with pytest.raises(RunError, match=re.escape(f"theirs is an SAE in {form}, which is not read: convert it")):
        evaluable(tmp_path, [])


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
def test_half_a_folder_is_named_for_what_it_lacks(tmp_path, missing):
    (write(tmp_path / "theirs", "standard") / missing).unlink()
    with pytest.raises(RunError, match=f"theirs has .* but no {missing}: copy the whole folder"):
        evaluable(tmp_path, ["theirs"])


def recipe_with(prepend_bos: bool, model: str = "EleutherAI/pythia-70m-deduped") -> Recipe:
    return Recipe(
        model=ModelRecipe(name=model, revision="1"),
        corpus=CorpusRecipe(name="corpus", revision="1"),
        sequences=SequenceRecipe(length=128, prepend_bos=prepend_bos),
        hooks=(HookRecipe(requested="h", canonical="h", d_model=D_MODEL),),
        n_tokens=1,
    )


@pytest.mark.parametrize("says", [None, False, True])
@pytest.mark.parametrize("has", [False, True])
def test_prepend_bos_is_compared_with_the_stores(says, has):
    result = foreign_differences(recipe_with(has), {"prepend_bos": says})
    assert len(result) == (says is not None and says != has)
    assert all(line.startswith(f"prepend_bos={str(says).lower()} ") for line in result)


@pytest.mark.parametrize(
    "positions, skip_first, differs",
    [
        (None, None, False),
        ([None], None, False),
        ([None, None], 0, False),
        ([4, None], None, False),
        ([4, None], 4, False),
        ([4, None], 2, True),
        ([4, None], 0, True),
        ([0, 64], None, True),
        ([64], None, True),
        ([1, None, 2], None, True),
        ([-3, None], None, True),
    ],
)
def test_seqpos_slice_is_compared_with_what_is_counted(positions, skip_first, differs):
    result = foreign_differences(recipe_with(False), {"seqpos_slice": positions}, skip_first)
    assert len(result) == differs
    assert all(line.startswith(f"seqpos_slice={positions} ") for line in result)


@pytest.mark.parametrize(
    "name, differs", [("pythia-70m-deduped", False), ("EleutherAI/pythia-70m-deduped", False), ("gpt2-small", True)]
)
def test_the_model_is_compared_with_the_stores(name, differs):
    assert len(foreign_differences(recipe_with(False), {"model_name": name})) == differs


@pytest.mark.slow
def test_differences_are_said_and_kept_and_positions_left_out(tmp_path):
    import toy_eval as toy

    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    path = toy.make_run(tmp_path / "runs", "theirs", toy.make_sae(), store)
    (path / "tcsae.json").unlink()
    config = json.loads((path / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": toy.HOOK, "prepend_bos": True, "seqpos_slice": [3, None]}
    (path / "cfg.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path / "runs"), "eval"])
    assert done.exit_code == 0, done.stderr
    said = "cfg.json says prepend_bos=true in its training, but the store has no BOS"
    assert f"theirs: {said}" in " ".join(done.stderr.split())
    (one,) = [json.loads((path / "eval.json").read_text())]
    assert one["options"]["skip_first"] == 3
    assert [line.split(" ")[0] for line in one["differences"]] == ["prepend_bos=true"]
