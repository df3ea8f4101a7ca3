"""Promise: the temporal term finds slow factors where the same SAE without it spends itself on fast ones."""

import numpy as np
import pytest
import torch

from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

D_MODEL, N_SLOW, N_FAST, LENGTH, N_SEGMENTS, STEPS = 32, 8, 24, 32, 32, 500
FAST_RATE = 0.09


def factors(rng: np.random.Generator) -> np.ndarray:
    """[tokens, factors]: slow ones stay on for some 32 tokens, fast ones for one; slow ones are the rarer."""
    n = N_SEGMENTS * LENGTH
    code = np.zeros((n, N_SLOW + N_FAST))
    for factor in range(N_SLOW):
        start = int(rng.integers(0, 400))
        while start < n:
            stop = start + int(rng.geometric(1 / 32))
            code[start:stop, factor] = rng.uniform(1, 1.5)
            start = stop + int(rng.geometric(1 / 420))
    code[:, N_SLOW:] = (rng.random((n, N_FAST)) < FAST_RATE) * rng.uniform(1, 1.5, (n, N_FAST))
    return code


def recovered(weight: float, seed: int) -> tuple[int, int, float]:
    """(slow factors found, fast ones found, rate of the slow ones): a latent's direction within a cosine of 0.9."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(N_SLOW + N_FAST, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    settings = (
        "sae.d_sae=16", "sae.k=2", f"steps={STEPS}", "optimizer.lr=0.01", f"temporal.weight={weight}",
        f"data.n_segments={N_SEGMENTS}", f"data.segment_length={LENGTH}", f"init_seed={seed}",
    )  # fmt: skip
    config = with_settings(preset("temporal-topk", D_MODEL), settings)
    trainer, rates = None, []
    for _ in range(STEPS):
        code = factors(rng)
        rates.append((code[:, :N_SLOW] > 0).mean())
        x = torch.from_numpy(code @ directions + 0.05 * rng.normal(size=(len(code), D_MODEL))).float()
        batch = Batch(x, np.full(N_SEGMENTS, LENGTH), np.zeros(N_SEGMENTS, np.int64), np.arange(N_SEGMENTS))
        trainer = trainer or Trainer(config, x)
        trainer.step(batch)
    assert trainer is not None
    cosines = torch.from_numpy(directions).float() @ trainer.finished_sae().W_dec.detach().T
    result = cosines.max(1).values > 0.9
    return int(result[:N_SLOW].sum()), int(result[N_SLOW:].sum()), float(np.mean(rates))


@pytest.mark.slow
def test_slow_factors_are_recovered_with_the_term_and_not_without():
    seeds = (0, 1)
    on, off = ([recovered(weight, seed) for seed in seeds] for weight in (10.0, 0.0))
    assert all(rate < FAST_RATE for _, _, rate in on)
    assert sum(slow for slow, _, _ in on) >= 0.6 * N_SLOW * len(seeds), (on, off)
    assert all(with_term[0] > without[0] for with_term, without in zip(on, off, strict=True)), (on, off)
