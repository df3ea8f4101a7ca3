"""Promise: sparse codes are those of `encode`, whatever the shape, dtype and number of tokens."""

import pytest
import torch

from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.sparse import batchtopk_code


def sae_of(activation: str) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=40, k=4, activation=activation))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae.eval()


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_any_leading_shape_and_dtype(activation, shape, dtype):
    sae, x = sae_of(activation), torch.randn(shape).to(dtype)
    code = sae.encode_sparse(x)
    assert code.values.dtype == torch.float32
    torch.testing.assert_close(code.dense(), sae.encode(x.float()).reshape(-1, 40))
    torch.testing.assert_close(sae.decode_sparse(code), sae.decode(sae.encode(x.float())).reshape(-1, 6))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@torch.no_grad()
def test_weights_of_half_precision(activation):
    sae, x = sae_of(activation).bfloat16(), torch.randn(5, 6)
    code = sae.encode_sparse(x)
    assert code.values.dtype == torch.bfloat16
    assert torch.equal(code.dense(), sae.encode(x.bfloat16()))


def test_batchtopk_of_no_token_has_no_entry():
    assert batchtopk_code(torch.zeros(0, 7), 3).values.numel() == 0
