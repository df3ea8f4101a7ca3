"""Stores of the experiments that are no harvest: made by one process, from random numbers or from another store.

Each is made whole or again: nothing of one that was interrupted, or made from another store, is used.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from tcsae.harvest.run import remove_store
from tcsae.shared.store.create import StoreCreation, create_store
from tcsae.shared.store.format import SEALED, SPLITS
from tcsae.shared.store.reader import Split, Store, open_store, read_manifest

D_MODEL, NORM, SPREAD = 512, 15.8, 1.89
"""Of Pythia-70m's layer 4 as the paper read it: width, mean norm, and E[|x|^2 / |x - mu|^2]."""
MOMENTS_SEQUENCES = {"train": 40, "eval": 160}
BLOCK = 256
"""Sequences that are read at a time."""


def moments_store(location: str) -> Store:
    """Gaussian activations about a mean, of the paper's norm and spread: with |mu|^2 = m and total variance v,
    (m + v) / v = SPREAD and m + v = NORM^2."""

    def fill(store: StoreCreation) -> None:
        rng = np.random.default_rng(0)
        direction = rng.standard_normal(D_MODEL)
        variance = NORM**2 / SPREAD
        mean = direction / np.linalg.norm(direction) * np.sqrt(NORM**2 - variance)
        for split, n in MOMENTS_SEQUENCES.items():
            x = rng.standard_normal((n, 128, D_MODEL)) * np.sqrt(variance / D_MODEL) + mean
            documents = np.arange(n) + (split == "eval") * MOMENTS_SEQUENCES["train"]
            store.append(split, {"moments": x.astype(np.float32)}, documents=documents)

    return _whole(location, fill, hooks={"moments": D_MODEL}, sequence_length=128, source="Gaussian moments")


def centred_store(location: str, source: Store) -> Store:
    """The sequences of `source`, activations less a mean for each token id and one for each position.

    The two are fitted together on the train split (`fit_means`). Raises StoreError if `source` is damaged.
    """
    hook = source.hook()

    def fill(store: StoreCreation) -> None:
        means = fit_means(source.train, hook)
        for split in map(source.split, SPLITS):
            for start, x in _blocks(split, hook):
                part = slice(start, start + len(x))
                tokens = split.tokens[part]
                store.append(
                    split.name,
                    {hook: x - means.at(tokens)},
                    lengths=split.lengths[part],
                    tokens=tokens,
                    documents=split.documents[part],
                )

    made_from = f"{source.content} less the means of tokens and positions"
    hooks = {hook: source.d_model(hook)}
    return _whole(location, fill, hooks=hooks, sequence_length=source.sequence_length, source=made_from)


def _whole(
    location: str, fill: Callable[[StoreCreation], None], *, hooks: dict[str, int], sequence_length: int, source: str
) -> Store:
    manifest = read_manifest(location)
    if manifest is not None and (manifest.state != SEALED or manifest.recipe.corpus.name != source):
        remove_store(location)
        manifest = None
    if manifest is None:
        with create_store(location, hooks=hooks, sequence_length=sequence_length, source=source) as store:
            fill(store)
    return open_store(location)


def _blocks(split: Split, hook: str) -> Iterator[tuple[int, Float[ndarray, "n sequence_length d_model"]]]:
    for start in range(0, split.n_sequences, BLOCK):
        x = split.read(hook, start, min(start + BLOCK, split.n_sequences))
        yield start, np.asarray(x, np.float32)


class Means(NamedTuple):
    """x = token + position + what is left, in least squares; a token that was not seen has the mean over all tokens."""

    token: Float[ndarray, "n_ids d_model"]
    position: Float[ndarray, "sequence_length d_model"]
    """Zero on average over the tokens."""
    unseen: Float[ndarray, " d_model"]

    def at(self, tokens: Int[ndarray, "n sequence_length"]) -> Float[ndarray, "n sequence_length d_model"]:
        known = np.append(self.token, self.unseen[None], 0)
        return known[np.minimum(tokens, len(self.token))] + self.position


def fit_means(split: Split, hook: str) -> Means:
    """Least squares from one pass: the normal equations, tokens eliminated, leave one for each position."""
    n_ids, length, width = int(split.tokens.max()) + 1, split.tokens.shape[1], split.store.d_model(hook)
    counts = np.zeros((n_ids, length))
    of_token, of_position = np.zeros((n_ids, width)), np.zeros((length, width))
    for start, x in _blocks(split, hook):
        part = slice(start, start + len(x))
        valid = np.arange(length) < split.lengths[part, None]
        tokens, at = split.tokens[part][valid], np.nonzero(valid)[1]
        np.add.at(counts, (tokens, at), 1)
        np.add.at(of_token, tokens, x[valid])
        np.add.at(of_position, at, x[valid])
    n_token, n_position = counts.sum(1), counts.sum(0)
    shares = counts / np.maximum(n_token, 1)[:, None]
    normal = np.diag(n_position) - counts.T @ shares  # singular: a constant may be token's or position's
    position = np.linalg.lstsq(normal, of_position - shares.T @ of_token, rcond=None)[0]
    position -= n_position @ position / n_position.sum()
    unseen = of_token.sum(0) / n_token.sum()
    token = np.where(n_token[:, None] > 0, of_token / np.maximum(n_token, 1)[:, None] - shares @ position, unseen)
    return Means(*(one.astype(np.float32) for one in (token, position, unseen)))
