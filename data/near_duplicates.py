"""Near-duplicates: documents that say again what others say, so that none stands in train while its twin is in eval.

Texts are compared after normalisation: lower case, any white space as one space, any number as 0. Two rules, each with
a guarantee over the documents that remain:

- no two have the same opening (first 120 characters);
- in none does half of its shingles (distinct runs of 8 words) stand in the others taken together.

The second is the containment of A. Broder, "On the resemblance and containment of documents" (1997), against the union
of all others: text put together from several documents is found too. The shortest documents are asked first, so the
fullest account of a thing stays.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32
from numpy import ndarray

OPENING_CHARACTERS = 120
SHINGLE_WORDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Filtered:
    """What `drop_near_duplicates` left, and why it dropped the rest."""

    kept: list[int]
    """Indices into the given texts, ascending."""
    n_same_opening: int
    n_overlapping: int


def normalise(text: str) -> str:
    """Lower case, white space as single spaces, numbers as 0: versions, dates and layout make no difference."""
    return re.sub(r"\d+", "0", " ".join(text.lower().split()))


def shingles(text: str) -> UInt32[ndarray, " n_shingles"]:
    """crc32 of each distinct run of 8 normalised words; a shorter text is one run.

    A crc32 and not Python's hash, which differs from process to process. Of 2 million runs some hundreds collide.
    """
    words = normalise(text).split(" ")
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    runs = {zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in starts}
    return np.fromiter(runs, dtype=np.uint32, count=len(runs))


def drop_near_duplicates(texts: Sequence[str]) -> Filtered:
    """Keep texts until both rules hold. Which ones stay depends on the set of texts, not on their order.

    One pass, shortest first (equal lengths: by text), asks each whether it repeats those still there. Dropping only
    makes the others rarer, so whoever passed need not be asked again. The price: of A like B like C, only C may stay.
    """
    if not texts:
        return Filtered(kept=[], n_same_opening=0, n_overlapping=0)
    hashes = [shingles(text) for text in texts]
    _, ids = np.unique(np.concatenate(hashes), return_inverse=True)
    rows = np.split(ids, np.cumsum([len(row) for row in hashes])[:-1])
    openings = [normalise(text)[:OPENING_CHARACTERS] for text in texts]
    n_with_shingle, n_with_opening = np.bincount(ids), Counter(openings)
    kept, n_same_opening, n_overlapping = [], 0, 0
    for i in sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i])):
        if n_with_opening[openings[i]] > 1:
            n_same_opening += 1
        elif 2 * np.count_nonzero(n_with_shingle[rows[i]] > 1) >= len(rows[i]):
            n_overlapping += 1
        else:
            kept.append(i)
            continue
        n_with_opening[openings[i]] -= 1
        n_with_shingle[rows[i]] -= 1
    return Filtered(kept=sorted(kept), n_same_opening=n_same_opening, n_overlapping=n_overlapping)


def n_contained(texts: Sequence[str], others: Sequence[str]) -> int:
    """How many of `texts` have at least half of their shingles in `others` taken together: a measure of leakage."""
    if not others:
        return 0
    known = np.unique(np.concatenate([shingles(text) for text in others]))
    n = 0
    for text in texts:
        runs = shingles(text)
        at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
        n += 2 * int(np.count_nonzero(known[at] == runs)) >= len(runs)
    return n
