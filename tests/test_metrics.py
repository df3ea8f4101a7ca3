"""Promise: every figure is what its definition says, whatever the batches and their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.evaluate.baselines import ConstantOutput
from tcsae.evaluate.metrics import (
    Activity,
    Output,
    Sums,
    dense_activity,
    figures,
    sparse_activity,
    sum_tokens,
    widen,
)
from tcsae.shared.codes import positive_code, topk_code

D_MODEL, D_SAE = 6, 9


def sums(x: torch.Tensor, x_hat: torch.Tensor, f: torch.Tensor) -> Sums:
    return sum_tokens(widen(x), Output(x_hat, dense_activity(f)))


def none_of(like: Sums) -> Sums:
    return Sums(0, like.x * 0, like.columns * 0, like.firings * 0)


def example(seed: int, n: int, offset: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a rough reconstruction of it, and a code with zeros and negative values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_MODEL)) * 3 + offset
    x_hat = 0.8 * x + 0.3 * rng.normal(size=(n, D_MODEL))
    f = rng.normal(size=(n, D_SAE)) * (rng.random((n, D_SAE)) < 0.3)
    f[:, 0] = -np.abs(f[:, 0])  # a latent that never fires
    return tuple(torch.from_numpy(one.astype(np.float32)) for one in (x, x_hat, f))


def naive(x: torch.Tensor, x_hat: torch.Tensor, f: torch.Tensor) -> dict[str, float]:
    """Token by token, straight from the definitions, all of it counted."""
    x, x_hat, f = (one.numpy().astype(np.float64) for one in (x, x_hat, f))
    mean = sum(x) / len(x)
    rows = [(a, b, np.sqrt(a @ a), np.sqrt(b @ b)) for a, b in zip(x, x_hat, strict=True)]
    error = sum(sum((a - b) ** 2) for a, b, _, _ in rows)
    ev = 1 - error / sum(sum((a - mean) ** 2) for a in x)
    return {
        "explained_variance": ev,
        "explained_variance_all_positions": ev,
        "mse": error / len(x),
        "cossim": np.mean([a @ b / (m * n) for a, b, m, n in rows]),
        "l2_norm_in": np.mean([m for _, _, m, _ in rows]),
        "l2_norm_out": np.mean([n for _, _, _, n in rows]),
        "l2_ratio": np.mean([n / m for _, _, m, n in rows]),
        "relative_reconstruction_bias": sum(b @ b for _, b, _, _ in rows) / sum(a @ b for a, b, _, _ in rows),
        "l0": np.mean([sum(1 for value in row if value > 0) for row in f]),
        "l1": np.mean([sum(abs(value) for value in row) for row in f]),
        "dead_fraction": np.mean([not any(value > 0 for value in column) for column in f.T]),
    }


@given(st.integers(0, 10_000), st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_figures_follow_their_definitions(seed, n):
    one = sums(*example(seed, n))
    assert figures(one, none_of(one)) == pytest.approx(naive(*example(seed, n)), rel=1e-9)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_batches_and_their_order_change_nothing(data):
    n = data.draw(st.integers(2, 40))
    arrays = example(data.draw(st.integers(0, 10_000)), n, offset=100.0)
    whole = sums(*arrays)
    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = np.split(np.array(order), cuts)  # empty parts too
    pieces = [sums(*(one[torch.from_numpy(part).long()] for one in arrays)) for part in parts]
    together = sum(pieces[1:], start=pieces[0])
    assert figures(together, none_of(whole)) == pytest.approx(figures(whole, none_of(whole)), rel=1e-6)
    assert torch.equal(together.firings, whole.firings)


def test_skipped_positions_enter_one_figure_only():
    arrays = example(3, 30)
    counted, skipped = sums(*(one[5:] for one in arrays)), sums(*(100 * one[:5] for one in arrays))
    found, without = figures(counted, skipped), figures(counted, none_of(skipped))
    all_positions = [torch.cat([one[5:], 100 * one[:5]]) for one in arrays]
    assert found["explained_variance_all_positions"] == pytest.approx(naive(*all_positions)["explained_variance"])
    assert found["explained_variance_all_positions"] != pytest.approx(found["explained_variance"], rel=1e-3)
    assert found | {"explained_variance_all_positions": 0} == without | {"explained_variance_all_positions": 0}


def test_a_perfect_reconstruction():
    x, _, f = example(0, 50)
    one = sums(x, x, f)
    expected = {"explained_variance": 1, "mse": 0, "cossim": 1, "l2_ratio": 1, "relative_reconstruction_bias": 1}
    assert {key: figures(one, none_of(one))[key] for key in expected} == pytest.approx(expected, abs=1e-12)


def test_baselines_in_closed_form():
    x, _, _ = example(1, 200, offset=2.0)
    mean = x.double().mean(0)
    variance = float((x.double() - mean).square().sum(1).mean())
    zero, average = (
        sum_tokens(widen(x), ConstantOutput(value)(x)) for value in (torch.zeros(D_MODEL), x.double().mean(0).float())
    )
    of_zero, of_mean = figures(zero, none_of(zero)), figures(average, none_of(average))
    assert of_zero["explained_variance"] == pytest.approx(-float(mean @ mean) / variance)
    assert of_zero["mse"] == pytest.approx(variance + float(mean @ mean))
    assert (of_zero["cossim"], of_zero["l2_ratio"], of_zero["l2_norm_out"], of_zero["l0"]) == (0, 0, 0, 0)
    assert (of_zero["relative_reconstruction_bias"], of_zero["dead_fraction"]) == (None, None)
    assert of_mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert of_mean["mse"] == pytest.approx(variance)
    assert of_mean["relative_reconstruction_bias"] == pytest.approx(1)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_scaling_moves_figures_as_they_are_defined(seed, factor):
    x, x_hat, f = (one.double() for one in example(seed, 25))
    one, scaled = sums(x, x_hat, f), sums(factor * x, factor * x_hat, f)
    before, after = figures(one, none_of(one)), figures(scaled, none_of(scaled))
    powers = dict.fromkeys(before, 0) | {"mse": 2, "l2_norm_in": 1, "l2_norm_out": 1}
    assert after == pytest.approx({key: value * factor ** powers[key] for key, value in before.items()}, rel=1e-9)


@given(st.integers(0, 10_000), st.floats(50, 1e3))
@settings(max_examples=30, deadline=None)
def test_shifting_moves_figures_as_they_are_defined(seed, shift):
    x, x_hat, f = (one.double() for one in example(seed, 25))
    one, shifted = sums(x, x_hat, f), sums(x + shift, x_hat + shift, f)
    before, after = figures(one, none_of(one)), figures(shifted, none_of(shifted))
    for key in ("explained_variance", "mse", "l0", "l1", "dead_fraction"):
        assert after[key] == pytest.approx(before[key], rel=1e-6), key
    assert before["cossim"] < after["cossim"] < 1, "uncentred: an offset common to x and xhat flatters it"
    assert after["l2_norm_in"] == pytest.approx(float((x + shift).norm(dim=1).mean()))


def test_undefined_figures_are_none():
    constant = torch.full((20, D_MODEL), 3.3)
    one = sums(constant, constant * 0.5, torch.zeros(20, D_SAE))
    found = figures(one, none_of(one))
    assert found["explained_variance"] is None
    assert (found["dead_fraction"], found["l0"]) == (1.0, 0.0)
    empty = sums(*(part[:0] for part in example(0, 5)))
    assert {key for key, value in figures(empty, empty).items() if value is not None} == {"dead_fraction"}


def test_a_token_of_zeros_counts_without_a_division():
    x, x_hat, f = example(0, 3)
    x[0], x_hat[1] = 0, 0
    one = sums(x, x_hat, f)
    found, norms = figures(one, none_of(one)), x_hat.norm(dim=1).double()
    cosine = float(x[2].double() @ x_hat[2].double()) / float(x[2].double().norm() * x_hat[2].double().norm())
    assert found["cossim"] == pytest.approx(cosine / 3)
    assert found["l2_ratio"] == pytest.approx(float(norms[0] + norms[2] / x[2].norm()) / 3, rel=1e-6)


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(1, D_SAE))
@settings(max_examples=30, deadline=None)
def test_sparse_and_dense_codes_count_the_same(seed, n, k):
    pre = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, D_SAE)).astype(np.float32))
    for code in (topk_code(pre, k), positive_code(pre.relu()), positive_code(torch.nn.functional.gelu(pre))):
        sparse, dense = sparse_activity(code), dense_activity(code.dense())
        assert torch.equal(sparse.active, dense.active)
        assert torch.equal(sparse.firings, dense.firings)
        torch.testing.assert_close(sparse.magnitude, dense.magnitude)
        assert isinstance(sparse, Activity)
