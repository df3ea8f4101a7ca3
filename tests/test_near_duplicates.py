"""Near-duplicates: the filter does what its rule says, and what it leaves repeats nothing from train in eval."""

import random
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcsae.data.near_duplicates import drop_near_duplicates, n_contained, shingles

WORDS = [f"{a}{b}" for a in "kmnprstvz" for b in ("ab", "eg", "il", "on", "ur", "ash", "elt", "ond")]


def prose(seed: int, n_words: int = 60) -> str:
    """More than 200 characters that share no run of 8 words with any other seed's."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def test_near_duplicates_go_and_the_longest_stays():
    base = prose(1, 100)
    texts = {
        "base": base,
        "opening": base[:130] + " " + prose(2, 20),
        "layout": base.upper().replace(" ", "\n")[1:],
        "middle": prose(3, 20) + base[100:500],
        "other": prose(4),
        "version 1": f"Version 1.25 of 2019. {prose(5)}",
        "version 2": f"Version 12.5 of 2026. {prose(5)}",
    }
    filtered = drop_near_duplicates(list(texts.values()))

    kept = [list(texts)[i] for i in filtered.kept]
    assert kept in (["base", "other", "version 1"], ["base", "other", "version 2"])
    assert (filtered.n_same_opening, filtered.n_overlapping) == (2, 2)


def test_text_put_together_from_several_documents_is_found():
    parts = [prose(seed, 80) for seed in range(3)]
    patchwork = " ".join(" ".join(part.split()[20:50]) for part in parts)
    assert drop_near_duplicates([*parts, patchwork]).kept == [0, 1, 2]


def naive_runs(text: str) -> set[str]:
    words = re.sub(r"[0-9]+", "0", re.sub(r"[ \n]+", " ", text.lower()).strip()).split(" ")
    return {" ".join(words[i : i + 8]) for i in range(len(words)) if i + 8 <= len(words)} or {" ".join(words)}


def naive_opening(text: str) -> str:
    return re.sub(r"[0-9]+", "0", re.sub(r"[ \n]+", " ", text.lower()).strip())[:120]


def naive_repeats(text: str, others: list[str]) -> bool:
    elsewhere = {run for other in others for run in naive_runs(other)}
    return len(naive_runs(text) & elsewhere) / len(naive_runs(text)) >= 0.5


def naive_filter(texts: list[str]) -> set[str]:
    """By the words of the rule, with sets of strings and no counts."""
    left = set(texts)
    for text in sorted(texts, key=lambda text: (len(text), text)):
        others = sorted(left - {text})
        if naive_opening(text) in map(naive_opening, others) or naive_repeats(text, others):
            left.remove(text)
    return left


# Few phrases, so that texts share openings, middles and all between.
phrases = st.sampled_from([prose(seed, 4 + seed) for seed in range(9)] + ["A 1\n 22 b", "a 333 b", "v2"])
texts_strategy = st.lists(st.lists(phrases, min_size=1, max_size=12).map(" ".join), unique=True, max_size=9)


@settings(deadline=None)
@given(texts_strategy)
@example([])
@example(["v2"])
@example([prose(1), prose(1).upper()])
def test_the_filter_equals_a_naive_one_whatever_the_order(texts: list[str]):
    expected = naive_filter(texts)
    for order in (texts, texts[::-1], sorted(texts)):
        filtered = drop_near_duplicates(order)
        assert {order[i] for i in filtered.kept} == expected
        assert len(filtered.kept) + filtered.n_same_opening + filtered.n_overlapping == len(texts)
        assert filtered.kept == sorted(filtered.kept)


@settings(deadline=None)
@given(texts_strategy)
def test_what_remains_repeats_nothing_in_any_split(texts: list[str]):
    kept = [texts[i] for i in drop_near_duplicates(texts).kept]
    assert len({naive_opening(text) for text in kept}) == len(kept)
    for text in kept:
        assert not naive_repeats(text, [other for other in kept if other != text])


@settings(deadline=None)
@given(texts_strategy, texts_strategy)
def test_leakage_is_counted_as_a_naive_count(texts: list[str], others: list[str]):
    assert n_contained(texts, others) == sum(naive_repeats(text, others) for text in texts)


def test_shingles_are_the_same_in_every_process():
    words = "a b c d e f g h i"
    assert sorted(shingles(words).tolist()) == [443108100, 2551299518]
