"""Promise: --precision changes matrix products alone, by no more than rounding, and is refused where it is slower."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tcsae.shared.base.device as device_module
from tcsae.shared.base.device import PRECISIONS, set_precision
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.train.batch import Batch
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

WIDTH = 16
SETTINGS = ("sae.d_sae=64", "sae.k=4", "data.segment_length=6", "steps=100", "dead.aux_k=8")


def stepped(name: str) -> tuple[Trainer, dict[str, float]]:
    torch.manual_seed(0)
    x = torch.randn(48, WIDTH) + 0.5
    trainer = Trainer(with_settings(preset(name, WIDTH), SETTINGS), x, n_positions=6)
    result = trainer.step(Batch(x, np.full(8, 6), np.zeros(8, np.int64), np.arange(8)))
    return trainer, result.losses


@pytest.mark.parametrize("name", ["topk", "batchtopk", "relu-l1", "jumprelu", "written-run3"])
def test_a_step_in_bfloat16_is_one_in_float32_but_for_rounding(monkeypatch, name):
    whole, losses = stepped(name)
    monkeypatch.setattr(device_module, "_precision", ["bf16"])
    half, rounded = stepped(name)
    assert rounded == pytest.approx(losses, rel=0.05)
    assert rounded != losses, "some product was in bfloat16"
    for one, other in zip(whole.parameters, half.parameters, strict=True):
        assert one.dtype == other.dtype == other.grad.dtype == torch.float32
        moments = [half.optimizer.state[other][moment] for moment in ("exp_avg", "exp_avg_sq")]
        assert {moment.dtype for moment in moments} == {torch.float32}
        # Not entry by entry: an entry near a bound may be selected in one and not in the other.
        assert torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("activation", ["topk", "relu-l1", "written-run3"])
def test_inference_in_bfloat16_gives_codes_and_reconstructions_in_float32(monkeypatch, activation):
    sae = stepped(activation)[0].finished_sae()
    x = torch.randn(20, WIDTH)
    whole = sae(x)
    monkeypatch.setattr(device_module, "_precision", ["bf16"])
    half = sae(x)
    assert (sae.encode(x).dtype, sae.encode_sparse(x).values.dtype, half.dtype) == (torch.float32,) * 3
    assert 0 < (half - whole).norm() < 0.2 * whole.norm()


@pytest.mark.parametrize(
    ("name", "device", "line"),
    [
        (
            "bf16",
            "cpu",
            "--precision bf16 on cpu: products in bfloat16 take about 100 times as long there. Leave it at",
        ),
        ("tf32", "cpu", "--precision tf32 on cpu: it is for NVIDIA GPUs. Leave it at float32, or give --device cuda."),
        ("bf16", "mps", "--precision bf16 on mps: it is for NVIDIA GPUs. Leave it at float32"),
        ("fp8", "cuda", "Unknown precision 'fp8'"),
    ],
)
def test_where_it_is_no_faster_it_is_refused(name, device, line):
    with pytest.raises(ConfigError, match=line):
        set_precision(name, torch.device(device))


def test_each_precision_sets_what_other_products_are_in(monkeypatch):
    monkeypatch.setattr(device_module, "_precision", ["float32"])
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for name in PRECISIONS:
        set_precision(name, torch.device("cuda"))
    assert asked == ["highest", "high", "high"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_commands_have_it(command):
    done = CliRunner().invoke(cli, [command, "--help"])
    assert "--precision [float32|tf32|bf16]" in done.output
