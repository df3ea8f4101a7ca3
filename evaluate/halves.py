"""Halves of a split's documents, by a hash of their number: settings are chosen on one and reported on the other."""

import hashlib
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from tcsae.shared.base.errors import StoreError
from tcsae.shared.store.reader import Split

Documents = Literal["all", "choose", "report"]


def in_choose(documents: Int[ndarray, " n"]) -> Bool[ndarray, " n"]:
    """Whether a document is of the half that settings are chosen on: the lowest bit of the sha256 of its number."""
    unique, where = np.unique(documents, return_inverse=True)
    bits = [hashlib.sha256(str(int(one)).encode()).digest()[-1] & 1 for one in unique]
    return np.array(bits, dtype=bool)[where]


def half(split: Split, documents: Documents) -> Split:
    """The split with the sequences of other documents at length 0, so that no position of theirs is counted.

    Raises StoreError if the half has no document.
    """
    if documents == "all":
        return split
    part = Split(split.store, split.name)
    inside = in_choose(split.documents) == (documents == "choose")
    if not inside.any():
        raise StoreError(
            f"{split.store.location}: none of its {split.n_documents} {split.name} documents is of the half "
            f"--documents {documents}. Evaluate all, or harvest more."
        )
    part.lengths = np.where(inside, split.lengths, 0).astype(split.lengths.dtype)
    part.n_tokens, part.n_documents = int(part.lengths.sum()), len(np.unique(split.documents[inside]))
    return part
