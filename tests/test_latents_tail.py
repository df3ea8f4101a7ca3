"""Promise: ablating and steering a latent through the tail is what the whole language model says of it."""

import numpy as np
import pytest
import torch
import toy_eval
from torch.nn import functional

from tcsae.evaluate.latents.ablation import LAGS, ablated, ev_lost, kl_after, later_share
from tcsae.evaluate.latents.material import Coded, Sequences
from tcsae.evaluate.latents.steering import STEER_KL, places, steered
from tcsae.evaluate.probing.suite import choose_tokens
from tcsae.shared.lm.tail import Tail

SKIP = 1


class Toy:
    def __init__(self, folder, layer_norm: str = "none") -> None:
        self.model = toy_eval.make_model()
        self.store = toy_eval.write_store(folder / "a.zarr", self.model, {"train": 4, "eval": 10})
        self.sequences = Sequences(choose_tokens(self.store, toy_eval.HOOK, SKIP, None))
        self.sae = toy_eval.make_sae(layer_norm=layer_norm)
        self.coded = Coded(self.sequences, self.sae)
        self.tail = Tail.load(self.store.tail_path(toy_eval.HOOK))

    @torch.no_grad()
    def log_probs(self, sequence: int, change: torch.Tensor | None = None) -> torch.Tensor:
        """Of the whole model, its activations at the hook replaced by the stored ones plus a change."""
        split = self.store.eval
        n = int(split.lengths[sequence])
        x = torch.from_numpy(split.read(toy_eval.HOOK, sequence, sequence + 1)).float()[:, :n]
        given = x if change is None else x + change

        def replace(_module, _inputs, out):
            return given if torch.is_tensor(out) else (given, *out[1:])

        handle = self.model.gpt_neox.layers[toy_eval.LAYER].register_forward_hook(replace)
        ids = torch.from_numpy(split.tokens[sequence, :n]).long()[None]
        logits = self.model(ids).logits[0]
        handle.remove()
        return logits.log_softmax(-1)

    @torch.no_grad()
    def contribution(self, sequence: int, latents) -> torch.Tensor:
        """As the difference of two decodings of dense codes."""
        n = int(self.store.eval.lengths[sequence])
        x = torch.from_numpy(self.store.eval.read(toy_eval.HOOK, sequence, sequence + 1)).float()[0, :n]
        code = self.sae.encode(x)
        without = code.clone()
        without[:, list(latents)] = 0
        difference = self.sae.decode(code, x) - self.sae.decode(without, x)
        difference[:SKIP] = 0
        return difference

    def naive(self, latents) -> tuple[float, float, float]:
        """Cross-entropy and KL of ablating latents everywhere, and EV lost: token by token, in whole-model runs."""
        split, ce, kl, n, n_predictions = self.store.eval, 0.0, 0.0, 0, 0
        before = after = 0.0
        kept = []
        for sequence in range(split.n_sequences):
            length = int(split.lengths[sequence])
            change = -self.contribution(sequence, latents)
            clean, changed = self.log_probs(sequence), self.log_probs(sequence, change)
            ids = torch.from_numpy(split.tokens[sequence, :length]).long()
            for i in range(SKIP, length - 1):
                ce += float(
                    functional.nll_loss(changed[i : i + 1], ids[i + 1 : i + 2])
                    - functional.nll_loss(clean[i : i + 1], ids[i + 1 : i + 2])
                )
                n_predictions += 1
            kl += float((clean.exp() * (clean - changed)).sum(-1)[SKIP:].sum())
            n += max(0, length - SKIP)
            x = torch.from_numpy(split.read(toy_eval.HOOK, sequence, sequence + 1)).float()[0, SKIP:length]
            with torch.no_grad():
                x_hat = self.sae(x)
            before += float((x - x_hat).square().sum())
            after += float((x - x_hat - change[SKIP:]).square().sum())
            kept.append(x)
        x = torch.cat(kept)
        return ce / n_predictions, kl / n, (after - before) / float((x - x.mean(0)).square().sum())


@pytest.fixture(scope="module", params=["none", "in_out"])
def toy(request, tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("latents"), request.param)


def frequent(coded: Coded, n: int) -> list[int]:
    return np.argsort(-coded.n_firings)[:n].tolist()


def test_ablation_is_the_whole_models(toy):
    first, second, third = frequent(toy.coded, 3)
    items = [[first], [second], [first, second, third], [3]]  # 3 is dead
    result, lost = ablated(toy.coded, toy.tail, items, 1000), ev_lost(toy.coded)
    for i, latents in enumerate(items[:3]):
        ce, kl, ev = toy.naive(latents)
        assert result.ce[i] == pytest.approx(ce, rel=2e-3, abs=2e-6)
        assert result.kl[i] == pytest.approx(kl, rel=2e-3, abs=2e-6)
        if len(latents) == 1:
            assert lost[latents[0]] == pytest.approx(ev, rel=1e-3)
            assert result.ce_per_firing[i] * toy.coded.n_firings[latents[0]] == pytest.approx(
                result.ce[i] * toy.sequences.n_predictions
            )
    assert result.ce[3] == result.kl[3] == result.n_sequences[3] == 0, "what is never on costs nothing"
    assert (result.n_seen == result.n_sequences).all()


def test_a_part_of_the_sequences_is_scaled_up(toy):
    items = [[one] for one in frequent(toy.coded, 6)]
    part = ablated(toy.coded, toy.tail, items, 2)
    whole = ablated(toy.coded, toy.tail, items, 1000)
    assert (part.n_seen == np.minimum(part.n_sequences, 2)).all() and (part.n_sequences == whole.n_sequences).all()
    assert np.corrcoef(part.kl, whole.kl)[0, 1] > 0.3


def test_kl_after_one_token_and_over_a_span(toy):
    """Every event of one latent against whole-model runs."""
    (latent,) = frequent(toy.coded, 1)
    result = kl_after(toy.coded, toy.tail, [[latent]], 10_000)[0]
    sums, counts = np.zeros((2, LAGS + 1)), np.zeros((2, LAGS + 1))
    for sequence in range(toy.store.eval.n_sequences):
        whole = -toy.contribution(sequence, [latent])
        for at in np.flatnonzero(whole.any(1).numpy()):
            if at + 1 >= len(whole):
                continue
            clean = toy.log_probs(sequence)
            one, span = torch.zeros(2, *whole.shape)
            one[at], span[at : at + LAGS + 1] = whole[at], whole[at : at + LAGS + 1]
            for i, change in enumerate((one, span)):
                changed = toy.log_probs(sequence, change)
                kl = (clean.exp() * (clean - changed)).sum(-1)[at:].numpy()[: LAGS + 1]
                sums[i, : len(kl)] += kl
                counts[i, : len(kl)] += 1
    with np.errstate(invalid="ignore"):
        expected = sums / counts
    assert np.array_equal(np.isnan(result[:2]), np.isnan(expected)) and not np.isnan(expected[:, 0]).any()
    assert np.nan_to_num(result[:2]) == pytest.approx(np.nan_to_num(expected), rel=5e-3, abs=2e-6)
    assert result[2, 0] > 0, "the random direction is as long"
    share = later_share(result)
    assert 0 < share[0] < 1 and share[1] >= share[0] * 0.5


def test_steering_reaches_the_same_kl_and_promotes_what_it_points_at(toy):
    at = places(toy.sequences, 5)
    assert len(set(at)) == 5
    unembedding = toy.model.get_output_embeddings().weight.detach().numpy()
    directions = np.stack([toy.coded.rows[frequent(toy.coded, 1)[0]], 100 * unembedding[7], np.zeros(16, np.float32)])
    result = steered(toy.sequences, toy.tail, directions.astype(np.float32), at)
    assert result.kl[:2, 0] == pytest.approx(STEER_KL, rel=0.06)
    assert np.isnan(result.strength[2]) and np.isnan(result.kl[2]).all()
    median = float(np.median(torch.linalg.vector_norm(toy.sequences.x, dim=1)))
    unit = torch.from_numpy(directions[0] / np.linalg.norm(directions[0]))
    side, kl = [], []
    for sequence, position in at:
        change = torch.zeros(int(toy.sequences.lengths[sequence]), 16)
        change[position] = unit * float(result.strength[0] * median)
        clean, changed = toy.log_probs(sequence), toy.log_probs(sequence, change)
        kl.append(float((clean.exp() * (clean - changed)).sum(-1)[position]))
        ids = torch.from_numpy(toy.store.eval.tokens[sequence]).long()
        last = min(position + LAGS, len(change) - 2)
        side += [float(clean[i, ids[i + 1]] - changed[i, ids[i + 1]]) for i in range(position + 1, last + 1)]
    assert result.kl[0, 0] == pytest.approx(np.mean(kl), rel=1e-2)
    assert result.side_effect[0] == pytest.approx(np.mean(side), rel=2e-2, abs=1e-5)


def test_a_direction_of_its_own_token_promotes_it(toy):
    """With the final norm alone as the tail, the unembedding's row raises its own token."""
    from tcsae.shared.lm.tail import make_tail

    lens = Tail(make_tail(toy.tail.model, toy.tail.n_layers))
    unembedding = toy.model.get_output_embeddings().weight.detach().numpy()
    rows = unembedding[[7, 30, 55]]
    result = steered(toy.sequences, lens, rows - rows.mean(1, keepdims=True), places(toy.sequences, 6))
    assert all(token in result.promoted[i, 0] for i, token in enumerate((7, 30, 55)))
    assert np.nan_to_num(result.kl[:, 1:]).max() < 1e-6, "no attention, so nothing comes later"
    assert np.nan_to_num(result.side_effect) == pytest.approx(0, abs=1e-6)
