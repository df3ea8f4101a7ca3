"""Promise: smoothness is what T-SAE's published code measures, sequence by sequence."""

import numpy as np
import pytest
import torch

import tcsae
from tcsae.evaluate.batches import EvalBatch
from tcsae.evaluate.measures.registry import MeasureObserver
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.sparse import positive_code

LENGTH, D_MODEL, D_SAE, HIGH = 12, 5, 10, 2


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = tmp_path_factory.mktemp("smoothness") / "a.zarr"
    with tcsae.create_store(path, hooks={"h": D_MODEL}, sequence_length=LENGTH) as store:
        for name in ("train", "eval"):
            store.append(name, {"h": np.ones((2, LENGTH, D_MODEL), np.float32)})
    return tcsae.open_store(path).eval


def published(x: torch.Tensor, f: torch.Tensor) -> float:
    """`lipschitz_cont` of one text and one chunk of latents."""
    f = f[:, (f.sum(0) != 0).nonzero(as_tuple=True)[0]]
    least = torch.zeros((f.shape[0] - 1, f.shape[1]), dtype=f.dtype)
    for time in range(1, f.shape[0]):
        f_change = torch.abs(f[time] - f[time - 1])
        x_change = torch.linalg.vector_norm(x[time] - x[time - 1], ord=2)
        least[time - 1, :] = f_change / x_change
    return float(least.max(dim=0)[0].mean())


def batch_of(lengths: list[int], skip_first: int, seed: int, hole: int | None = None) -> EvalBatch:
    """`hole`: a position that no sequence counts."""
    n, generator = len(lengths), torch.Generator().manual_seed(seed)
    x = torch.randn(n, LENGTH, D_MODEL, generator=generator)
    position, valid = torch.arange(LENGTH), torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    numbers, counted = torch.arange(n), valid & (position >= skip_first)
    if hole is not None:
        counted[:, hole] = False
    tokens = torch.zeros(n, LENGTH, dtype=torch.int64)
    return EvalBatch(0, x, tokens, torch.tensor(lengths), numbers, numbers, counted, valid & ~counted)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("groups", [(1.0,), (0.2, 0.8)])
def test_it_is_the_published_one(split, groups, skip_first, dense):
    observer = MeasureObserver([SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=2, groups=groups))], split)
    expected: dict[str, list[float]] = {"smoothness": [], "smoothness_high": [], "smoothness_low": []}
    for seed, lengths in enumerate(([12, 5, 1, 2], [3, 7], [1])):
        batch = batch_of(lengths, skip_first, seed)
        f = torch.randn(len(lengths), LENGTH, D_SAE, generator=torch.Generator().manual_seed(9 + seed)).relu()
        f[:, :, 3] = 0
        f[0, :, :HIGH] = 0  # a text in which none of the first group is on
        x = batch.x[batch.counted]
        observer.begin(batch, x)
        observer.see(0, f[batch.counted] if dense else positive_code(f[batch.counted]))
        for i, n in enumerate(lengths):
            if n - skip_first < 2:
                continue
            theirs, code = batch.x[i, skip_first:n].double(), f[i, skip_first:n].double()
            expected["smoothness"].append(published(theirs, code))
            if len(groups) > 1:
                if i:
                    expected["smoothness_high"].append(published(theirs, code[:, :HIGH]))
                expected["smoothness_low"].append(published(theirs, code[:, HIGH:]))
    figures = observer.figures(0)["smoothness"]["figures"]
    means = {name: float(np.mean(values)) if values else None for name, values in expected.items()}
    assert figures == {name: value if value is None else pytest.approx(value) for name, value in means.items()}


@pytest.mark.parametrize("dense", [True, False])
def test_a_jump_across_a_token_that_is_left_out_is_none(split, dense):
    observer = MeasureObserver([SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=2))], split)
    batch = batch_of([6, 5], 0, 0, hole=3)
    f = torch.rand(2, LENGTH, D_SAE, generator=torch.Generator().manual_seed(9))
    f[0] = f[0, 0]
    f[0, 4:] = 9 * f[0, 0]  # the same within both runs, though not across the hole
    x, code = batch.x[batch.counted], f[batch.counted]
    observer.begin(batch, x)
    observer.see(0, code if dense else positive_code(code))
    of_second = published(batch.x[1, :3].double(), f[1, :3].double())  # its last run has one token
    assert observer.figures(0)["smoothness"]["figures"]["smoothness"] == pytest.approx((0 + of_second) / 2)


def test_what_does_not_move_has_no_smoothness(split):
    observer = MeasureObserver([SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=2))], split)
    batch = batch_of([4], 0, 0)
    batch.x[:] = 1.0
    observer.begin(batch, batch.x[batch.counted])
    observer.see(0, torch.ones(4, D_SAE))
    assert set(observer.figures(0)["smoothness"]["figures"].values()) == {None}
