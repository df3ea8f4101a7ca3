"""Promise: CONTRIBUTING.md's new loss, kind of SAE and measure work as they are written there."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tcsae
from tcsae.evaluate.measures.concentration import dense_latents
from tcsae.evaluate.measures.registry import MEASURES, Measure
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.sparse import positive_code
from tcsae.train.losses import TEMPORAL

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
WIDTH, LENGTH = 8, 12


def module_of(path: str) -> types.ModuleType:
    """The module that the page shows under this path."""
    (source,) = re.findall(rf"<!-- {re.escape(path)} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    name = f"walkthrough_{Path(path).stem}"
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    assert module.__doc__
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tcsae.Store:
    rng = np.random.default_rng(0)
    x = (rng.random((60, LENGTH, 20)) < 0.2) @ rng.normal(size=(20, WIDTH))
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH) as creation:
        creation.append("train", {"h": x.astype(np.float32)})
        creation.append("eval", {"h": x[:20].astype(np.float32)})
    return tcsae.open_store(path)


@pytest.fixture
def tcsae_command(store, tmp_path):
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path), *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    return run


SMALL = ("--set=sae.d_sae=32", "--set=sae.k=4", "--set=data.segment_length=6", "--set=log_every=1", "--steps=6")


def test_a_new_loss(monkeypatch, tcsae_command, tmp_path):
    term = module_of("train/losses/norm_change.py").norm_change
    assert '`"norm_change": norm_change`' in PAGE
    monkeypatch.setitem(TEMPORAL, "norm_change", term)
    options = ("--set=temporal.kind=norm_change", "--set=temporal.weight=0.001")
    assert " ".join(options).replace("--set=", "--set ") in PAGE
    tcsae_command("train", "--preset=topk", "--preset=relu-l1", *SMALL, *options)
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 6
        assert all(line["temporal"] > 0 for line in lines)


@pytest.mark.slow
def test_a_new_kind_of_sae(monkeypatch, tcsae_command, tmp_path):
    kind = module_of("shared/sae/halftopk.py").HALF_TOPK
    monkeypatch.setitem(KINDS, "halftopk", kind)
    tcsae_command("train", "--preset=temporal-topk", *SMALL, "--set=sae.activation=halftopk")
    assert "halftopk" in tcsae_command("eval")
    (folder,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "halftopk"
    sae = tcsae.load_sae(folder)
    with torch.no_grad():
        code = sae.encode(torch.randn(30, WIDTH))
    assert ((code > 0).unflatten(-1, (2, -1)).sum(-1) <= 2).all()
    assert (code > 0).any()


@pytest.mark.slow
def test_a_new_measure(monkeypatch, tcsae_command, tmp_path):
    silence = module_of("evaluate/measures/silence.py").Silence
    assert isinstance(silence(3), Measure)
    monkeypatch.setitem(MEASURES, "silence", silence)
    tcsae_command("train", "--preset=topk", *SMALL)
    assert "silent share: share of tokens at which no latent is on." in tcsae_command("eval", "--details")
    (file,) = tmp_path.glob("*/eval.json")
    assert 0 <= json.loads(file.read_text())["measures"]["silence"]["figures"]["silent_share"] <= 1


def test_concentration_of_codes_whose_figures_are_known():
    f = torch.zeros(200, 100)
    f[:, 0] = torch.arange(200) % 2 * 10.0  # on half of the time, variance 25
    f[:10, 1] = 2.0  # on 5%
    for code in (f, positive_code(f)):
        measure = MEASURES["concentration"](100)
        for start in (0, 90):
            rows = slice(start, 90 if start == 0 else 200)
            measure.add(f[rows] if code is f else positive_code(f[rows]))
        figures = measure.figures()
        variance = f.double().var(0, unbiased=False)
        assert figures["n_dense"] == 1
        assert figures["widest_share"] == pytest.approx(float(variance[0] / variance.sum()))
        assert figures["effective_latents"] == pytest.approx(float(variance.sum() ** 2 / variance.square().sum()))
    assert set(MEASURES["concentration"](4).figures().values()) == {None}


def test_dense_latents_whose_figures_are_known():
    """Two sides of one coordinate, each on at half of the tokens, another coordinate, and a latent that is rare."""
    sae = SparseAutoencoder(SaeConfig(d_model=4, d_sae=5, activation="topk", k=2))
    sae.W_dec.data = torch.tensor([[1, 0, 0, 0], [-1, 0.1, 0, 0], [0, 0, 2, 0], [0, -1, 0, 0], [0, 1, 0, 0]]).float()
    f = torch.zeros(400, 5)
    signed = torch.randn(400, generator=torch.Generator().manual_seed(0))
    f[:, 0], f[:, 1], f[:, 2] = signed.relu(), (-signed).relu(), torch.arange(400) % 2
    f[:9, 3] = 1.0
    firings = torch.stack([(f > 0).sum(0), (f > 0).sum(0)])
    for code in (f, positive_code(f)):
        figures = dense_latents(sae, firings, 400, code)["figures"]
        eigenvalues = np.linalg.eigvalsh(np.cov((f[:, :3] @ sae.W_dec[:3].detach()).double().T))
        assert (figures["antipodal_pairs"], figures["dense_antipodal"], figures["dense_l0"]) == (1, 2, 1.5)
        assert figures["dense_rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-5)
        assert 1 < figures["dense_rank"] < 2
    silent = dense_latents(sae, firings * 0, 400, None)["figures"]
    assert list(silent.values()) == [0, 0, 0.0, None]
