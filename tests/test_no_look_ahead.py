"""Promise: whatever is scored, a token's code and reconstruction depend on no later token of its sequence.

A reconstruction that did would tell the language model what it is to predict, and its cross-entropy would mean nothing.
"""

import pytest
import torch

from tcsae.evaluate.measures.smoothing import parse_smoothing
from tcsae.evaluate.systems import output_of, system_of
from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.layout import SaeConfig

D = 6
LENGTHS = torch.tensor([9, 4, 1, 7])
SEQUENCE = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
SYSTEMS = {
    "topk": ({}, None),
    "batchtopk": ({"activation": "batchtopk"}, None),
    "crosscoder of 3": ({"window": 3}, None),
    "crosscoder of 5, relu": ({"window": 5, "activation": "relu"}, None),
    "tfa": ({"predictor": "attention"}, None),
    "tfa, past": ({"predictor": "past"}, None),
    "persistent": ({"predictor": "decay"}, None),
    **{rule: ({}, rule) for rule in ("ema=0.3", "ema-topk=0.3", "mean=3", "hysteresis=2")},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_tokens_are_no_error(name):
    """As the positions that are left out are none, where every position counts."""
    settings, rule = SYSTEMS[name]
    system = system_of(
        new_sae(SaeConfig(d_model=D, d_sae=24, k=3, **settings)), parse_smoothing(rule) if rule else None
    )
    with torch.no_grad():
        output = output_of(system, torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    assert output.x_hat.shape == (0, D) and output.code.dense().shape == (0, 24)


@pytest.mark.parametrize("name", SYSTEMS)
def test_later_tokens_change_nothing(name):
    settings, rule = SYSTEMS[name]
    sae = new_sae(SaeConfig(d_model=D, d_sae=24, k=3, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in sae.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator))
    system = system_of(sae.eval(), parse_smoothing(rule) if rule else None)
    x = torch.randn(len(SEQUENCE), D, generator=generator)
    with torch.no_grad():
        before = output_of(system, x, SEQUENCE)
        for at in range(len(x) - 1):
            changed = x.clone()
            changed[at + 1 :] = torch.randn(len(x) - at - 1, D, generator=generator)
            after = output_of(system, changed, SEQUENCE)
            torch.testing.assert_close(after.x_hat[: at + 1], before.x_hat[: at + 1])
            torch.testing.assert_close(after.code.dense()[: at + 1], before.code.dense()[: at + 1])
        assert not torch.equal(before.x_hat, output_of(system, x.flip(0), SEQUENCE).x_hat)
