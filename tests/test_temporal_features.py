"""Promise: temporal feature analysis infers as SAELens' module does, each sequence alone, without a later token."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_interrupted import check_goes_on

import tcsae
from tcsae.evaluate.measures.core import Output, token_predictions
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.sae.temporal_features import TemporalFeatureAutoencoder
from tcsae.shared.sae.whole_sequences import read_out

D, F, K = 6, 24, 3
GOLDEN = Path(__file__).parent / "golden" / "peers_tfa.safetensors"
"""Of tests/bench/peers_tfa.py."""


def make_tfa(predictor: str = "attention", **settings) -> TemporalFeatureAutoencoder:
    shape = {"n_heads": 2, "n_layers": 2, "bottleneck": 2} | settings
    sae = TemporalFeatureAutoencoder(SaeConfig(d_model=D, d_sae=F, k=K, predictor=predictor, **shape), 0.7)
    sae.draw(torch.Generator().manual_seed(0))
    return sae.eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(GOLDEN)


def test_sae_lens_agrees_on_its_weights(golden):
    sae = make_tfa()
    sae.load_state_dict({name[8:]: tensor for name, tensor in golden.items() if name.startswith("weights.")})
    x, lengths = golden["x"], np.full(4, 9)
    with torch.no_grad():
        torch.testing.assert_close(sae(x), golden["x_hat"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.encode(x), golden["novel"], atol=1e-5, rtol=1e-5)
    x_hat, novel, predicted = read_out(sae, x.flatten(0, 1), lengths)
    torch.testing.assert_close(x_hat, golden["x_hat"].flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(novel.dense(), golden["novel"].flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted, golden["predicted"].flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.sampled_from(["attention", "past"]))
def test_sequences_of_any_length_are_as_each_alone(lengths, predictor):
    sae = make_tfa(predictor)
    x = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(1))
    x_hat, novel, predicted = read_out(sae, x, np.array(lengths))
    with torch.no_grad():
        alone = torch.cat([sae(one[None])[0] for one in x.split(lengths)])
        codes = torch.cat([sae.encode(one[None])[0] for one in x.split(lengths)])
    torch.testing.assert_close(x_hat, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(novel.dense(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        x_hat, ((novel.dense() + predicted) @ sae.W_dec.detach() + sae.b_dec.detach()) / 0.7, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("predictor", ["attention", "past"])
def test_what_comes_later_changes_nothing_before(predictor):
    sae = make_tfa(predictor)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    moved = x.clone()
    moved[6] += 1
    (_, _, one), (_, _, other) = (read_out(sae, each, np.array([9])) for each in (x, moved))
    torch.testing.assert_close(one[:6], other[:6])
    at_6 = (one[6] - other[6]).abs().max()
    assert at_6 == 0 if predictor == "past" else at_6 > 0.01  # the published form reads the token it predicts
    assert (one[7] - other[7]).abs().max() > 0


def test_l0_of_both_codes():
    novel = SparseCode(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3]), 4)
    predicted = torch.tensor([[0.5, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert token_predictions(Output(torch.zeros(2, D), novel, predicted)).tolist() == [[2, 0], [2, 1]]
    assert token_predictions(Output(torch.zeros(2, D), novel)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_heads": 0}, "sae.n_heads=0: must be at least 1"),
        ({"bottleneck": 5}, "sae.d_sae=24 is no multiple of sae.n_heads=2 times sae.bottleneck=5"),
        ({"activation": "relu"}, "sae.predictor='attention' with sae.activation='relu'"),
        ({"window": 2}, "sae.predictor='attention' with sae.window=2"),
        ({"groups": (0.5, 0.5)}, "with sae.groups"),
    ],
)
def test_what_it_is_not_for_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make_tfa(**settings)


LENGTH = 10
SMALL = ["sae.d_sae=24", "sae.k=4", "sae.n_heads=2", "data.n_segments=8", "data.segment_length=9", "log_every=2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tfa") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as new:
        for split, n in (("train", 120), ("eval", 20)):
            x, lengths = 5 * rng.normal(size=(n, LENGTH, D)).astype("f4"), rng.integers(2, LENGTH + 1, n)
            new.append(split, {"h": x}, lengths=lengths)
    return str(path)


def command(store: str, runs: Path, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store, "--runs", str(runs), *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tfa", "tfa-past"])
def test_it_is_trained_beside_others_saved_and_evaluated(store, tmp_path, name):
    settings = [f"--set={one}" for one in (*SMALL, "steps=200")]
    done = command(store, tmp_path, "train", f"--preset={name}", *settings, "eval")
    assert done.exit_code == 0, done.output
    (folder,) = tmp_path.glob(f"{name}-*")
    losses = [json.loads(line)["reconstruction"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    sae = tcsae.load_sae(folder)
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == {"tfa": "temporal", "tfa-past": "temporal-past"}[name]
    assert sae.input_scale == config["activation_normalization_factor"] == pytest.approx(0.2, rel=0.05)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["metrics"]["l0_total"] >= evaluation["metrics"]["l0_predicted"] > 0
    assert evaluation["metrics"]["l0"] <= 4
    exported = command(store, tmp_path, "export", "--to", "saelens", "--run", folder.name)
    if name == "tfa":  # SAELens' own layout, as the run's folder is
        assert exported.exit_code == 0, exported.output
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (folder / "export-saelens" / file).read_bytes() == (folder / file).read_bytes()
    else:
        assert "has sae.predictor=past, which has no form in saelens" in exported.stderr
    assert {"l0_predicted", "l0_total"} <= evaluation["definitions"].keys()
    split = tcsae.open_store(store).eval
    x = [torch.from_numpy(one[1:length]) for one, length in zip(split.read("h", 0, 20), split.lengths, strict=True)]
    with torch.no_grad():
        error = sum(((sae(one[None])[0] - one) ** 2).sum() for one in x)
    assert evaluation["metrics"]["mse"] * evaluation["n_tokens"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same(store, tmp_path, monkeypatch):
    check_goes_on("tfa", SMALL, lambda runs, *more: command(store, runs, "train", *more), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["optimizer.unit_decoder=true"], "optimizer.unit_decoder=True with sae.predictor='attention'"),
        (["dead.aux_weight=0.1"], "set dead.aux_weight=0"),
        (["init.weights=xavier"], "set init.weights=transpose"),
        (["sae.predictor=attn"], "sae.predictor"),
    ],
)
def test_settings_that_it_cannot_have_are_one_line(store, tmp_path, settings, words):
    every = [f"--set={one}" for one in (*SMALL, *settings)]
    done = command(store, tmp_path, "train", "--preset=tfa", *every)
    assert done.exit_code == 1
    assert words in done.stderr
