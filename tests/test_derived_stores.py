"""Promise: a store less the means of tokens and positions has what least squares leaves, and is made whole or again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.paper import derived_stores
from tcsae.paper.derived_stores import centred_store, fit_means, moments_store
from tcsae.shared.store.create import create_store
from tcsae.shared.store.format import SPLITS
from tcsae.shared.store.reader import Split, open_store


class Fake(Split):
    """Sequences in memory, as far as the fit reads them."""

    def __init__(self, x: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.x, self.tokens, self.lengths, self.n_sequences = x, tokens, lengths, len(x)
        self.store = self

    def d_model(self, hook: str) -> int:  # noqa: ARG002
        return self.x.shape[2]

    def read(self, hook: str, start: int, stop: int) -> np.ndarray:  # noqa: ARG002
        return self.x[start:stop]


def valid(split) -> np.ndarray:
    return np.arange(split.tokens.shape[1]) < split.lengths[:, None]


def design(tokens: np.ndarray, at: np.ndarray, n_ids: int, length: int) -> np.ndarray:
    return np.concatenate([np.eye(n_ids)[tokens], np.eye(length)[at]], axis=1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.integers(1, 8))
def test_what_is_left_is_what_least_squares_leaves(seed, n, length, n_ids):
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, n_ids, (n, length)), rng.integers(1, length + 1, n)
    x = (rng.normal(size=(n, length, 3)) + 5 * tokens[..., None] + np.arange(length)[None, :, None]).astype(np.float32)
    split = Fake(x, tokens, lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived_stores, "BLOCK", 2)
        means = fit_means(split, "h")
    here = valid(split)
    left = (x - means.at(tokens))[here]
    columns = design(tokens[here], np.nonzero(here)[1], n_ids, length)
    fitted = columns @ np.linalg.lstsq(columns, x[here].astype(float), rcond=None)[0]
    np.testing.assert_allclose(left, x[here] - fitted, atol=1e-3)
    np.testing.assert_allclose(means.position[np.nonzero(here)[1]].mean(0), 0, atol=1e-4)


def test_a_token_that_was_not_seen_has_the_mean_over_tokens():
    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    means = fit_means(Fake(x, np.array([[0, 2], [2, 0]]), np.array([2, 2])), "h")
    for unseen in (1, 3, 50):
        np.testing.assert_allclose(means.at(np.array([[unseen, unseen]])).mean((0, 1)), x.mean((0, 1)), rtol=1e-6)


HOOK, LENGTH, N_IDS = "h", 6, 7


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a token and a position give, and noise; documents of two sequences."""
    rng, location = np.random.default_rng(0), tmp_path_factory.mktemp("source") / "a.zarr"
    of_token, of_position = rng.normal(size=(N_IDS, 4)) * 5, rng.normal(size=(LENGTH, 4)) * 3
    with create_store(location, hooks={HOOK: 4}, sequence_length=LENGTH) as store:
        for split, n, first in (("train", 300, 0), ("eval", 40, 150)):
            tokens = rng.integers(0, N_IDS, (n, LENGTH))
            x = of_token[tokens] + of_position + rng.normal(size=(n, LENGTH, 4))
            lengths = rng.integers(2, LENGTH + 1, n)
            store.append(split, {HOOK: x}, tokens=tokens, lengths=lengths, documents=first + np.arange(n) // 2)
    return open_store(location)


def test_both_splits_have_the_same_sequences_less_the_means_of_the_train_split(source, tmp_path):
    made = centred_store(str(tmp_path / "centred.zarr"), source)
    means = fit_means(source.train, HOOK)
    for name in SPLITS:
        ours, theirs = made.split(name), source.split(name)
        for one in ("tokens", "lengths", "documents", "starts"):
            np.testing.assert_array_equal(getattr(ours, one), getattr(theirs, one))
        here = valid(theirs)
        x, of_source = (np.asarray(one.read(HOOK, 0, one.n_sequences), np.float32)[here] for one in (ours, theirs))
        np.testing.assert_allclose(x, of_source - means.at(theirs.tokens)[here], atol=2e-3)
        assert x.var() < 1.2 < 20 < of_source.var()


@pytest.mark.parametrize("make", [centred_store, lambda location, source: moments_store(location)])  # noqa: ARG005
def test_one_that_is_there_is_opened_and_one_that_was_interrupted_is_made_again(source, tmp_path, make):
    made, location = make(str(tmp_path / "whole.zarr"), source), str(tmp_path / "a.zarr")
    name = made.manifest.recipe.corpus.name
    killed = create_store(location, hooks={"other": 3}, sequence_length=2, source=name)
    killed.append("train", {"other": np.ones((2, 2, 3))})
    killed._writer.close()  # as a kill leaves it: nothing sealed, nothing deleted
    first = make(location, source)
    assert first.hooks == made.hooks and first.content == made.content
    assert make(location, source).manifest == first.manifest


def test_one_of_another_source_is_made_again(source, tmp_path):
    location, other = str(tmp_path / "a.zarr"), str(tmp_path / "other.zarr")
    with create_store(other, hooks={HOOK: 4}, sequence_length=LENGTH) as store:
        store.append("train", {HOOK: np.random.default_rng(1).normal(size=(9, LENGTH, 4))})
    before = centred_store(location, open_store(other))
    after = centred_store(location, source)
    assert before.train.n_sequences == 9 and after.train.n_sequences == source.train.n_sequences
