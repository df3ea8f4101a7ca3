"""Promise: a persistent SAE's states are those of its recurrence, each sequence's alone, with their exact gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from toy_interrupted import check_goes_on

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.persistent import PersistentAutoencoder, TimeOrder, run_states
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.sae.whole_sequences import read_out

D, D_SAE, K = 6, 24, 3


def make_sae(seed: int = 0) -> PersistentAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    sae = PersistentAutoencoder(SaeConfig(d_model=D, d_sae=D_SAE, k=K, predictor="decay")).double()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return sae.eval()


def activations(n: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_the_book(sae: PersistentAutoencoder, sequence: torch.Tensor) -> torch.Tensor:
    """h of every token of one sequence, by the equation, with autograd's gradients."""
    lam, h, states = sae.decay_logit.sigmoid(), torch.zeros(D_SAE, dtype=torch.float64), []
    for x in sequence:
        pre = F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        top = pre.topk(K).indices
        a = torch.zeros_like(pre).scatter(0, top, pre[top])
        h = lam * h + (1 - lam) * a
        states.append(h)
    return torch.stack(states)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(0, 3))
def test_states_reconstructions_and_gradients_are_the_equations(lengths, seed):
    sae, x = make_sae(seed), activations(sum(lengths))
    h = torch.cat([by_the_book(sae, one) for one in x.split(lengths)])
    x_hat = h @ sae.W_dec + sae.b_dec
    result, novel, predicted = read_out(sae, x, np.array(lengths))
    torch.testing.assert_close(result, x_hat.detach())
    torch.testing.assert_close(novel.dense() + predicted, h.detach())
    torch.testing.assert_close(novel.dense(), sae.encode(x).detach())
    torch.testing.assert_close(novel.dense(), sae.encode_sparse(x).dense().detach())
    with torch.no_grad():
        alone = torch.cat([sae(one[None])[0] for one in x.split(lengths)])
    torch.testing.assert_close(result, alone)
    weights = torch.randn(x.shape, dtype=torch.float64)
    expected = torch.autograd.grad((x_hat * weights).sum(), list(sae.parameters()))
    encoded, trained = sae.train_pass(x, np.array(lengths))
    torch.testing.assert_close(trained, x_hat)
    torch.testing.assert_close(encoded.code.dense(), novel.dense())
    ours = torch.autograd.grad((trained * weights).sum(), list(sae.parameters()))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_recurrence():
    order = TimeOrder(np.array([3, 0, 5, 1]), torch.device("cpu"))
    code = SparseCode(torch.zeros(18), torch.arange(18) % 4, torch.arange(0, 19, 2), 4)

    def states(values, decay):
        return run_states(code.with_values(values), decay, order)[order.row]

    values, decay = torch.randn(18).double().requires_grad_(), torch.rand(4).double().requires_grad_()
    assert torch.autograd.gradcheck(states, (values, decay))


def test_nothing_in_nothing_out():
    x_hat, novel, predicted = read_out(make_sae(), activations(0), np.array([], np.int64))
    assert (x_hat.shape, novel.n_tokens, predicted.shape) == ((0, D), 0, (0, D_SAE))


def test_without_memory_it_is_a_plain_sae():
    sae, plain = make_sae(), SparseAutoencoder(SaeConfig(d_model=D, d_sae=D_SAE, k=K)).double()
    weights = dict(sae.state_dict())
    plain.load_state_dict({name: tensor for name, tensor in weights.items() if name != "decay_logit"})
    sae.decay_logit.data.fill_(-1000)  # a sigmoid of 0
    x = activations(12)
    x_hat, novel, predicted = read_out(sae, x, np.array([5, 7]))
    with torch.no_grad():
        torch.testing.assert_close(x_hat, plain(x))
        torch.testing.assert_close(novel.dense(), plain.encode(x), rtol=0, atol=0)
    assert not predicted.any()


def test_the_past_alone_is_carried():
    sae, x = make_sae(), activations(9)
    moved = x.clone()
    moved[6] += 1
    (_, _, one), (_, _, other) = (read_out(sae, each, np.array([9])) for each in (x, moved))
    assert torch.equal(one[:7], other[:7])
    assert (one[7] - other[7]).abs().max() > 0.01


@pytest.mark.parametrize(
    "chosen, words",
    [
        ({"activation": "relu"}, "sae.predictor='decay' with sae.activation='relu'"),
        ({"window": 2}, "sae.predictor='decay' with sae.window=2"),
        ({"groups": (0.5, 0.5)}, "sae.predictor='decay' with sae.groups"),
        ({"layer_norm": "in"}, "sae.predictor='decay' with sae.layer_norm"),
    ],
)
def test_what_it_is_not_for_is_refused(chosen, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        SaeConfig(**{"d_model": D, "d_sae": D_SAE, "k": K, "predictor": "decay"} | chosen)


LENGTH = 10
SMALL = ["sae.d_sae=24", "sae.k=4", "data.n_segments=8", "data.segment_length=9", "log_every=2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Slow activations: each token is three quarters of the one before."""
    path = tmp_path_factory.mktemp("persistent") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as new:
        for split, n in (("train", 120), ("eval", 20)):
            x, lengths = 5 * rng.normal(size=(n, LENGTH, D)).astype("f4"), rng.integers(2, LENGTH + 1, n)
            for t in range(1, LENGTH):
                x[:, t] = 0.75 * x[:, t - 1] + 0.25 * x[:, t]
            new.append(split, {"h": x}, lengths=lengths)
    return str(path)


def command(store: str, runs: Path, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store, "--runs", str(runs), *arguments])


@pytest.mark.slow
def test_it_is_trained_saved_evaluated_and_refused_an_export(store, tmp_path):
    chosen = [f"--set={one}" for one in (*SMALL, "steps=100")]
    done = command(store, tmp_path, "train", "--preset=persistent", *chosen, "eval")
    assert done.exit_code == 0, done.output
    (folder,) = tmp_path.glob("persistent-*")
    losses = [json.loads(line)["reconstruction"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    sae = tcsae.load_sae(folder)
    assert isinstance(sae, PersistentAutoencoder) and sae.decay.std() > 0
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "topk-persistent"
    metrics = json.loads((folder / "eval.json").read_text())["metrics"]
    assert metrics["l0_total"] >= metrics["l0_predicted"] > 0 and metrics["l0"] <= 4
    split = tcsae.open_store(store).eval
    x = [torch.from_numpy(one[1:length]) for one, length in zip(split.read("h", 0, 20), split.lengths, strict=True)]
    with torch.no_grad():
        error = sum(((sae(one[None])[0] - one) ** 2).sum() for one in x)
    assert metrics["mse"] * sum(map(len, x)) == pytest.approx(float(error), rel=1e-4)
    export = command(store, tmp_path, "export", f"--run={folder.name}", "--to=dictionary_learning")
    assert export.exit_code == 1 and "has sae.predictor=decay, which has no form in" in export.stderr


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same(store, tmp_path, monkeypatch):
    check_goes_on("persistent", SMALL, lambda runs, *more: command(store, runs, "train", *more), tmp_path, monkeypatch)


@pytest.mark.parametrize("value", ["0", "1", "nan"])
def test_a_first_decay_that_is_none_is_one_line(store, tmp_path, value):
    done = command(store, tmp_path, "train", "--preset=persistent", f"--set=init.decay={value}")
    assert done.exit_code == 1 and "init.decay=" in done.stderr and "must lie between 0 and 1" in done.stderr


def test_a_state_leaves_no_number_below_the_normal_range():
    """Matrix products with such numbers take five times as long."""
    sae = make_sae().float()
    sae.decay_logit.data.fill_(-3)
    _, novel, predicted = read_out(sae, activations(200).float(), np.array([200]))
    states = (novel.dense() + predicted).abs()
    assert states[states > 0].min() > torch.finfo(torch.float32).tiny
    assert (predicted == 0).any() and predicted[1:].any()
