"""Promise: what a CPU takes in blocks, in panels or by NumPy's sort is what it would be taken whole."""

import numpy as np
import pytest
import torch

import tcsae.shared.sae.activations as activations
import tcsae.shared.sae.sparse as sparse
from tcsae.shared.base.settings import with_settings
from tcsae.shared.sae.sparse import SparseCode
from tcsae.train.batch import Batch
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

WIDTH, LENGTHS = 12, [5, 1, 7, 3]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(x: torch.Tensor) -> Batch:
    lengths = np.array(LENGTHS)
    return Batch(x, lengths, 0 * lengths, np.arange(len(lengths)))


@pytest.mark.parametrize("name", ["topk", "relu-l1", "jumprelu", "temporal-matryoshka"])
def test_a_step_in_small_blocks_and_narrow_panels(monkeypatch, name):
    settings = ["sae.d_sae=32", "sae.k=2", "data.segment_length=7", "dead.aux_weight=0"]
    torch.manual_seed(0)
    batch = batch_of(torch.randn(sum(LENGTHS), WIDTH) + 0.5)
    trainer = Trainer(with_settings(preset(name, WIDTH), settings), batch.x)
    if name == "relu-l1":
        trainer.sae.b_enc.data.sub_(2.0)
    if name == "jumprelu":
        trainer.sae.threshold.data.fill_(1.5)
    small = {(sparse, "CACHED"): 0, (sparse, "READS"): 1, (sparse, "PANEL"): 5}
    small |= {(activations, "ROWS"): 3, (activations, "BLOCK_ENTRIES"): 96}
    actual = []
    for patched in (False, True):
        for (module, constant), value in small.items() if patched else ():
            monkeypatch.setattr(module, constant, value)
        result = trainer.gradients(batch)
        actual.append((result.losses, [parameter.grad.clone() for parameter in trainer.parameters]))
        assert result.l0 > 0
    (losses, gradients), (in_parts, of_parts) = actual
    assert in_parts == pytest.approx(losses)
    torch.testing.assert_close(of_parts, gradients)


@pytest.mark.parametrize("d_sae", [1, 7, 1 << 16, (1 << 16) + 1])
def test_entries_are_sorted_by_latent_then_token(d_sae):
    latents = torch.randint(max(0, d_sae - 5), d_sae, (60,), generator=torch.Generator().manual_seed(0))
    order = SparseCode(torch.rand(60), latents, torch.arange(0, 61, 3), d_sae).by_latent
    pairs = list(zip(latents[order.order].tolist(), order.tokens.tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert order.edges.diff().tolist() == torch.bincount(latents, minlength=d_sae).tolist()
