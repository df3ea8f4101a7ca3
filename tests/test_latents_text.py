"""Promise: what text says of latents (splitting, absorption, predictability, intruders) is what was planted in it."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from tcsae.evaluate.dictionary.cofiring import shifted
from tcsae.evaluate.latents.intruder import CHANCE, context_vectors, intruder
from tcsae.evaluate.latents.material import Coded, Sequences
from tcsae.evaluate.latents.predictability import Contexts, gram_rates, ids_before, predicted, summary
from tcsae.evaluate.latents.token_absorption import (
    best_threshold,
    f1,
    id_labels,
    permuted_ids,
    splitting,
    token_labels,
)
from tcsae.evaluate.probing.suite import choose_tokens, halves
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.create import create_store
from tcsae.shared.store.reader import open_store

LENGTH, N, D = 32, 160, 12
ABSORBED = range(10, 18)
"""Ids that begin with a, like 0 to 9, each with a latent of its own: dimensions 1 to 8."""
TEXTS = {i: f" a{i}" for i in range(18)} | {i: f"b{i}" for i in range(20, 30)} | {i: f" c{i}" for i in range(30, 40)}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Dimension 0: begins with a. 9: begins with c and a low number, 10: the other c. 11: noise."""
    rng = np.random.default_rng(0)
    weights = np.array([0.04] * 10 + [0.007] * 8 + [0, 0] + [0.024] * 10 + [0.03] * 10)
    path = tmp_path_factory.mktemp("text") / "a.zarr"
    with create_store(path, hooks={"h": D}, sequence_length=LENGTH) as writer:
        for split, first in (("train", 0), ("eval", 1000)):
            ids = rng.choice(40, (N, LENGTH), p=weights / weights.sum())
            x = np.zeros((N, LENGTH, D), np.float32)
            x[..., 0] = ids < 18
            for one in ABSORBED:
                x[ids == one, one - 9] = 1
            x[..., 9], x[..., 10] = (ids >= 30) & (ids < 35), ids >= 35
            x[..., 11] = rng.normal(size=ids.shape)
            writer.append(split, {"h": x}, documents=first + np.arange(N) // 2, tokens=ids)
    return Sequences(choose_tokens(open_store(path), "h", 0, None))


def sae(absorbs: bool) -> SparseAutoencoder:
    """A latent for each dimension; if it absorbs, that of "a" is off where that of an id is on, which says both."""
    one = SparseAutoencoder(SaeConfig(d_model=D, d_sae=D, activation="relu"))
    encoder, decoder = torch.eye(D), torch.eye(D)
    if absorbs:
        encoder[0, 1:9] = -5
        decoder[1:9, 0] = 1
    one.W_enc_rows.data, one.W_dec.data = encoder, decoder
    return one


def train_half(sequences) -> np.ndarray:
    return halves([str(one) for one in sequences.tokens.documents])


@pytest.mark.parametrize("absorbs", [True, False])
def test_absorption_is_what_was_planted(sequences, absorbs):
    train, ids = train_half(sequences), sequences.tokens.ids
    labels = token_labels(ids, id_labels(TEXTS), train)
    names = [one.name for one in labels]
    assert names == ["first_letter_a", "first_letter_b", "first_letter_c", "leading_space"], "digit is in every token"
    measured = splitting(Coded(sequences, sae(absorbs)), labels, train)["labels"]
    of_a, of_c = measured["first_letter_a"], measured["first_letter_c"]
    share = float(np.isin(ids[~train & (ids < 18)], ABSORBED).mean())
    assert of_a["absorption"] == pytest.approx(share if absorbs else 0) and share > 0.08
    assert of_a["x_f1"] > 0.99 and of_a["splits"] == 1 and of_a["latents"] == [0]
    assert of_a["label_f1"] == pytest.approx(2 * (1 - share) / (2 - share) if absorbs else 1)
    assert of_c["splits"] == 2 and sorted(of_c["latents"]) == [9, 10]
    assert of_c["split_f1"] == 1 > of_c["label_f1"] and of_c["absorption"] == 0


def test_labels_of_permuted_ids_are_no_latents(sequences):
    train, of_a = train_half(sequences), {}
    for name, labels in (("real", id_labels(TEXTS)), ("null", permuted_ids(id_labels(TEXTS)))):
        frequent = token_labels(sequences.tokens.ids, labels, train)
        of_a[name] = splitting(Coded(sequences, sae(False)), frequent, train)["labels"]["first_letter_a"]
    assert of_a["real"]["label_f1"] == 1 and of_a["null"]["label_f1"] < 0.75
    assert of_a["real"]["absorption"] == 0 and of_a["null"]["absorption"] is None


def test_rare_labels_are_none(sequences):
    train = train_half(sequences) & False
    labels = token_labels(sequences.tokens.ids, id_labels(TEXTS), train)
    measured = splitting(Coded(sequences, sae(False)), labels, train)
    assert labels == [] and measured["labels"] == {} and measured["figures"]["label_f1"] is None


def test_the_best_threshold_is_the_best():
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    best = max(f1(scores > one, truth) for one in np.arange(-1, 6) + 0.5)
    assert f1(scores > best_threshold(scores, truth), truth) == pytest.approx(best)


def test_rates_leave_a_token_out_of_its_own():
    rng = np.random.default_rng(2)
    gram, fires, train = rng.integers(0, 5, 60), rng.random(60) < 0.3, rng.random(60) < 0.6
    prior = rng.random(60)
    rates = gram_rates(gram, fires, train, prior)
    for t in range(60):
        others = [i for i in range(60) if train[i] and gram[i] == gram[t] and i != t]
        assert rates[t] == pytest.approx((sum(fires[others]) + 2 * prior[t]) / (len(others) + 2))


@pytest.fixture(scope="module")
def planted(sequences):
    """Latents on after: id 3; id 3 before id 20 to 39; where a label says so; a coin."""
    rng = np.random.default_rng(3)
    now, last = ids_before(sequences, 0), ids_before(sequences, 1)
    label = rng.random(len(now)) < 0.2
    coin = rng.random(len(now)) < 0.05
    return csr_array(np.stack([now == 3, (now < 10) & (last < 10) & (now == last), label, coin], 1)), label


def test_predictability_is_what_was_planted(sequences, planted):
    on, label = planted
    contexts = Contexts(sequences, [label.astype(np.int8)], train_half(sequences))
    aucs = predicted(contexts, on)
    assert aucs.token[0] > 0.999 and aucs.ngram[0] > 0.99
    assert aucs.token[1] < 0.9 < 0.97 < aucs.ngram[1] and aucs.text[1] > 0.97
    assert aucs.ngram[2] < 0.6 and aucs.text[2] > 0.999
    assert all(abs(one[3] - 0.5) < 0.1 for one in aucs)
    assert summary(aucs)["readable"] == 0.75
    assert summary(predicted(contexts, csr_array(on.shape)))["readable"] is None


def test_shifted_firings_are_not_predictable(sequences, planted):
    on, label = planted
    contexts = Contexts(sequences, [label.astype(np.int8)], train_half(sequences))
    null = predicted(contexts, shifted(csr_array(on), seed=4))
    assert np.abs(np.array(null) - 0.5).max() < 0.12 and summary(null)["readable"] == 0


def test_intruders_are_found_where_contexts_are_alike(sequences, planted):
    on, _ = planted
    vectors = context_vectors(sequences)
    assert np.asarray(vectors.power(2).sum(1)).ravel() == pytest.approx(1)
    shares = intruder(vectors, on, sequences.tokens.documents)
    assert shares[0] > 0.85 and abs(shares[3] - CHANCE) < 0.25
    null = intruder(vectors, shifted(csr_array(on), seed=5), sequences.tokens.documents)
    assert abs(null.mean() - CHANCE) < 0.15
    assert np.isnan(intruder(vectors, csr_array(on.shape), sequences.tokens.documents)).all()


def test_context_vectors_by_hand(sequences):
    """tf-idf cosines of two tokens against plain dictionaries."""
    vectors = context_vectors(sequences)
    n = vectors.shape[0]
    words = [
        [word for back in range(8) if (word := int(ids_before(sequences, back)[t])) >= 0]
        + [f"{back}:{int(ids_before(sequences, back)[t])}" for back in range(2) if ids_before(sequences, back)[t] >= 0]
        for t in (5, 40)
    ]
    held: dict = {}
    for back in range(8):
        ids = ids_before(sequences, back)
        for t in range(n):
            if ids[t] >= 0:
                held.setdefault(int(ids[t]), set()).add(t)
                if back < 2:
                    held.setdefault(f"{back}:{ids[t]}", set()).add(t)
    weights = [{w: text.count(w) * np.log((1 + n) / (1 + len(held[w]))) for w in set(text)} for text in words]
    dot = sum(weights[0][w] * weights[1].get(w, 0) for w in weights[0])
    norms = [np.sqrt(sum(v**2 for v in one.values())) for one in weights]
    assert (vectors[[5]] @ vectors[[40]].T).toarray()[0, 0] == pytest.approx(dot / norms[0] / norms[1])
