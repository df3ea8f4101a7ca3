"""Promise: every hand-written gradient equals autograd's, for every activation, loss term and path."""

import numpy as np
import pytest
import textbook
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.ops import EncoderWeights, activate, attach_dense, dense_rows, pair_differences, square_norms
from tcsae.shared.sae.sparse import (
    ROWS,
    SparseCode,
    batchtopk_code,
    decode,
    positive_code,
    select_topk,
    threshold_code,
    topk_code,
)
from tcsae.train.batch import Batch, shuffled
from tcsae.train.config import (
    DataConfig,
    DeadConfig,
    InitConfig,
    OptimizerConfig,
    SparsityConfig,
    TrainConfig,
)
from tcsae.train.log import metrics_line
from tcsae.train.losses import STATEFUL, TEMPORAL, temporal_term
from tcsae.train.losses.contrastive import contrastive, info_nce
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.losses.position import PositionPenalty
from tcsae.train.settings.temporal_settings import TemporalConfig
from tcsae.train.trainer import StepResult, Trainer


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(x: torch.Tensor, lengths: list[int]) -> Batch:
    n = len(lengths)
    return Batch(x, np.array(lengths), np.arange(n) % 3, np.arange(n) // 2)


def same_gradients(loss, oracle, dense: torch.Tensor) -> None:
    """A loss of a code, as a matrix and as entries, has the oracle's value and gradient."""
    leaf = dense.clone().requires_grad_()
    expected = oracle(leaf)
    expected.backward()
    mine = dense.clone().requires_grad_()
    value = loss(mine)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(mine.grad, leaf.grad)
    code = positive_code(dense)
    code = code.with_values(code.values.clone().requires_grad_())
    value = loss(code)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(code.values.grad, leaf.grad[code.rows, code.latents])


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(2, 4),
    st.sampled_from(["difference", "relative", "gated"]),
    st.sampled_from(["adjacent", "all"]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_temporal_terms_equal_autograd_over_windows(lengths, window, kind, pairs, seed):
    torch.manual_seed(seed)
    n, d_sae = sum(lengths), 7
    config = TemporalConfig(weight=1.0, window=window, kind=kind, pairs=pairs)
    dense = torch.randn(n, d_sae).relu() * (torch.rand(n, d_sae) < 0.6)
    batch = batch_of(torch.randn(n, 3), lengths)
    if not textbook.windows(config, dense, batch).isfinite():  # of a code that is zero wherever a window lies
        assert TEMPORAL[kind](config, positive_code(dense), batch, 0) == 0
        return
    same_gradients(
        lambda code: TEMPORAL[kind](config, code, batch, 0), lambda f: textbook.windows(config, f, batch), dense
    )


@pytest.mark.slow
@given(st.lists(st.integers(1, 5), min_size=2, max_size=7), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_contrastive_term_equals_autograd_pair_by_pair(lengths, seed):
    torch.manual_seed(seed)
    config = TemporalConfig(weight=1.0, kind="contrastive")
    dense = (torch.rand(sum(lengths), 6) + 0.1) * (torch.rand(sum(lengths), 6) < 0.8)
    dense[:, 0] = 1.0
    batch = batch_of(torch.zeros(sum(lengths), 3), lengths)
    if sum(length >= 2 for length in lengths) < 2:
        return
    same_gradients(
        lambda code: contrastive(config, code, batch, seed),
        lambda f: textbook.contrastive(config, f, batch, seed),
        dense,
    )


OF_PAIRS = {"local", "direction", "t-sae", "topic", "local-topic"}
"""Held against theirs in test_contrasts, test_t_sae and test_topic."""


def test_every_kind_of_temporal_term_is_held_against_an_oracle():
    assert {*TEMPORAL, *STATEFUL} == {"difference", "relative", "gated", "contrastive"} | OF_PAIRS
    with pytest.raises(ConfigError, match=r"Unknown temporal.kind 'contrastiv'.*'contrastive'"):
        temporal_term("contrastiv")


def test_partners_are_adjacent_and_negatives_of_other_documents():
    batch = batch_of(torch.zeros(14, 1), [3, 1, 4, 2, 4])
    config = TemporalConfig(kind="contrastive")
    first, _, others = choose_pairs(config, batch, 5)
    second = first + 1
    segment = np.repeat(np.arange(5), batch.lengths)
    assert segment[first].tolist() == segment[second].tolist() == [0, 2, 3, 4]
    assert others.tolist() == [[i // 2 != j // 2 for j in (0, 2, 3, 4)] for i in (0, 2, 3, 4)]
    everywhere = {int(choose_pairs(config, batch, seed).first[1]) for seed in range(40)}
    assert everywhere == {4, 5, 6}
    alone = torch.zeros(2, 2, dtype=torch.bool)
    assert info_nce(torch.eye(2) / 0.1, alone) == 0


@pytest.mark.parametrize("order", ["segment", "batch"])
def test_controls_shuffle_within_their_bounds(order):
    lengths = [5, 1, 7, 3]
    batch = batch_of(torch.zeros(16, 1), lengths)
    segment = np.repeat(np.arange(4), lengths)
    moved = [shuffled(order, batch, seed)[0].numpy() for seed in range(8)]
    for one in moved:
        assert sorted(one) == list(range(16))
    stay = [bool((segment[one] == segment).all()) for one in moved]
    assert stay == [order == "segment"] * 8
    assert len({tuple(one) for one in moved}) == 8


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("l1", [0.0, 0.7])
@pytest.mark.parametrize("n", [1, ROWS, 2 * ROWS + 3])
def test_dense_activations_equal_autograd_over_several_slices(kind, l1, n):
    torch.manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_model=4, d_sae=5, activation=kind))
    sae.load_state_dict({name: torch.randn_like(tensor) for name, tensor in sae.state_dict().items()})
    sae.b_enc.data[4] = -20.0
    x, upstream = torch.randn(n, 4), torch.randn(n, 5)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[kind](pre)
    learned = (sae.W_enc_rows, sae.b_enc, sae.b_dec)
    wanted = torch.autograd.grad((upstream * expected).sum() + l1 * expected.abs().sum(), learned)
    with torch.no_grad():
        centred = x - sae.b_dec
        raw = centred @ sae.W_enc
        code = raw if kind == "relu" else torch.empty_like(raw)
        active, total = activate(kind, raw, sae.b_enc, code)
    weights = EncoderWeights(sae.W_enc_rows, sae.b_enc, sae.b_dec)
    f, tap, size = attach_dense(kind, code, raw, total, centred, weights)
    assert torch.equal(f, tap)
    torch.testing.assert_close(f, expected)
    assert active.n_active == int((expected > 0).sum())
    assert active.fired.tolist() == (expected > 0).any(0).tolist()
    assert float(size) == pytest.approx(expected.abs().sum().item())
    loss = (upstream * (0.25 * f + 0.75 * tap)).sum() + l1 * size if l1 else (upstream * f).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, learned), wanted)


CASES = {
    "topk": {"activation": "topk", "k": 3, "d_sae": 64},
    "topk in two stages": {"activation": "topk", "k": 2, "d_sae": 96},
    "batchtopk": {"activation": "batchtopk", "k": 3, "d_sae": 64},
    "jumprelu": {"activation": "jumprelu", "k": 3, "d_sae": 64},
    "relu, dense path": {"activation": "relu", "d_sae": 40},
    "relu, sparse path": {"activation": "relu", "d_sae": 40},
    "gelu": {"activation": "gelu", "d_sae": 40},
}
TERMS = {
    "reconstruction": {},
    "l1": {"sparsity": SparsityConfig(l1=0.2)},
    "eq. 3": {"sparsity": SparsityConfig(l1=0.05), "temporal": TemporalConfig(weight=0.3, window=3)},
    "gated, all pairs": {"temporal": TemporalConfig(weight=0.3, kind="gated", pairs="all", window=4)},
    "relative on the first group": {"temporal": TemporalConfig(weight=0.3, kind="relative", scope="first")},
    "relative by budget": {"temporal": TemporalConfig(budget=0.2, kind="relative")},
    "contrastive": {"temporal": TemporalConfig(weight=0.3, kind="contrastive")},
    "eq. 3 on shuffled segments": {"temporal": TemporalConfig(weight=0.3, order="segment")},
    "relative on a shuffled batch": {"temporal": TemporalConfig(weight=0.3, kind="relative", order="batch")},
    "contrastive on shuffled segments": {"temporal": TemporalConfig(weight=0.3, kind="contrastive", order="segment")},
    "eq. 3 by budget, positions": {"temporal": TemporalConfig(budget=0.2, position_penalty=0.5, warmup=1.0)},
}
SHAPES = {
    "plain": {},
    "groups": {"groups": (0.25, 0.75)},
    "layer norm in": {"layer_norm": "in"},
    "layer norm in and out": {"layer_norm": "in_out"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_parameter_gradients_equal_autograd(case, term, shape):
    d_model, lengths = 12, [5, 1, 7, 3, 2, 6]
    sae = SaeConfig(d_model=d_model, **CASES[case], **SHAPES[shape])
    config = TrainConfig(
        sae=sae,
        data=DataConfig(segment_length=7),
        dead=DeadConfig(aux_weight=0.0),
        init=InitConfig(weights="xavier", input_scale="unit" if sae.layer_norm == "none" else "none"),
        group_weights=(0.3, 0.7)[: len(sae.groups)] if len(sae.groups) > 1 else (1.0,),
        **({"sparsity": SparsityConfig(l0=0.5, bandwidth=0.4)} if case == "jumprelu" else {}) | TERMS[term],
    )
    torch.manual_seed(1)
    batch = batch_of(torch.randn(sum(lengths), d_model) + 0.5, lengths)
    trainer = Trainer(config, batch.x)
    for parameter in trainer.parameters:  # away from the symmetric start
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    if case == "relu, sparse path":
        trainer.sae.b_enc.data.sub_(4.0)
    if case == "jumprelu":
        trainer.sae.threshold.data.fill_(2.0)
    result = same_as_textbook(trainer, batch)
    assert isinstance(result.code, SparseCode) == (case not in ("relu, dense path", "gelu"))
    assert result.l0 > 0


def same_as_textbook(trainer: Trainer, batch: Batch) -> StepResult:
    """The step's result, after every output was held against plain torch on dense codes."""
    theirs = textbook.step(trainer, batch)
    result = trainer.gradients(batch)
    assert result.losses == pytest.approx(theirs.losses, rel=1e-9, abs=1e-12)
    assert (result.l0, result.temporal_weight) == pytest.approx((theirs.l0, theirs.temporal_weight))
    gradients = {name: one.grad for name, one in trainer.sae.named_parameters() if one.requires_grad}
    torch.testing.assert_close(gradients, theirs.gradients)
    dense = result.code.dense() if isinstance(result.code, SparseCode) else result.code
    torch.testing.assert_close(dense, theirs.code)
    torch.testing.assert_close(result.x_hat - result.x, theirs.error)
    assert (trainer.tokens_since_fired == 0).tolist() == (theirs.code > 0).any(0).tolist()
    assert_figures(metrics_line(trainer, result), theirs, batch)
    return result


def assert_figures(line: dict, theirs: textbook.Step, batch: Batch) -> None:
    f, segment = theirs.code, np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    inside = torch.from_numpy(segment[1:] == segment[:-1])
    change = (f[1:] - f[:-1])[inside].square().sum(1).mean()
    variance = f.var(0, unbiased=False).sum()
    assert line["adjacent_correlation"] == pytest.approx(float(1 - change / (2 * variance)), rel=1e-6, abs=1e-9)
    assert line["code_norm"] == pytest.approx(float(f.square().sum(1).mean().sqrt()))


def test_jumprelu_thresholds_learn_through_the_kernel():
    """Entry by entry: the straight-through estimator of Rajamanoharan et al. 2024, eqs. 11-12."""
    epsilon, lengths = 0.4, [4, 5]
    sae = SaeConfig(d_model=6, d_sae=20, activation="jumprelu", k=2)
    config = TrainConfig(sae=sae, sparsity=SparsityConfig(l0=3.0, bandwidth=epsilon), dead=DeadConfig(aux_weight=0.0))
    torch.manual_seed(2)
    batch = batch_of(torch.randn(9, 6), lengths)
    trainer = Trainer(config, batch.x)
    trainer.sae.threshold.data.uniform_(0.3, 1.0)
    result = trainer.gradients(batch)
    with torch.no_grad():
        x = batch.x * trainer.scale
        pre, theta = trainer.sae.pre_activations(x), trainer.sae.threshold
        code = torch.where(pre > theta, pre, 0.0)
        upstream = 2 / 9 * (trainer.sae.decode(code) - x) @ trainer.sae.W_dec.T
        off = (code > 0).sum() / 9 / 2 - 1
    expected = torch.zeros(20)
    for i in range(9):
        for j in range(20):
            if abs(pre[i, j] - theta[j]) < epsilon / 2:
                expected[j] -= theta[j] / epsilon * upstream[i, j]
                expected[j] -= 3.0 * 2 * off / 2 / 9 / epsilon
    torch.testing.assert_close(trainer.sae.threshold.grad, expected)
    assert result.losses["l0_loss"] == pytest.approx(3.0 * float(off) ** 2)


@pytest.mark.parametrize("aux_k", [4, 64])
def test_auxk_gradients_equal_autograd(aux_k):
    sae = SaeConfig(d_model=8, d_sae=30, k=3)
    config = TrainConfig(sae=sae, dead=DeadConfig(aux_weight=0.5, aux_k=aux_k), optimizer=OptimizerConfig())
    torch.manual_seed(3)
    batch = batch_of(torch.randn(12, 8), [12])
    trainer = Trainer(config, batch.x)
    trainer.sae.b_enc.data.normal_()
    trainer.progress.n_steps, trainer.progress.n_tokens = 1, 12
    dead = torch.arange(30) % 3 == 0
    trainer.tokens_since_fired = dead * 10**9
    assert same_as_textbook(trainer, batch).losses["aux"] > 0


def test_a_budget_does_not_blow_up_what_is_only_rounding():
    """Relative slowness is 1 where no latent fires twice in a row, and does not move."""
    config = TrainConfig(
        sae=SaeConfig(d_model=12, d_sae=24, k=3),
        temporal=TemporalConfig(budget=0.5, kind="relative"),
        init=InitConfig(b_dec="zero", input_scale="none"),
    )
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x = torch.zeros(11, 12)
    x[::2, :6], x[1::2, 6:] = torch.rand(6, 6), torch.rand(5, 6)
    batch = batch_of(x, [6, 5])
    trainer = Trainer(config, batch.x)
    with torch.no_grad():  # latents of the even tokens, and of the odd ones
        trainer.sae.W_enc_rows[:12, 6:] = trainer.sae.W_enc_rows[12:, :6] = 0
        trainer.sae.W_enc_rows.abs_()
    result = trainer.gradients(batch)
    code = result.code.dense()
    assert (code[1:] * code[:-1]).sum() == 0 and (code > 0).any()
    assert (result.temporal_weight, result.losses["temporal"]) == (0.0, 0.0)


def test_the_position_penalty_is_the_variance_between_positions():
    torch.manual_seed(0)
    code, lengths = torch.rand(14, 4), [3, 1, 4, 2, 4]
    batch = batch_of(torch.zeros(14, 1), lengths)
    position = [start + i for length, start in zip(lengths, batch.starts, strict=True) for i in range(length)]
    means = {p: code[[q == p for q in position]].mean(0) for p in set(position)}
    off = torch.stack([means[p] - code.mean(0) for p in position])
    code.requires_grad_()
    value = PositionPenalty(8, 4, torch.device("cpu"))(code, batch)
    assert value.item() == pytest.approx(float(off.square().sum(1).mean()))
    torch.testing.assert_close(torch.autograd.grad(value, code)[0], 2 / 14 * off)
    sparse = positive_code(code.detach())
    sparse = sparse.with_values(sparse.values.requires_grad_())
    value = PositionPenalty(8, 4, torch.device("cpu"))(sparse, batch)
    assert value.item() == pytest.approx(float(off.square().sum(1).mean()))
    entries = torch.autograd.grad(value, sparse.values)[0]
    torch.testing.assert_close(entries, (2 / 14 * off)[sparse.rows, sparse.latents])


@pytest.mark.parametrize("lag", [1, 2, 5, 40])
def test_pair_differences_of_any_lag(lag):
    torch.manual_seed(lag)
    dense = torch.randn(23, 9).relu()
    same_gradients(
        lambda code: (pair_differences(code, lag) * torch.arange(max(0, 23 - lag))).sum(),
        lambda f: ((f[lag:] - f[:-lag]).square().sum(1) * torch.arange(max(0, 23 - lag))).sum(),
        dense,
    )


@pytest.mark.parametrize("operation", [square_norms, lambda code: dense_rows(code, torch.tensor([7, 0, 3]))])
def test_operations_take_entries_and_matrices(operation):
    torch.manual_seed(0)
    dense = torch.randn(11, 6).relu()
    same_gradients(lambda code: operation(code).square().sum(), lambda f: operation(f).square().sum(), dense)


DISTRIBUTIONS = {
    "normal": lambda pre: pre,
    "few ties": lambda pre: (8 * pre).round() / 8,
    "many ties": torch.round,
    "all equal": torch.zeros_like,
    "not a number": lambda pre: pre.masked_fill(pre > 1.5, torch.nan),
    "infinite": lambda pre: torch.where(pre.abs() > 1, pre * torch.inf, pre),
}


@given(
    st.integers(0, 5),
    st.sampled_from([16, 48, 64, 96, 128]),
    st.integers(1, 8),
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_two_stage_topk_is_exact(n, d_sae, k, kind, seed):
    pre = DISTRIBUTIONS[kind](torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed)))
    values, latents = select_topk(pre, k)
    best = pre.topk(k).values.sort(-1).values
    torch.testing.assert_close(values.sort(-1).values, best, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pre.gather(1, latents), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in latents.tolist())


def test_sparse_and_dense_decode_agree():
    torch.manual_seed(0)
    pre, W_dec, b_dec = torch.randn(9, 32), torch.randn(32, 4), torch.randn(4)
    code = topk_code(pre, 5)
    torch.testing.assert_close(decode(code, W_dec, b_dec), code.dense() @ W_dec + b_dec)
    empty = SparseCode(pre.new_zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 32)
    torch.testing.assert_close(decode(empty, W_dec, b_dec), b_dec.expand(3, 4))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_batchtopk_keeps_exactly_the_largest_positive_entries(n, d_sae, k, ties, seed):
    pre = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed))
    pre = pre.round() if ties else pre
    k = min(k, d_sae)
    code = batchtopk_code(pre, k)
    expected = pre.flatten().sort(descending=True).values[: n * k]
    expected = expected[expected > 0]
    torch.testing.assert_close(code.values.sort(descending=True).values, expected, rtol=0, atol=0)
    torch.testing.assert_close(pre[code.rows, code.latents], code.values, rtol=0, atol=0)
    assert len(set(zip(code.rows.tolist(), code.latents.tolist(), strict=True))) == len(expected)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_threshold_codes_and_parts(n, d_sae, seed):
    generator = torch.Generator().manual_seed(seed)
    pre, threshold = torch.randn(n, d_sae, generator=generator), torch.rand(d_sae, generator=generator)
    code = threshold_code(pre, threshold)
    torch.testing.assert_close(code.dense(), torch.where(pre > threshold, pre, 0.0))
    near = threshold_code(pre, threshold, margin=0.3)
    torch.testing.assert_close(near.dense(), torch.where(pre > threshold - 0.3, pre, 0.0))
    first, stop = d_sae // 3, d_sae
    torch.testing.assert_close(code.part(first, stop).dense(), code.dense()[:, first:stop])
