"""Promise: every token of every kept document stands in exactly one sequence, in order; what is left out is counted."""

import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcsae.harvest.sequences import Sequencer, budgets, check_sequences, cut, split_of
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.store.format import SPLITS, SequenceRecipe

BOS, PAD = 901, 900


@st.composite
def recipes(draw):
    length = draw(st.integers(2, 9))
    return SequenceRecipe(
        length=length,
        min_length=draw(st.integers(1, length)),
        prepend_bos=draw(st.booleans()),
        pad_id=PAD,
    )


documents = st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 30)), max_size=25)
some_budgets = st.fixed_dictionaries({"train": st.integers(1, 120), "eval": st.integers(1, 40)})


def feed(sequencer, texts, start=0):
    """What the harvest does: documents in order until both splits are full. Returns rows per split."""
    first = 0
    for number, (split, n) in enumerate(texts):
        if number >= start and not sequencer.done:
            sequencer.add(split, range(first, first + n))
        first += n
    return sequencer.take_rows()


def naive_sequences(texts, recipe, budget, split):
    """Slices of plain lists, one split at a time: (row without padding, document, start)."""
    result, first, size = [], 0, recipe.length - recipe.prepend_bos
    for number, (its_split, n) in enumerate(texts):
        ids = list(range(first, first + n))
        first += n
        for start in range(0, n, size):
            row = [BOS] * recipe.prepend_bos + ids[start : start + size]
            n_before = sum(len(one) for one, _, _ in result)
            if its_split == split and len(row) >= recipe.min_length and n_before < budget:
                result.append((row, number, start))
    return result


@given(documents, recipes(), some_budgets)
@example([("train", 9), ("eval", 0), ("train", 2)], SequenceRecipe(length=4, pad_id=PAD), {"train": 5, "eval": 1})
def test_sequences_equal_naive_slicing(texts, recipe, budget):
    rows = feed(Sequencer(recipe, budget, BOS), texts)
    for split in SPLITS:
        expected = naive_sequences(texts, recipe, budget[split], split)
        assert rows[split].lengths.tolist() == [len(row) for row, _, _ in expected]
        assert rows[split].documents.tolist() == [number for _, number, _ in expected]
        assert rows[split].starts.tolist() == [start for _, _, start in expected]
        padded = [row + [PAD] * (recipe.length - len(row)) for row, _, _ in expected]
        assert rows[split].tokens.tolist() == padded
        assert rows[split].tokens.shape == (len(expected), recipe.length)


@given(documents, recipes(), some_budgets)
def test_counts_in_are_counts_out(texts, recipe, budget):
    sequencer = Sequencer(recipe, budget, BOS)
    rows = feed(sequencer, texts)
    counts = sequencer.counts
    for split in SPLITS:
        assert counts[split]["sequences"] == len(rows[split].lengths)
        assert counts[split]["tokens"] == rows[split].lengths.sum()
        assert counts[split]["documents"] == len(set(rows[split].documents))
    kept = sum(counts[split]["documents"] for split in SPLITS)
    assert counts["documents_read"] == kept + counts["documents_empty"] + counts["documents_skipped"]
    n_rows = sum(counts[split]["sequences"] for split in SPLITS)
    text_tokens = sum(counts[split]["tokens"] for split in SPLITS) - n_rows * recipe.prepend_bos
    assert counts["tokens_read"] == text_tokens + counts["tokens_dropped_short"] + counts["tokens_beyond_budget"]
    if not sequencer.done:
        assert counts["documents_read"] == len(texts)


@given(documents, recipes(), some_budgets, st.integers(0, 25))
def test_a_second_start_from_the_counts_goes_on_exactly(texts, recipe, budget, stop):
    whole = Sequencer(recipe, budget, BOS)
    expected = feed(whole, texts)
    first = Sequencer(recipe, budget, BOS)
    before = feed(first, texts[:stop])
    second = Sequencer(recipe, budget, BOS, first.counts)
    after = feed(second, texts, start=second.counts["documents_read"])
    for split in SPLITS:
        for name, values in expected[split].arrays().items():
            halves = [getattr(before[split], name), getattr(after[split], name)]
            np.testing.assert_array_equal(np.concatenate(halves), values)
    assert second.counts == whole.counts


@given(st.integers(0, 1000), recipes())
def test_pieces_are_consecutive_and_only_a_short_last_one_is_missing(n_tokens, recipe):
    pieces = cut(n_tokens, recipe)
    size = recipe.length - recipe.prepend_bos
    covered = [i for start, stop in pieces for i in range(start, stop)]
    assert covered == list(range(len(covered)))
    assert all(stop - start == size for start, stop in pieces[:-1])
    left = n_tokens - len(covered)
    assert left == 0 or left + recipe.prepend_bos < recipe.min_length


def test_the_split_is_the_remainder_of_the_whole_digest():
    texts = [f"document {i}" for i in range(400)]
    for every in (2, 20):
        expected = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % every == 0 for text in texts]
        assert [split_of(text, every) == "eval" for text in texts] == expected
        assert 0 < sum(expected) < len(texts)


@pytest.mark.parametrize(
    "n_tokens, every, n_eval",
    [(1_000_000, 20, 100_000), (50_000_000, 20, 2_500_000), (100_000, 20, 10_000), (100_000, 4, 25_000)],
)
def test_eval_gets_its_share_and_more_of_a_small_harvest(n_tokens, every, n_eval):
    assert budgets(n_tokens, every) == {"train": n_tokens - n_eval, "eval": n_eval}


@pytest.mark.parametrize(
    "recipe, n_tokens, words",
    [
        (SequenceRecipe(length=1), 1000, "--sequence-length 1: at least 2"),
        (SequenceRecipe(length=8, min_length=9), 1000, "--min-length 9: from 1 to the sequence length, 8"),
        (SequenceRecipe(eval_every=1), 5000, "--eval-every 1: at least 2"),
        (SequenceRecipe(length=128), 1279, "--tokens 1279: at least ten sequences, 1280"),
    ],
)
def test_impossible_settings_are_refused(recipe, n_tokens, words):
    with pytest.raises(ConfigError, match=words):
        check_sequences(recipe, n_tokens)
