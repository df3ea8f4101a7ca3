"""Promise: an exported SAE gives the same codes and reconstructions by the other library's published formulas."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_sae, save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder

D_MODEL, D_SAE, K = 12, 40, 5
RECORD = {
    "name": "one",
    "hook": "blocks.4.hook_resid_post",
    "train": {"optimizer": {"lr": 2e-3}, "init_seed": 3},
    "steps": 7,
    "store": {"content": "c0ffee"},
    "libraries": {"tcsae": "0"},
}
METADATA = {"model_name": "toy", "hook_name": "blocks.4.hook_resid_post", "context_size": 32}


def make_run(runs: Path, activation: str, scale: float = 3.0, unit: bool = True, **settings) -> Path:
    """A finished run with random weights: unit decoder rows, biases that matter, an input scale folded in."""
    torch.manual_seed(1)
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, activation=activation, k=K, **settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True) * (1 if unit else 2))
        if activation == "batchtopk":
            sae.threshold.fill_(0.4)
        if activation == "jumprelu":
            sae.threshold.uniform_(0.1, 0.8)
        if sae.config.layer_norm == "none":
            sae.fold_scale(scale)
    path = runs / f"{activation}-run"
    path.mkdir(parents=True)
    save_sae(sae, path, RECORD, METADATA)
    return path


@pytest.fixture
def export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["--runs", "runs", "export", *arguments], prog_name="tcsae")


@pytest.fixture
def x():
    return torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(2))


def by_dictionary_learning(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and reconstruction by the formulas of dictionary_learning 0.1.0 (dictionary.py, trainers/*top_k.py)."""
    state = torch.load(folder / "ae.pt", weights_only=True)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    match trainer["dict_class"]:
        case "JumpReluAutoEncoder":
            pre = x @ state["W_enc"] + state["b_enc"]
            code = (pre * (pre > state["threshold"])).relu()
            return code, code @ state["W_dec"] + state["b_dec"]
        case "AutoEncoder":
            bias = state["bias"]
            code = ((x - bias) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
        case "AutoEncoderTopK":
            assert state["k"].item() == trainer["k"] and state["threshold"] == -1
            bias = state["b_dec"]
            post = ((x - bias) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
            top = post.topk(trainer["k"], sorted=False, dim=-1)
            code = torch.zeros_like(post).scatter_(-1, top.indices, top.values)
        case "BatchTopKSAE":
            assert state["k"].item() == trainer["k"] and state["threshold"].shape == ()
            bias = state["b_dec"]
            post = ((x - bias) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
            code = post * (post > state["threshold"])
    return code, code @ state["decoder.weight"].T + bias


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_dictionary_learning_gets_the_same_codes_and_reconstructions(export, tmp_path, x, activation):
    path = make_run(tmp_path / "runs", activation)
    done = export("--to", "dictionary_learning", "--run", path.name)
    assert done.exit_code == 0, done.output
    folder = path / "export-dictionary_learning"
    assert sorted(file.name for file in folder.iterdir()) == ["ae.pt", "config.json"]
    code, x_hat = by_dictionary_learning(folder, x)
    sae = load_sae(path)
    with torch.no_grad():
        expected = sae.encode(x)
        torch.testing.assert_close(code, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_hat, sae.decode(expected), rtol=1e-5, atol=1e-5)
    assert 0.02 < (code > 0).double().mean() < 0.98, "a code that is all or nothing would show little"


SHAPES = {
    "relu": {"bias": (12,), "encoder.weight": (40, 12), "encoder.bias": (40,), "decoder.weight": (12, 40)},
    "jumprelu": {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,), "threshold": (40,)},
    "topk": {
        "b_dec": (12,),
        "encoder.weight": (40, 12),
        "encoder.bias": (40,),
        "decoder.weight": (12, 40),
        "k": (),
        "threshold": (),
    },
}


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_tensors_are_exactly_those_that_a_strict_load_wants(export, tmp_path, activation):
    path = make_run(tmp_path / "runs", activation)
    export("--to", "dictionary_learning", "--run", path.name, "--out", "there")
    state = torch.load("there/ae.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES[activation.removeprefix("batch")]
    assert all(tensor.dtype == (torch.int32 if name == "k" else torch.float32) for name, tensor in state.items())


def test_config_says_where_the_sae_is_from(export, tmp_path):
    path = make_run(tmp_path / "runs", "topk")
    export("--to", "dictionary_learning", "--run", path.name)
    result = json.loads((path / "export-dictionary_learning" / "config.json").read_text())
    trainer = result["trainer"]
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["k"], trainer["layer"]) == (D_MODEL, D_SAE, K, 4)
    assert (trainer["trainer_class"], trainer["lm_name"], trainer["steps"]) == ("TopKTrainer", "toy", 7)
    assert result["buffer"]["ctx_len"] == 32
    assert result["tcsae"]["store"] == "c0ffee"


def by_sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and reconstruction by the formulas of sparsify 1.3.3 (sparse_coder.py, fused_encoder.py)."""
    state, config = (
        safetensors.torch.load_file(folder / "sae.safetensors"),
        json.loads((folder / "cfg.json").read_text()),
    )
    assert (config["activation"], config["d_in"], config["num_latents"]) == ("topk", D_MODEL, D_SAE)
    assert not any(config[name] for name in ("multi_topk", "skip_connection", "transcode", "normalize_decoder"))
    pre = torch.nn.functional.linear(x - state["b_dec"], state["encoder.weight"], state["encoder.bias"]).relu()
    top = pre.topk(config["k"], dim=-1, sorted=False)
    code = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    return code, code @ state["W_dec"] + state["b_dec"]


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_sparsify_gets_the_same_codes_and_reconstructions(export, tmp_path, x, activation):
    path = make_run(tmp_path / "runs", activation, unit=False)
    done = export("--to", "sparsify", "--run", path.name)
    assert done.exit_code == 0, done.output
    code, x_hat = by_sparsify(path / "export-sparsify", x)
    sae = load_sae(path)
    with torch.no_grad():
        torch.testing.assert_close(code, sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_hat, sae(x), rtol=1e-5, atol=1e-5)


def test_a_threshold_has_no_form_in_sparsify(export, tmp_path):
    path = make_run(tmp_path / "runs", "jumprelu")
    done = export("--to", "sparsify", "--run", path.name)
    assert done.exit_code == 1
    assert "has sae.activation=jumprelu, which has no form in sparsify. There is: topk, relu," in done.stderr


def test_saelens_gets_its_two_files_alone(export, tmp_path):
    path = make_run(tmp_path / "runs", "batchtopk")
    done = export("--to", "saelens", "--run", path.name, "--out", "there")
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in Path("there").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    config = json.loads(Path("there/cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", D_MODEL, D_SAE)
    ours = load_sae(path).tensors()
    theirs = safetensors.torch.load_file("there/sae_weights.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("to", ["dictionary_learning", "saelens"])
@pytest.mark.parametrize(
    "settings, said", [({"activation": "gelu"}, "activation=gelu"), ({"layer_norm": "in"}, "layer_norm=in")]
)
def test_what_has_no_form_there_is_refused(export, tmp_path, to, settings, said):
    path = make_run(tmp_path / "runs", **{"activation": "relu", **settings})
    done = export("--to", to, "--run", path.name)
    assert done.exit_code == 1
    there = f"There is: relu, topk, batchtopk, jumprelu, without a layer norm{', and TFA' * (to == 'saelens')}."
    assert done.stderr.splitlines() == [f"Error: {path.name} has sae.{said}, which has no form in {to}. {there}"]
    assert not (path / f"export-{to}").exists()


def test_a_relu_that_would_be_rescaled_on_loading_is_refused(export, tmp_path):
    path = make_run(tmp_path / "runs", "relu", unit=False)
    done = export("--to", "dictionary_learning", "--run", path.name)
    assert done.exit_code == 1
    assert "decoder rows of norm 0.5 to 0.5; dictionary_learning would rescale" in done.stderr
    assert export("--to", "saelens", "--run", path.name).exit_code == 0


def test_only_an_earlier_export_is_replaced(export, tmp_path):
    path = make_run(tmp_path / "runs", "topk")
    arguments = ("--to", "dictionary_learning", "--run", path.name, "--out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = export(*arguments, "mine")
    assert done.exit_code == 1
    assert "mine holds thesis.txt; an export goes into a new folder or over an earlier one." in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert "is a file" in export(*arguments, "mine/thesis.txt").stderr
    assert "cannot be written" in export(*arguments, "mine/thesis.txt/there").stderr
    assert export("--to", "saelens", "--run", path.name, "--out", str(path)).exit_code == 1, "the run's own folder"
    assert load_sae(path)

    assert export(*arguments, "there").exit_code == 0
    (tmp_path / "there" / "ae.pt").write_bytes(b"old")
    assert export(*arguments, "there").exit_code == 0
    assert torch.load("there/ae.pt", weights_only=True)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--to", "saelens", "--run", "topc-run"], 1, "Unknown run 'topc-run'. Did you mean 'topk-run'?"),
        (["--to", "keras", "--run", "topk-run"], 2, "'keras' is not one of 'dictionary_learning', 'saelens'"),
        (["--to", "saelens"], 2, "Missing option '--run'"),
        (["--run", "topk-run"], 2, "Missing option '--to'"),
    ],
)
def test_mistakes_are_one_line(export, tmp_path, arguments, code, message):
    make_run(tmp_path / "runs", "topk")
    done = export(*arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr


def test_an_unfinished_run_is_refused(export, tmp_path):
    path = make_run(tmp_path / "runs", "topk")
    (path / "tcsae.json").unlink()
    done = export("--to", "saelens", "--run", path.name)
    assert done.exit_code == 1
    assert "no trained SAE is there" in done.stderr


def test_help_shows_how(export):
    done = export("--help")
    assert done.exit_code == 0
    assert "tcsae export --to dictionary_learning --run topk" in done.output
    assert "have no form in the first three" in " ".join(done.output.split())
