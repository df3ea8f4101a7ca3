"""Recovery of planted features: for each class of them, whether a latent points their way and is on when they are.

For a store that `tcsae synthetic` wrote, whose truth lies beside it. Matching is by directions alone (`matching`);
everything else compares a feature with the one latent that it was matched with, at the counted positions of the split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch
from tcsae.evaluate.planted.matching import ANTIPODAL_COSINE, SPLIT_COSINE, Matching, capture, match
from tcsae.evaluate.planted.segments import Axis, axis_of, compare_segments
from tcsae.evaluate.planted.truth import CLASSES, PARENT, POSITION, SLOW_DENSE, Truth
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, positive_code

RECOVERED_F1, RECOVERED_COSINE = 0.5, 0.7
ABSORBED = 0.4
"""Of a parent's amplitude that its children's latents carry where its own is off: SAEBench's bound for absorption."""

OVERALL = {
    "mcc": "mean over the smaller of features and latents of |cosine| between a feature and the latent that the "
    "optimal one-to-one assignment gives it, as SynthSAEBench's MCC",
    "f1": "F1 of each latent, being on, for the feature that it points along most, being on; mean over latents, 0 "
    "where undefined, as SynthSAEBench",
    "precision": "the same of precision",
    "recall": "the same of recall",
    "uniqueness": "features that some latent points along most, over the number of latents",
    "recovered": f"share of features whose latent has an F1 of at least {RECOVERED_F1} and a cosine of at least "
    f"{RECOVERED_COSINE}, among those that are on at all",
    "shrinkage": "amplitude along a feature's direction that its latent gives back where both are on, over the true "
    "one, pooled; 1: none",
    "false_splits": f"latents beyond the first within a cosine of {SPLIT_COSINE} of a feature, in all",
    "antipodal_pairs": f"pairs of decoder rows below a cosine of {ANTIPODAL_COSINE}",
    "absorption": "share of tokens with a parent and a child on at which the parent's latent is off and latents that "
    f"point along its children carry at least {ABSORBED} of its amplitude",
}
OF_CLASS = {
    "n_features": "features of the class; a signed dimension counts as two, one for each side",
    "mcc": "mean |cosine| between a feature and its latent (of the one-to-one assignment), 0 without one",
    "f1": "F1 of that latent, being on, for its feature, being on; mean over the features that are on at all",
    "precision": "the same of precision, 0 for a latent that is never on",
    "recall": "the same of recall",
    "recovered": OVERALL["recovered"],
    "uniqueness": "share of features that some latent points along most",
    "shrinkage": OVERALL["shrinkage"],
    "false_splits": f"latents beyond the first within a cosine of {SPLIT_COSINE} of a feature, mean over features",
}
OF_SEGMENTS = {
    "missed": "share of true segments (consecutive counted tokens with the feature on) at which its latent is never on",
    "fragments": "segments of the latent's code that overlap with a true one, mean over those not missed",
    "onset_error": "tokens from a segment's first to the first of the code's segments that overlap, mean; below 0 is "
    "early. Without segments that begin where counting does: in a sequence, or after a token that is left out",
    "onset_distance": "the same of its absolute value",
    "offset_error": "likewise of the last tokens; below 0 is early. Without segments that reach a sequence's end, or a "
    "token that is left out",
    "offset_distance": "the same of its absolute value",
}
CAPTURE = {"capture": "share of the true subspace that lies in the span of the latents matched with its two sides"}
ABSORPTION = {"absorption": OVERALL["absorption"]}

PER_FEATURE = ("on", "hits", "true", "given", "pairs", "absorbed", "segments", "missed", "fragments")
EDGES = ("n_onset", "onset", "onset_far", "n_offset", "offset", "offset_far")
PER_LATENT = ("firings", "nearest_hits")


class PlantedTokens:
    """The truth at the counted positions of the batch at hand; shared by all SAEs of a pass."""

    def __init__(self, truth: Truth, lengths: Int[ndarray, " n_sequences"]) -> None:
        self.truth = truth
        self._lengths, self._starts = lengths, np.append(0, lengths.cumsum())
        self._slow = truth.durations > 1

    def begin(self, batch: EvalBatch) -> None:
        truth, n = self.truth, self.truth.n_features
        lengths = self._lengths[batch.start : batch.start + len(batch.x), None]  # all, whichever documents are counted
        valid = np.arange(batch.counted.shape[1]) < lengths
        counted = batch.counted.cpu().numpy()[valid]
        number = np.where(counted, counted.cumsum() - 1, -1)
        first, stop = self._starts[batch.start], self._starts[batch.start + len(valid)]
        part = slice(truth.offsets[first], truth.offsets[stop])
        token = np.repeat(number, np.diff(truth.offsets[first : stop + 1]))
        seen = token >= 0
        token, feature, value = token[seen], truth.features[part][seen].astype(np.int64), truth.values[part][seen]
        shown = value > 0
        self.n_tokens = int(counted.sum())
        self.axis: Axis = axis_of(batch.runs.numpy())
        slow = self._slow[feature]
        self.segments = self.axis.keys(feature[slow], token[slow])
        self.keys, order = np.unique(token[shown] * n + feature[shown], return_index=True)
        self.values = value[shown][order].astype(np.float64)
        self.features = self.keys % n
        above = truth.parents[self.features]
        pairs = np.unique(self.keys[above >= 0] // n * n + above[above >= 0])
        at, both = _found(self.keys, pairs)
        self.pairs, self.pair_values = pairs[both], self.values[at[both]]


class Planted:
    """What one SAE recovers of the planted features."""

    def __init__(self, tokens: PlantedTokens, rows: Float[ndarray, "n_latents d_model"]) -> None:
        truth = tokens.truth
        self.tokens, self.truth, self.rows = tokens, truth, rows
        self.matching: Matching = match(truth.directions, rows)
        self._above = truth.parents[self.matching.nearest].astype(np.int64)
        """Parent of the feature that each latent points along most; -1: none."""
        self._along_above = np.maximum((truth.directions[self._above] * rows).sum(1), 0)
        self._features = np.zeros((len(PER_FEATURE) + len(EDGES), truth.n_features))
        self._latents = np.zeros((len(PER_LATENT), len(rows)))

    def add(self, code: Code) -> None:
        """The code of the counted positions of the batch that `tokens` is at."""
        tokens, n, matching = self.tokens, self.truth.n_features, self.matching
        sparse = code if isinstance(code, SparseCode) else positive_code(code)
        on = (sparse.values.detach() > 0).numpy()
        token, latent = sparse.rows.numpy()[on], sparse.latents.numpy()[on]
        value = sparse.values.detach().numpy()[on].astype(np.float64)
        feature = matching.feature_of[latent]
        matched = np.flatnonzero(feature >= 0)
        keys, order = np.unique(token[matched] * n + feature[matched], return_index=True)
        given = value[matched][order] * matching.along[keys % n]
        at, hit = _found(tokens.keys, keys)
        of = keys[hit] % n
        nearest = _found(tokens.keys, token * n + matching.nearest[latent])[1]
        carried = _lookup_sum(
            tokens.pairs, (token * n + self._above[latent])[self._above[latent] >= 0],
            (value * self._along_above[latent])[self._above[latent] >= 0],
        )  # fmt: skip
        absorbed = (carried >= ABSORBED * tokens.pair_values) & ~_found(keys, tokens.pairs)[1]
        slow = self.truth.durations[feature[matched]] > 1
        compared = compare_segments(
            tokens.axis, tokens.segments, tokens.axis.keys(feature[matched][slow], token[matched][slow])
        )
        counts = (
            (tokens.features, 1), (of, 1), (of, tokens.values[at[hit]]), (of, given[hit]), (tokens.pairs % n, 1),
            (tokens.pairs % n, absorbed), (compared.feature, 1), (compared.feature, compared.missed),
            (compared.feature, compared.fragments), (compared.feature, compared.has_onset),
            *((compared.feature, one * compared.has_onset) for one in (compared.onset, abs(compared.onset))),
            (compared.feature, compared.has_offset),
            *((compared.feature, one * compared.has_offset) for one in (compared.offset, abs(compared.offset))),
        )  # fmt: skip
        for row, (where, weights) in zip(self._features, counts, strict=True):
            row += np.bincount(where, np.broadcast_to(weights, where.shape), n)
        for row, weights in zip(self._latents, (np.ones(len(latent)), nearest), strict=True):
            row += np.bincount(latent, weights, len(self.rows))

    def sums(self) -> Sequence[Tensor]:
        return [torch.from_numpy(self._features), torch.from_numpy(self._latents)]

    def per_feature(self) -> dict[str, Float[ndarray, " n_features"]]:
        """F1, precision, recall of each feature's latent and whether it is recovered (0 or 1), NaN for a feature that
        is never on; cosine; and the sums behind all figures.
        """
        sums = dict(zip((*PER_FEATURE, *EDGES), self._features, strict=True))
        latent = self.matching.latent_of
        firings = np.where(latent >= 0, self._latents[0][latent], 0)
        on, hits = np.where(sums["on"] > 0, sums["on"], np.nan), sums["hits"]
        f1 = 2 * hits / (on + firings)
        precision = np.where(np.isnan(on), np.nan, hits / np.maximum(firings, 1))
        is_recovered = (f1 >= RECOVERED_F1) & (self.matching.cosine >= RECOVERED_COSINE)
        recovered = np.where(np.isnan(on), np.nan, is_recovered)
        scores = {"f1": f1, "precision": precision, "recall": hits / on, "recovered": recovered}
        return sums | scores | {"cosine": self.matching.cosine}

    def figures(self) -> dict[str, dict[str, Any]]:
        """{measure: {"figures": ..., "definitions": ...}}: overall, and of each class that was planted."""
        scores = self.per_feature()
        by_measure = {"planted": {"figures": self._overall(scores), "definitions": OVERALL}}
        for number, name in enumerate(CLASSES):
            which = self.truth.kinds == number
            if which.any():
                figures, definitions = self._of_class(name, which, scores)
                by_measure[f"planted_{name}"] = {"figures": figures, "definitions": dict(definitions)}
        return by_measure

    def _overall(self, scores: Mapping[str, ndarray]) -> dict[str, float | None]:
        matching = self.matching
        firings, hits = self._latents
        occurrences = scores["on"][matching.nearest]
        cosines = matching.cosine[matching.has_latent]
        return {
            "mcc": float(cosines.mean()),
            "f1": float((2 * hits / np.maximum(firings + occurrences, 1)).mean()),
            "precision": float((hits / np.maximum(firings, 1)).mean()),
            "recall": float((hits / np.maximum(occurrences, 1)).mean()),
            "uniqueness": len(np.unique(matching.nearest)) / len(self.rows),
            "recovered": _mean(scores["recovered"]),
            "shrinkage": _ratio(scores["given"].sum(), scores["true"].sum()),
            "false_splits": int(matching.splits.sum()),
            "antipodal_pairs": matching.n_antipodal,
            "absorption": _ratio(scores["absorbed"].sum(), scores["pairs"].sum()),
        }

    def _of_class(
        self, name: str, which: ndarray, scores: Mapping[str, ndarray]
    ) -> tuple[dict[str, float | None], dict[str, str]]:
        sums = {key: float(scores[key][which].sum()) for key in (*PER_FEATURE, *EDGES)}
        figures: dict[str, float | None] = {
            "n_features": int(which.sum()),
            "mcc": float(scores["cosine"][which].mean()),
            **{key: _mean(scores[key][which]) for key in ("f1", "precision", "recall", "recovered")},
            "uniqueness": float(np.isin(np.flatnonzero(which), self.matching.nearest).mean()),
            "shrinkage": _ratio(sums["given"], sums["true"]),
            "false_splits": float(self.matching.splits[which].mean()),
        }
        definitions = dict(OF_CLASS)
        if (self.truth.durations[which] > 1).any():
            definitions |= OF_SEGMENTS
            figures |= {
                "missed": _ratio(sums["missed"], sums["segments"]),
                "fragments": _ratio(sums["fragments"], sums["segments"] - sums["missed"]),
                "onset_error": _ratio(sums["onset"], sums["n_onset"]),
                "onset_distance": _ratio(sums["onset_far"], sums["n_onset"]),
                "offset_error": _ratio(sums["offset"], sums["n_offset"]),
                "offset_distance": _ratio(sums["offset_far"], sums["n_offset"]),
            }
        if name in (SLOW_DENSE, POSITION):
            latents = self.matching.latent_of[which]
            definitions |= CAPTURE
            figures["capture"] = capture(self.truth.directions[which], self.rows[latents[latents >= 0]])
        if name == PARENT:
            definitions |= ABSORPTION
            figures["absorption"] = _ratio(sums["absorbed"], sums["pairs"])
        return figures, definitions


def _found(keys: Int[ndarray, " a"], asked: Int[ndarray, " b"]) -> tuple[Int[ndarray, " b"], ndarray]:
    """Where each number asked for stands among the sorted keys, and whether it is one of them."""
    at = np.searchsorted(keys, asked).clip(max=max(0, len(keys) - 1))
    return at, keys[at] == asked if len(keys) else np.zeros(len(asked), bool)


def _lookup_sum(
    keys: Int[ndarray, " a"], asked: Int[ndarray, " b"], weights: Float[ndarray, " b"]
) -> Float[ndarray, " a"]:
    """Sum of the weights of each key."""
    at, known = _found(keys, asked)
    return np.bincount(at[known], weights[known], len(keys)).astype(np.float64)  # also of no weight


def _ratio(total: float, n: float) -> float | None:
    return float(total / n) if n else None


def _mean(values: Float[ndarray, " n"]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
