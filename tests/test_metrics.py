"""Promise: every figure is what its definition says, whatever the batches and their order."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.evaluate.baselines import ConstantOutput
from tcsae.evaluate.measures.core import (
    DEFINITIONS,
    Output,
    Sums,
    firing_counts,
    join_codes,
    sum_rows,
    token_activity,
    token_columns,
    widen,
)
from tcsae.evaluate.measures.core import figures as figure_rows
from tcsae.shared.sae.sparse import positive_code, topk_code

D_MODEL, D_SAE = 6, 9
MU = torch.linspace(-1, 1, D_MODEL, dtype=torch.float64)


def document_sums(x: torch.Tensor, output: Output, documents: torch.Tensor) -> Sums:
    n_documents, inputs = int(documents.max()) + 1 if len(documents) else 1, widen(x, MU)
    n = torch.bincount(documents, minlength=n_documents).double()
    total = torch.zeros(n_documents, D_MODEL, dtype=torch.float64).index_add_(0, documents, inputs.x)
    return Sums(n, total, sum_rows(token_columns(inputs, output), documents, n_documents))


def sums(x: torch.Tensor, x_hat: torch.Tensor, f: torch.Tensor | None) -> Sums:
    return document_sums(x, Output(x_hat, f), torch.zeros(len(x), dtype=torch.int64))


def none_of(like: Sums) -> Sums:
    return Sums(like.n_tokens * 0, like.x * 0, like.columns * 0)


def figures(counted: Sums, skipped: Sums) -> dict[str, float | None]:
    rows = {key: float(values[0]) for key, values in figure_rows(counted, skipped).items()}
    return {key: None if np.isnan(value) else value for key, value in rows.items()}


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
        "explained_variance_legacy": np.mean(
            [1 - (a - b) @ (a - b) / ((a - MU.numpy()) @ (a - MU.numpy())) for a, b, _, _ in rows]
        ),
        "explained_variance_saebench": 1
        - error / len(x) / (np.mean([m * m for _, _, m, _ in rows]) - np.mean([a * a for a, _, _, _ in rows]) ** 2),
        "mse": error / len(x),
        "mse_saebench": error / len(x) ** 2,
        "cossim": np.mean([a @ b / (m * n) for a, b, m, n in rows]),
        "l2_norm_in": np.mean([m for _, _, m, _ in rows]),
        "l2_norm_out": np.mean([n for _, _, _, n in rows]),
        "l2_ratio": np.mean([n / m for _, _, m, n in rows]),
        "relative_reconstruction_bias": sum(b @ b for _, b, _, _ in rows) / sum(a @ b for a, b, _, _ in rows),
        "l0": np.mean([sum(1 for value in row if value > 0) for row in f]),
        "l0_nonzero": np.mean([sum(1 for value in row if value != 0) for row in f]),
        "l1": np.mean([sum(abs(value) for value in row) for row in f]),
        "l1_signed": np.mean([sum(row) for row in f]),
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


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_resampling_is_the_split_with_its_documents_repeated(seed, n, n_documents):
    x, x_hat, f = example(seed, n)
    rng = np.random.default_rng(seed)
    documents = torch.from_numpy(rng.integers(0, n_documents, n))
    documents[-1] = n_documents - 1
    per_document = document_sums(x, Output(x_hat, f), documents)
    weights = rng.integers(0, 4, n_documents)
    weights[int(documents[0])] = 2
    tokens = torch.from_numpy(np.repeat(np.arange(n), weights[documents.numpy()]))
    repeated = sums(x[tokens], x_hat[tokens], f[tokens])
    drawn = torch.from_numpy(weights).double()[None]
    resampled = Sums(*(drawn @ getattr(per_document, one.name) for one in fields(Sums)))
    result, expected = (figure_rows(one, none_of(one)) for one in (resampled, repeated))
    for key, value in expected.items():  # undefined where all the tokens drawn are one
        assert float(result[key]) == pytest.approx(float(value), rel=1e-9, nan_ok=True), key


def test_skipped_positions_enter_one_figure_only():
    arrays = example(3, 30)
    counted, skipped = sums(*(one[5:] for one in arrays)), sums(*(100 * one[:5] for one in arrays))
    result, without = figures(counted, skipped), figures(counted, none_of(skipped))
    all_positions = [torch.cat([one[5:], 100 * one[:5]]) for one in arrays]
    assert result["explained_variance_all_positions"] == pytest.approx(naive(*all_positions)["explained_variance"])
    assert result["explained_variance_all_positions"] != pytest.approx(result["explained_variance"], rel=1e-3)
    assert result | {"explained_variance_all_positions": 0} == without | {"explained_variance_all_positions": 0}
    assert result.keys() | {"dead_fraction"} == DEFINITIONS.keys()


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
        document_sums(x, ConstantOutput(value, "mean")(x), torch.zeros(len(x), dtype=torch.int64))
        for value in (torch.zeros(D_MODEL), x.double().mean(0).float())
    )
    of_zero, of_mean = figures(zero, none_of(zero)), figures(average, none_of(average))
    assert of_zero["explained_variance"] == pytest.approx(-float(mean @ mean) / variance)
    assert of_zero["mse"] == pytest.approx(variance + float(mean @ mean))
    assert (of_zero["cossim"], of_zero["l2_ratio"], of_zero["l2_norm_out"], of_zero["l0"]) == (0, 0, 0, 0)
    assert of_zero["relative_reconstruction_bias"] is None
    assert of_mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert of_mean["mse"] == pytest.approx(variance)
    assert of_mean["relative_reconstruction_bias"] == pytest.approx(1)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_scaling_moves_figures_as_they_are_defined(seed, factor):
    x, x_hat, f = (one.double() for one in example(seed, 25))
    one, scaled = sums(x, x_hat, f), sums(factor * x, factor * x_hat, f)
    before, after = figures(one, none_of(one)), figures(scaled, none_of(scaled))
    for figure in (before, after):  # around a mean that does not scale along; and SAEBench's units do not match
        del figure["explained_variance_legacy"], figure["explained_variance_saebench"]
    powers = dict.fromkeys(before, 0) | {"mse": 2, "mse_saebench": 2, "l2_norm_in": 1, "l2_norm_out": 1}
    assert after == pytest.approx({key: value * factor ** powers[key] for key, value in before.items()}, rel=1e-9)


@given(st.integers(0, 10_000), st.floats(50, 1e3))
@settings(max_examples=30, deadline=None)
def test_shifting_moves_figures_as_they_are_defined(seed, shift):
    x, x_hat, f = (one.double() for one in example(seed, 25))
    one, shifted = sums(x, x_hat, f), sums(x + shift, x_hat + shift, f)
    before, after = figures(one, none_of(one)), figures(shifted, none_of(shifted))
    for key in ("explained_variance", "mse", "l0", "l1"):
        assert after[key] == pytest.approx(before[key], rel=1e-6), key
    assert before["cossim"] < after["cossim"] < 1, "uncentred: an offset common to x and xhat flatters it"
    assert after["l2_norm_in"] == pytest.approx(float((x + shift).norm(dim=1).mean()))


def test_undefined_figures_are_none():
    constant = torch.full((20, D_MODEL), 3.3)
    one = sums(constant, constant * 0.5, torch.zeros(20, D_SAE))
    result = figures(one, none_of(one))
    assert result["explained_variance"] is None
    assert result["l0"] == 0.0
    empty = sums(*(part[:0] for part in example(0, 5)))
    assert set(figures(empty, empty).values()) == {None}


def test_a_token_of_zeros_counts_without_a_division():
    x, x_hat, f = example(0, 3)
    x[0], x_hat[1] = 0, 0
    one = sums(x, x_hat, f)
    result, norms = figures(one, none_of(one)), x_hat.norm(dim=1).double()
    cosine = float(x[2].double() @ x_hat[2].double()) / float(x[2].double().norm() * x_hat[2].double().norm())
    assert result["cossim"] == pytest.approx(cosine / 3)
    assert result["l2_ratio"] == pytest.approx(float(norms[0] + norms[2] / x[2].norm()) / 3, rel=1e-6)


@given(st.integers(0, 10_000), st.integers(0, 20), st.integers(1, D_SAE))
@settings(max_examples=30, deadline=None)
def test_sparse_and_dense_codes_count_the_same(seed, n, k):
    rng = np.random.default_rng(seed)
    pre = torch.from_numpy(rng.normal(size=(n, D_SAE)).astype(np.float32))
    sequence = torch.from_numpy(np.sort(rng.integers(0, 3, n)))
    for code in (topk_code(pre, k), positive_code(pre.relu()), positive_code(torch.nn.functional.gelu(pre))):
        dense = code.dense()
        torch.testing.assert_close(token_activity(code), token_activity(dense))
        expected = [(dense > 0).sum(0), sum(((dense[sequence == i] > 0).any(0)).long() for i in range(3))]
        for held in (code, dense):
            assert torch.equal(firing_counts(held, sequence, 3), torch.stack(expected))
        cut = n // 2
        parts = [topk_code(part, k) for part in (pre[:cut], pre[cut:])]
        assert torch.equal(join_codes(parts).dense(), topk_code(pre, k).dense())
