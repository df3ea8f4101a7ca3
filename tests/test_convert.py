"""Promise: an SAE converted computes what it did, or says why not; a foreign one can be trained on."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tcsae
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.layout import SaeMetadata
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.saelens import GatedAutoencoder

HOOK = "blocks.2.hook_resid_post"
X = torch.randn(60, 16, generator=torch.Generator().manual_seed(3))


def sae_of(activation: str, unit: bool = False, kind: type = SparseAutoencoder) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = kind(SaeConfig(d_model=16, d_sae=48, k=4, activation=activation))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if sae.threshold is not None:
        sae.threshold.data.fill_(0.3)
    if unit:
        sae.W_dec.data.div_(sae.W_dec.norm(dim=1, keepdim=True))
    sae.metadata = SaeMetadata(hook=HOOK, form="saelens")
    return sae.requires_grad_(False).eval()


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk", "gated"])
@torch.no_grad()
def test_folded_norms_leave_the_reconstruction(activation):
    gated = activation == "gated"
    sae = sae_of("relu" if gated else activation, kind=GatedAutoencoder if gated else SparseAutoencoder)
    folded = tcsae.fold_decoder_norms(sae)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(48))
    torch.testing.assert_close(folded(X), sae(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.encode(X), sae.encode(X) * sae.W_dec.norm(dim=1), rtol=1e-4, atol=1e-4)
    assert (folded.encode(X) > 0).any() and folded.metadata.hook == HOOK


def test_norms_that_cannot_be_folded():
    with pytest.raises(tcsae.ConfigError, match="topk SAE with decoder rows of norm .* would select other latents"):
        tcsae.fold_decoder_norms(sae_of("topk"))
    with pytest.raises(tcsae.ConfigError, match="gelu"):
        tcsae.fold_decoder_norms(sae_of("gelu"))
    unit = sae_of("topk", unit=True)
    torch.testing.assert_close(tcsae.fold_decoder_norms(unit).encode(X), unit.encode(X))


@pytest.mark.parametrize("k", [None, 2.5, 7])
@torch.no_grad()
def test_a_threshold_from_the_store_keeps_l0(tiny_store, k):
    store, sae = tcsae.open_store(tiny_store), sae_of("topk")
    jump = tcsae.to_jumprelu(sae, store, k=k, n_tokens=10**6)
    assert jump.config.activation == "jumprelu" and jump.metadata.hook == HOOK
    assert len(set(jump.threshold.tolist())) == 1
    x = torch.cat([torch.from_numpy(one.activations[HOOK][1:]) for one in store.train])
    assert float((jump.encode(x) > 0).sum(1).float().mean()) == pytest.approx(k or 4, abs=0.01)
    above = jump.encode(x) > 0
    torch.testing.assert_close(jump.encode(x)[above], sae.pre_activations(x)[above])


DATA = {"skip_first": 0, "exclude_tokens": [], "positions": [], "max_norm": None}


@torch.no_grad()
def test_single_vectors_have_a_threshold_too(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 1, 16)).astype(np.float32)
    with tcsae.create_store(str(tmp_path / "a.zarr"), hooks={HOOK: 16}, sequence_length=1) as made:
        for split in ("train", "eval"):
            made.append(split, {HOOK: x})
        store = made.seal()
    sae = sae_of("topk")
    with pytest.raises(
        tcsae.StoreError, match="no train token counts, from 1 on, .* Give the store that it was trained"
    ):
        tcsae.to_jumprelu(sae, store)
    sae.metadata = SaeMetadata(hook=HOOK, record={"train": {"data": DATA}})
    found = tcsae.to_jumprelu(sae, store).encode(torch.from_numpy(x[:, 0]))
    assert float((found > 0).sum(1).float().mean()) == pytest.approx(4, abs=0.05)


def test_what_has_no_threshold_is_refused(tiny_store):
    store = tcsae.open_store(tiny_store)
    assert torch.equal(tcsae.to_jumprelu(sae_of("batchtopk"), store).threshold, sae_of("batchtopk").threshold)
    for sae, settings, message in (
        (sae_of("relu"), {}, "sae.activation='relu' selects no k latents"),
        (sae_of("topk"), {"k": 49}, "k=49: must lie in 0..48"),
        (SparseAutoencoder(SaeConfig(d_model=9, d_sae=48)), {"hook": HOOK}, "16 wide; the SAE reads 9"),
    ):
        with pytest.raises(tcsae.ConfigError, match=message):
            tcsae.to_jumprelu(sae, store, **settings)


@pytest.fixture
def command(tiny_store, tmp_path):
    def run(*arguments: str):
        return CliRunner().invoke(cli, ["--store", tiny_store, "--runs", str(tmp_path), *arguments], prog_name="tcsae")

    return run


SMALL = {"sae.d_sae": 48, "sae.k": 4, "data.n_segments": 4, "data.hook": HOOK, "log_every": 1}


def test_the_command(command, tiny_store, tmp_path):
    run = tcsae.train(tiny_store, tmp_path, preset="topk", set=SMALL, steps=3)[0]
    name = f"{run.name}-jumprelu"
    for arguments, message in (
        (["--to", "jumprelu"], ""),
        (["--run", run.name, "--to", "jumprelu"], f"{name} is there already"),
        (["--run", run.name, "--to", "unit-decoder", "--k", "3"], "--k 3 is of --to jumprelu alone"),
        (["--to", "jumprelu"], "has 2 runs. Name one"),
    ):
        done = command("convert", *arguments)
        assert done.exit_code == (1 if message else 0), done.output
        assert message in re.sub(r"\s+", " ", done.output)
    record = json.loads((tmp_path / name / "tcsae.json").read_text())
    assert (record["name"], record["converted"]) == (name, {"from": run.name, "to": "jumprelu"})
    done = command("eval", "--run", name, "--no-temporal")
    assert done.exit_code == 0 and name in done.output


@pytest.mark.parametrize("unit", [True, False])
def test_training_from_a_foreign_sae(tiny_store, tmp_path, unit):
    sae_of("jumprelu", unit).save(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tcsae.json").exists()
    settings = SMALL | {"sae.k": 32, "sparsity.l0": 0, "optimizer.lr": 0}

    def train(**more):
        options = {"preset": "jumprelu", "init_from": "theirs", "steps": 1} | more
        return tcsae.train(tiny_store, tmp_path, set=settings | {"optimizer.lr": 1e-12}, **options)[0]

    if unit:
        torch.testing.assert_close(train().sae(X), tcsae.load_sae(tmp_path / "theirs")(X), rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(tcsae.RunError, match="decoder rows of norm .* Set optimizer.unit_decoder=false, or fold them"):
        train()
    settings["optimizer.unit_decoder"] = False
    torch.testing.assert_close(train().sae(X), tcsae.load_sae(tmp_path / "theirs")(X), rtol=1e-3, atol=1e-3)


def test_a_foreign_sae_that_does_not_fit_says_what_to_set(tiny_store, tmp_path):
    sae_of("jumprelu", True).save(tmp_path / "theirs")
    settings = {key: value for key, value in SMALL.items() if key != "sae.d_sae"}
    with pytest.raises(tcsae.RunError, match="Give --set sae.activation=jumprelu --set sae.d_sae=48 --set sae.k=32"):
        tcsae.train(tiny_store, tmp_path, preset="topk", set=settings, init_from="theirs")
    sae_of("relu", True, GatedAutoencoder).save(tmp_path / "gated")
    settings = SMALL | {"sae.k": 32}
    with pytest.raises(tcsae.RunError, match="gated is a GatedAutoencoder, which is not trained here"):
        tcsae.train(tiny_store, tmp_path, preset="relu-l1", set=settings, init_from="gated")


@pytest.mark.slow
def test_a_text_by_the_command(command, tiny_store, tiny_lm, tmp_path):
    run = tcsae.train(tiny_store, tmp_path, preset="topk", set=SMALL, steps=3)[0]
    done = command("feature", "--text", "the model reads each token", "--model", str(tiny_lm))
    assert done.exit_code == 0, done.output
    assert done.output.count("latent ") == 5 and "⟦" in done.output
    latent = done.output.split()[1].rstrip(",")
    one = command("feature", "--run", run.name, "--id", latent, "--text", "the model reads", "--model", str(tiny_lm))
    assert one.output.count("latent ") == 1
    shown = command("feature", "--id", latent)
    assert shown.exit_code == 0 and f"Latent {latent}" in shown.output
    for arguments, code, message in (
        ([], 2, "Missing option '--id' (or '--text')"),
        (["--text", "x"], 1, "Where it is now, say with --model"),
        (["--text", "x", "--model", "embedded"], 1, "Give that model: --model"),
    ):
        done = command("feature", *arguments)
        assert done.exit_code == code, done.output
        assert message in re.sub(r"\s+", " ", done.output)
