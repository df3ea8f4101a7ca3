"""Promise: the t-sae presets train what the published code of arXiv 2511.05541 trains."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tcsae
from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch
from tcsae.train.losses import auxk
from tcsae.train.losses.t_sae import paired
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

D_MODEL, D_SAE, K, PAIRS = 6, 20, 3, 40


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def published_encode(x, w):
    """Codes of a batch by themselves, and the activations before selection."""
    acts = F.relu((x - w["b_dec"]) @ w["W_enc_rows"].T + w["b_enc"])
    top = acts.flatten().topk(K * len(x))
    return torch.zeros_like(acts).flatten().scatter(0, top.indices, top.values).view_as(acts), acts


def published_loss(x, w, dead, temp_alpha=0.1, auxk_alpha=1 / 32, group_weights=(0.2, 0.8)):
    """`TemporalMatryoshkaBatchTopKTrainer.loss` with the contrastive flag, of x [pairs, 2, d]: current, partner."""
    sizes = [int(0.2 * D_SAE), D_SAE - int(0.2 * D_SAE)]
    f, acts = published_encode(x[:, 0], w)
    f_temp, _ = published_encode(x[:, 1], w)
    f_chunks, W_chunks, temp_chunks = f.split(sizes, 1), w["W_dec"].split(sizes, 0), f_temp.split(sizes, 1)
    x_reconstruct, l2_losses = torch.zeros_like(x[:, 0]) + w["b_dec"], []
    for acts_slice, W_slice, weight in zip(f_chunks, W_chunks, group_weights, strict=True):
        x_reconstruct = x_reconstruct + acts_slice @ W_slice
        l2_losses.append((x[:, 0] - x_reconstruct).pow(2).sum(-1).mean() * weight)
    logits, labels = f_chunks[0] @ temp_chunks[0].T, torch.arange(len(x))
    temp_loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    residual = (x[:, 0] - x_reconstruct).detach()
    auxk_loss = torch.zeros(())
    if dead.any():
        k_aux = min(D_MODEL // 2, int(dead.sum()))
        values, indices = torch.where(dead, acts, -torch.inf).topk(k_aux)
        x_aux = torch.zeros_like(acts).scatter(1, indices, values) @ w["W_dec"]
        variance = (residual - residual.mean(0)).pow(2).sum(-1).mean()
        auxk_loss = (residual - x_aux).pow(2).sum(-1).mean() / variance
    return torch.stack(l2_losses).mean(), auxk_alpha * auxk_loss, temp_alpha * temp_loss


def batch_of(lengths: list[int], width: int = D_MODEL, seed: int = 0) -> Batch:
    n, x = len(lengths), torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return Batch(x, np.array(lengths), np.arange(n) % 3 * 5, np.arange(n) // 2)


def make_trainer(name: str, batch: Batch, *more: str) -> Trainer:
    size = (f"sae.d_sae={D_SAE}", f"sae.k={K}", "steps=5000", *more)
    trainer = Trainer(with_settings(preset(name, D_MODEL), size), batch.x)
    for parameter in trainer.parameters:  # away from the symmetric start
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return trainer


@pytest.mark.parametrize("n_dead", [0, 2, 9])
def test_losses_and_gradients_equal_the_published_ones(n_dead):
    batch = batch_of([2] * PAIRS)
    trainer = make_trainer("t-sae", batch)
    trainer.progress.n_steps, trainer.progress.n_tokens = 1, 2 * PAIRS
    dead = torch.arange(D_SAE) < n_dead
    trainer.tokens_since_fired = dead * 10**9
    weights = {name: one.detach().clone().requires_grad_() for name, one in trainer.sae.named_parameters()}
    x = batch.x.view(PAIRS, 2, D_MODEL).flip(1)
    losses = published_loss(x, weights, dead)
    learned = ("W_enc_rows", "b_enc", "W_dec", "b_dec")
    expected = torch.autograd.grad(sum(losses), [weights[name] for name in learned])
    result = trainer.gradients(batch)
    ours = [result.losses[name] for name in ("reconstruction", "aux", "temporal")]
    assert ours == pytest.approx([one.item() for one in losses], rel=1e-10)
    assert bool(ours[1]) == bool(n_dead)
    for name, grad in zip(learned, expected, strict=True):
        torch.testing.assert_close(getattr(trainer.sae, name).grad, grad)
    torch.testing.assert_close(result.code.dense(), published_encode(x[:, 0], weights)[0])


def test_an_empty_first_group_costs_ln_n():
    batch = batch_of([2] * PAIRS)
    trainer = make_trainer("t-sae", batch)
    trainer.sae.b_enc.data[: D_SAE // 5] = -1e9
    assert trainer.gradients(batch).losses["temporal"] == pytest.approx(0.1 * np.log(PAIRS))


@pytest.mark.slow
def test_the_threshold_follows_as_published():
    """EMA .999 of the smallest activation kept, from step 1001 on; before, it is none."""
    batch = batch_of([2] * PAIRS)
    trainer = make_trainer("t-sae", batch)
    threshold = -1.0
    for step in range(995, 1010):
        trainer.progress.n_steps = step
        trainer.step(batch_of([2] * PAIRS, seed=step))
        result = trainer.gradients(batch_of([2] * PAIRS, seed=step))  # of the weights after: only its form is used
        assert result.batch is not None and len(result.batch.x) == PAIRS
    trainer = make_trainer("t-sae", batch, "optimizer.lr=1e-12")  # weights stay: codes can be had again
    for step in range(995, 1010):
        trainer.progress.n_steps, one = step, batch_of([2] * PAIRS, seed=step)
        weights = {name: tensor.detach().clone() for name, tensor in trainer.sae.named_parameters()}
        trainer.step(one)
        if step > 1000:
            f, _ = published_encode(one.x.view(PAIRS, 2, D_MODEL)[:, 1], weights)
            smallest = f[f > 0].min().item()
            threshold = smallest if threshold < 0 else 0.999 * threshold + 0.001 * smallest
        assert trainer.sae.learned_threshold[0].item() == pytest.approx(max(threshold, 0.0), rel=1e-6)
    assert torch.equal(trainer.finished_sae().learned_threshold, trainer.sae.learned_threshold.detach())


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from(["previous", "past"]),
    st.integers(1, 4),
    st.sampled_from(["text", "segment"]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_pairs_lie_in_one_segment_and_in_order(lengths, partner, per_segment, order, seed):
    tokens = torch.arange(sum(lengths), dtype=torch.float64)[:, None].expand(-1, 3)
    batch = batch_of(lengths)._replace(x=tokens)
    settings_ = (f"temporal.contrast.partner={partner}", f"temporal.contrast.per_segment={per_segment}")
    config = with_settings(preset("t-sae", 3), [*settings_, f"temporal.order={order}"]).temporal
    current, partners = paired(config, batch, seed)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    a, b = current.x[:, 0].long().numpy(), partners[:, 0].long().numpy()
    assert (segment[a] == segment[b]).all()
    assert np.bincount(segment[a], minlength=len(lengths)).tolist() == [min(n - 1, per_segment) for n in lengths]
    assert len(set(a.tolist())) == len(a)
    assert current.documents.tolist() == batch.documents[segment[a]].tolist()
    if order == "text":
        assert (a - b == 1).all() if partner == "previous" else (a > b).all()
        place = np.arange(sum(lengths)) - (np.cumsum(lengths) - lengths)[segment] + batch.starts[segment]
        assert current.starts.tolist() == place[a].tolist()


def test_past_partners_come_from_everywhere_before():
    config = with_settings(preset("t-sae-past", 3), ["temporal.contrast.per_segment=1000"]).temporal
    batch = batch_of([30])._replace(x=torch.arange(30, dtype=torch.float64)[:, None].expand(-1, 3))
    lags: dict[int, set[int]] = {}
    for seed in range(300):
        current, partners = paired(config, batch, seed)
        for a, b in zip(current.x[:, 0].tolist(), partners[:, 0].tolist(), strict=True):
            lags.setdefault(int(a), set()).add(int(a - b))
    assert all(lags[t] == set(range(1, t + 1)) for t in range(1, 30))


@pytest.mark.parametrize("lengths", [[1, 1], [1, 2, 1], [2]])
def test_batches_of_hardly_any_pair_are_trained(lengths):
    batch = batch_of(lengths)
    trainer = make_trainer("t-sae", batch_of([2] * PAIRS))
    result = trainer.step(batch)
    assert np.isfinite(list(result.losses.values())).all()
    assert auxk.AUX_TOKENS >= PAIRS, "all tokens, as in the published code"


@pytest.mark.parametrize("threshold", [-1.0, 0.7])
def test_its_published_folders_are_read(tmp_path, threshold):
    """trainer_0 of a run there, with two groups that are no whole share of the latents."""
    torch.set_default_dtype(torch.float32)
    folder, sizes = tmp_path / "trainer_0", [int(0.2 * 23), 23 - int(0.2 * 23)]
    folder.mkdir()
    w = {"W_enc": torch.randn(D_MODEL, 23), "b_enc": torch.randn(23), "b_dec": torch.randn(D_MODEL)}
    w["W_dec"] = F.normalize(torch.randn(23, D_MODEL), dim=1)
    scalars = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    torch.save(w | scalars | {"group_sizes": torch.tensor(sizes)}, folder / "ae.pt")
    trainer = {"dict_class": "TemporalMatryoshkaBatchTopKSAE", "temporal": "r", "layer": 8, "k": K, "lm_name": "pythia"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 256}}))
    sae, x = tcsae.load_sae(tmp_path, subfolder="trainer_0"), torch.randn(30, D_MODEL)
    post = F.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    expected = post * (post > threshold)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), expected @ w["W_dec"] + w["b_dec"])
    assert sae.config.group_ranges() == [(0, sizes[0]), (sizes[0], 23)]
    assert sae.metadata.hook == "blocks.8.hook_resid_post"
