"""Which positions of a split count, in training and in evaluation: all valid ones but those that a rule leaves out.

A rule goes by the place in the sequence, by the token, by whose token it is, or by the norm of the activation. Runs of
counted positions are cut where one is left out, so that no window spans it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from tcsae.shared.base.errors import ConfigError, StoreError, unknown
from tcsae.shared.base.settings import to_dict
from tcsae.shared.store.format import NORM_EDGES
from tcsae.shared.store.reader import Split, Store

SPECIAL = "special"
"""In place of an id: every special token of the tokenizer that the store keeps."""
BLOCK_SEQUENCES = 4096
_within_norm: "WeakKeyDictionary[Split, dict[tuple[str, float], Bool[ndarray, 'n length']]]" = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingRules:
    """Which positions are left out; by default none."""

    skip_first: int = 0
    """First positions of each sequence."""
    exclude_tokens: tuple[str, ...] = ()
    """Token ids, or "special"."""
    positions: tuple[str, ...] = ()
    """Roles whose tokens count; empty: everybody's."""
    max_norm: float | None = None
    """Largest norm that counts, over the train split's median norm."""
    hook: str | None = None
    """Whose norms `max_norm` is about; None: the store's first."""

    @property
    def has_holes(self) -> bool:
        """Whether tokens or roles are left out: what can be told without an activation."""
        return bool(self.exclude_tokens or self.positions)

    def without_norm(self) -> "CountingRules":
        return replace(self, max_norm=None)

    def key(self) -> str:
        """The rules as text, equal for equal rules; a plain number where only first positions are left out."""
        plain = self.max_norm is None and not self.has_holes
        return str(self.skip_first) if plain else json.dumps(to_dict(self), sort_keys=True)

    def __str__(self) -> str:
        parts = [f"from {self.skip_first} on"]
        parts += [f"without the tokens {','.join(self.exclude_tokens)}"] * bool(self.exclude_tokens)
        parts += [f"of {','.join(self.positions)}"] * bool(self.positions)
        parts += [f"of a norm up to {self.max_norm} medians"] * (self.max_norm is not None)
        return ", ".join(parts)


def counted(
    split: Split, rules: CountingRules, start: int = 0, stop: int | None = None
) -> Bool[ndarray, "n sequence_length"]:
    """The counted positions of sequences start..stop-1 (default: all).

    A `max_norm` reads the split's activations, once. Raises ConfigError for ids and roles that the store cannot tell,
    StoreError for a store that lacks roles or a tokenizer which they need.
    """
    part = slice(start, stop)
    mask = _placed(split, rules, part)
    for name in ("exclude_tokens", "positions"):
        if getattr(rules, name):
            mask &= _allowed(split, rules, name, part)
    if rules.max_norm is not None:
        mask &= _norms_within(split, split.store.hook(rules.hook), rules.max_norm)[part]
    return mask


def left_out(split: Split, rules: CountingRules, min_sequence_length: int = 1) -> dict[str, int]:
    """Tokens that each rule leaves out and none before it, in the order of the rules; of long enough sequences."""
    counts: dict[str, int] = {}
    for start in range(0, split.n_sequences, BLOCK_SEQUENCES):
        part = slice(start, min(start + BLOCK_SEQUENCES, split.n_sequences))
        usable = split.lengths[part] >= min_sequence_length
        before = _placed(split, CountingRules(), part) & usable[:, None]
        steps = {"skip_first": _placed(split, rules, part)}
        steps |= {
            name: _allowed(split, rules, name, part) for name in ("exclude_tokens", "positions") if getattr(rules, name)
        }
        if rules.max_norm is not None:
            steps["max_norm"] = _norms_within(split, split.store.hook(rules.hook), rules.max_norm)[part]
        for name, allowed in steps.items():
            after = before & allowed
            counts[name] = counts.get(name, 0) + int(before.sum()) - int(after.sum())
            before = after
    return counts


def excluded_ids(store: Store, names: Sequence[str]) -> Int[ndarray, " n_ids"]:
    """Token ids of data.exclude_tokens. Raises ConfigError for what is no id; StoreError without a tokenizer."""
    ids: set[int] = set()
    for name in names:
        if name == SPECIAL:
            ids |= special_ids(store)
        elif name.isdecimal():
            ids.add(int(name))
        else:
            raise ConfigError(f"data.exclude_tokens={name!r}: give token ids with commas between, or {SPECIAL}.")
    return np.array(sorted(ids), np.int64)


def special_ids(store: Store) -> set[int]:
    """Ids of the special tokens of the tokenizer that a store keeps. Raises StoreError, with the cure, if it cannot."""
    folder = store.tokenizer_path
    file = folder and folder / "tokenizer.json"
    if file is None or not file.is_file():
        raise StoreError(
            f"{store.location} keeps no tokenizer.json, so its special tokens are not known. Give their ids: "
            "data.exclude_tokens=0,1."
        )
    try:
        added = json.loads(file.read_bytes()).get("added_tokens", [])
        return {int(one["id"]) for one in added if one["special"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{file} is no tokenizer ({error}). Harvest the store again.") from error


def norm_median(store: Store, hook: str) -> float:
    """Median norm of the train split's tokens, from its histogram: exact within the bin's 9%."""
    histogram = np.asarray(store.array(f"statistics/{hook}/norm_histogram")[:])
    return float(NORM_EDGES[np.searchsorted(np.cumsum(histogram), histogram.sum() / 2)])


def _placed(split: Split, rules: CountingRules, part: slice) -> Bool[ndarray, "n sequence_length"]:
    position = np.arange(split.store.sequence_length)
    return (position < split.lengths[part, None]) & (position >= rules.skip_first)


def _allowed(split: Split, rules: CountingRules, name: str, part: slice) -> Bool[ndarray, "n sequence_length"]:
    """By one rule that goes by the token."""
    if name == "exclude_tokens":
        return np.isin(split.tokens[part], excluded_ids(split.store, rules.exclude_tokens), invert=True)
    known = split.store.manifest.recipe.roles
    for role in rules.positions:
        if known and role not in known:
            raise ConfigError(f"data.positions: {unknown('role', role, known)}")
    roles = split.roles[part]  # raises if there are none
    return np.isin(roles, [1 + known.index(role) for role in rules.positions])


def _norms_within(split: Split, hook: str, max_norm: float) -> Bool[ndarray, "n_sequences sequence_length"]:
    masks = _within_norm.setdefault(split, {})
    if (hook, max_norm) not in masks:
        limit, step = max_norm * norm_median(split.store, hook), split.store.sequences_per_chunk
        mask = np.zeros((split.n_sequences, split.store.sequence_length), bool)
        for start in range(0, split.n_sequences, step):
            stop = min(start + step, split.n_sequences)
            norms = np.linalg.norm(split.read(hook, start, stop), axis=-1)
            mask[start:stop] = ~(norms > limit)
        masks[hook, max_norm] = mask
    return masks[hook, max_norm]
