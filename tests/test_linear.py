"""Promise: the linear baselines find planted directions, and fold into one SAE that computes the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.sae.saelens import load_foreign
from tcsae.train.loader import SegmentLoader
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs
from tcsae.train.start.linear import fit_linear
from tcsae.train.trainer import Trainer

D, LENGTH, M = 12, 24, 2
SMALL = ("sae.d_sae=40", "sae.k=3", "steps=12", "data.n_segments=8", "data.segment_length=12", f"linear.n={M}")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(store, slow directions, wide ones): AR(1) signals along some rows of a basis that is not orthogonal, noise along
    the others, and a ramp over positions that is slower than any.
    """
    path, rng = tmp_path_factory.mktemp("store") / "a.zarr", np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0] + 0.2 * rng.normal(size=(D, D))
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as store:
        for split, n in (("train", 400), ("eval", 10)):
            z = rng.normal(size=(n, LENGTH, D))
            for t in range(1, LENGTH):
                z[:, t, :M] = 0.95 * z[:, t - 1, :M] + (1 - 0.95**2) ** 0.5 * z[:, t, :M]
            z[..., -M:] *= 5
            x = z @ basis + 3 * np.linspace(-1, 1, LENGTH)[:, None] * basis[M + 1] + 1.5
            store.append(split, {"h": x.astype("f4")}, lengths=rng.integers(3, LENGTH + 1, n))
    return tcsae.open_store(str(path)), np.linalg.inv(basis)[:, :M], basis[-M:].T


def make_config(kind: str, *more: str):
    return with_settings(preset("slow-linear", D), [*SMALL, f"linear.kind={kind}", *more])


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the principal angles between two column spaces."""
    qa, qb = (np.linalg.qr(one)[0] for one in (a, b))
    return float(np.linalg.svd(qa.T @ qb, compute_uv=False).min())


@pytest.mark.parametrize("kind", ["sfa", "pca"])
def test_the_planted_subspace_is_found(planted, kind):
    store, slow, wide = planted
    part = fit_linear(store, make_config(kind))
    assert least_cosine(part.W.double().numpy(), slow if kind == "sfa" else wide) > 0.98
    torch.testing.assert_close(part.R @ part.W, torch.eye(M), rtol=1e-4, atol=1e-4)
    rest = part.rest(torch.randn(30, D))
    torch.testing.assert_close((rest @ part.W), torch.zeros(30, M), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_folded_it_computes_what_both_parts_do(planted, activation):
    store = planted[0]
    config = make_config("sfa", f"sae.activation={activation}")
    loader = SegmentLoader(store, config.data)
    part = fit_linear(store, config)
    trainer = Trainer(config, loader.sample(2000), LENGTH, linear=part)
    for batch, _ in zip(loader, range(12), strict=False):
        result = trainer.step(batch)
        x = batch.x.clone()
    torch.testing.assert_close(result.x, x * trainer.scale)
    rest = replace_linear(trainer).finished_sae()
    whole = trainer.finished_sae()
    assert whole.config.d_sae == 40 + 2 * M
    s = (x - part.mu) @ part.W
    code, theirs = whole.encode(x), rest.encode(part.rest(x))
    torch.testing.assert_close(code[:, :M] - code[:, M : 2 * M], s, rtol=1e-3, atol=1e-4)
    assert ((code[:, : 2 * M] > 0).sum(1) == M).all()
    torch.testing.assert_close(code[:, 2 * M :], theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.decode(code), part.mu + s @ part.R + rest.decode(theirs), rtol=1e-3, atol=1e-3)


def replace_linear(trainer: Trainer) -> Trainer:
    """The same training state, of the rest alone."""
    alone = object.__new__(Trainer)
    alone.__dict__ |= trainer.__dict__ | {"linear": None}
    return alone


@pytest.mark.slow
def test_it_is_trained_saved_and_read_as_saelens_reads_it(planted, tmp_path):
    store = planted[0]
    runs = [Run(kind, "slow-linear", make_config(kind)) for kind in ("sfa", "pca")]
    plain = Run("plain", "batchtopk", replace(make_config("none")))
    train_runs(store, tmp_path, [*runs, plain])
    for run in runs:
        sae, theirs = tcsae.load_sae(tmp_path / run.name), load_foreign(tmp_path / run.name)
        x = torch.randn(50, D)
        assert sae.config.activation == "jumprelu"
        assert torch.equal(sae.encode(x), theirs.encode(x))
    line = (tmp_path / "sfa" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"l0": 5.0' in line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("sae.activation=topk",), "sae.activation='topk' has no such form. There is: batchtopk, jumprelu, relu"),
        (
            ("sae.groups=0.5,0.5", "group_weights=1,1"),
            "takes sae.layer_norm=none, one group and sae.window=1; they are",
        ),
        (
            ("temporal.kind=t-sae", "temporal.weight=1"),
            "temporal.kind='t-sae' picks single tokens: it takes sae.window=1",
        ),
        (("linear.n=0",), "linear.n=0: must be at least 1"),
        (("linear.kind=sfe",), "Unknown value 'sfe'. Did you mean 'sfa'?"),
    ],
)
def test_what_cannot_be_folded_is_refused(settings, line):
    with pytest.raises(ConfigError) as caught:
        make_config("sfa", *settings)
    assert line in str(caught.value)


def test_more_directions_than_there_are_are_refused(planted):
    with pytest.raises(ConfigError, match="linear.n=13: .* varies in 12 directions of 12. Lower it."):
        fit_linear(planted[0], make_config("sfa", "linear.n=13"))
