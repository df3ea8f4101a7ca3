"""Promise: every hand-written gradient equals autograd's, for every activation, loss term and path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.shared.codes import SparseCode, decode, positive_code, select_topk, topk_code
from tcsae.shared.sae import SaeConfig
from tcsae.shared.windows import pair_weights
from tcsae.train.config import DataConfig, TemporalConfig, TrainConfig
from tcsae.train.loader import Batch
from tcsae.train.losses import Pairs, l1_dense, l1_sparse, temporal_dense, temporal_sparse
from tcsae.train.trainer import Trainer, Workspace


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def windows_loss(code: torch.Tensor, lengths: list[int], window: int) -> torch.Tensor:
    """Eq. 3 of the paper, window by window."""
    losses, offset = [], 0
    for length in lengths:
        for start in range(offset, offset + length - window + 1):
            pairs = [(code[i + 1] - code[i]).square().sum() for i in range(start, start + window - 1)]
            losses.append(sum(pairs) / (window - 1))
        offset += length
    return torch.stack(losses).mean() if losses else code.sum() * 0


def pairs_of(lengths: list[int], window: int) -> Pairs:
    weights = torch.from_numpy(pair_weights(np.array(lengths), window)).double()
    return Pairs(weights / max(1.0, float(weights.sum())))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(2, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_temporal_terms_equal_autograd_over_windows(lengths, window, seed):
    torch.manual_seed(seed)
    n, d_sae = sum(lengths), 7
    dense = torch.randn(n, d_sae).relu() * (torch.rand(n, d_sae) < 0.6)
    leaf = dense.clone().requires_grad_()
    expected = 0.3 * windows_loss(leaf, lengths, window)
    expected.backward()
    grad = torch.zeros(n, d_sae)
    value = temporal_dense(dense, pairs_of(lengths, window), 0.3, grad)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)

    code = positive_code(dense)
    entries, zeros = torch.zeros_like(code.values), torch.zeros(n, d_sae)
    value = temporal_sparse(code, pairs_of(lengths, window), 0.3, entries, zeros)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(entries, leaf.grad[code.rows, code.latents])
    assert not zeros.any()


def test_l1_terms_equal_autograd():
    torch.manual_seed(0)
    dense = torch.randn(11, 5)
    leaf = dense.clone().requires_grad_()
    expected = 0.7 * leaf.abs().sum(1).mean()
    expected.backward()
    grad = torch.zeros(11, 5)
    torch.testing.assert_close(l1_dense(dense, 0.7, grad), expected.detach())
    torch.testing.assert_close(grad, leaf.grad)
    code = positive_code(dense.relu())
    entries = torch.zeros_like(code.values)
    torch.testing.assert_close(l1_sparse(code, 0.7, entries), 0.7 * dense.relu().sum(1).mean())
    torch.testing.assert_close(entries, torch.full_like(entries, 0.7 / 11))


CASES = {
    "topk": {"activation": "topk", "k": 3, "d_sae": 64},
    "topk in two stages": {"activation": "topk", "k": 2, "d_sae": 96},
    "relu, dense path": {"activation": "relu", "d_sae": 40},
    "relu, sparse path": {"activation": "relu", "d_sae": 40},
    "gelu": {"activation": "gelu", "d_sae": 40},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("l1, temporal", [(0.0, 0.0), (0.2, 0.0), (0.05, 0.3)])
def test_all_parameter_gradients_equal_autograd(case, l1, temporal):
    d_model, lengths = 12, [5, 1, 7, 3, 2, 6]
    config = TrainConfig(
        sae=SaeConfig(d_model=d_model, **CASES[case]),
        data=DataConfig(segment_length=7),
        temporal=TemporalConfig(weight=temporal, window=3),
        l1=l1,
        init="xavier",
    )
    torch.manual_seed(1)
    x = torch.randn(sum(lengths), d_model) + 0.5
    trainer = Trainer(config, x, Workspace())
    for parameter in trainer.parameters:  # away from the symmetric start
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    if case == "relu, sparse path":
        trainer.sae.b_enc.data.sub_(3.0)
    result = trainer.gradients(Batch(x, np.array(lengths)))
    density = result.l0 / config.sae.d_sae
    assert (density < 0.1) == (case == "relu, sparse path" or case.startswith("topk")), density

    ours = [parameter.grad.clone() for parameter in trainer.parameters]
    for parameter in trainer.parameters:
        parameter.grad = None
    scaled = x * trainer.scale
    code = trainer.sae.encode(scaled)
    loss = (trainer.sae.decode(code) - scaled).square().sum(1).mean() + l1 * code.abs().sum(1).mean()
    loss = loss + temporal * windows_loss(code, lengths, 3)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-9)
    for mine, parameter in zip(ours, trainer.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@given(st.integers(1, 5), st.sampled_from([16, 48, 64, 96, 128]), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_two_stage_topk_is_exact(n, d_sae, k, seed):
    pre = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed))
    values, latents = select_topk(pre, k)
    torch.testing.assert_close(values.sort(-1).values, pre.topk(k).values.sort(-1).values, rtol=0, atol=0)
    torch.testing.assert_close(pre.gather(1, latents), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in latents.tolist())


def test_sparse_and_dense_decode_agree():
    torch.manual_seed(0)
    pre, W_dec, b_dec = torch.randn(9, 32), torch.randn(32, 4), torch.randn(4)
    code = topk_code(pre, 5)
    torch.testing.assert_close(decode(code, W_dec, b_dec), code.dense() @ W_dec + b_dec)
    empty = SparseCode(pre.new_zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 32)
    torch.testing.assert_close(decode(empty, W_dec, b_dec), b_dec.expand(3, 4))
