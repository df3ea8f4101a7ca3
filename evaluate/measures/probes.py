"""The probe triad: what a linear reader finds in a code: which document, which token, which position.

Ridge regression in closed form on one-hot targets, the strength chosen on held-out training tokens. Document: trained
on the first half of a document's tokens, tested on the second after a gap. Token and position: tested on documents
that were not trained on. A code that carries what stays the same should tell the document and not the token.

One Gram matrix serves all targets and strengths of a split into training and test tokens, which scikit-learn's
RidgeClassifier, fitted anew for each, has no way to share: it took 4.4 times as long (4.1 to 4.9; 128 documents of 120
tokens, 512 latents, one core), and would be a dependency for these forty lines alone.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch, document_numbers
from tcsae.evaluate.intervals import interval, point, resamplings
from tcsae.evaluate.measures.code_ops import columns, entry_values
from tcsae.evaluate.measures.smoothing import ema_kernel, filtered_rows, mean_kernel
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split

MAX_DOCUMENTS, MAX_TOKENS = 128, 128
"""Documents that are probed, evenly spaced, and tokens of each: of its first sequence."""
GAP = 16
MIN_TOKENS = 3 * GAP
PROBE_LATENTS = 512
"""Latents that are read where nothing else is asked for, those of largest variance: a probe takes the square of their
number for each token, and its cube once. Reading all 4,096 of a TopK SAE took 15 s a probe in place of 0.3, and named
.251 of documents in place of .211 (x itself: .274).
"""
SLICE = 512
"""Tokens squared at a time: 1 MB."""
N_TOKEN_IDS, N_POSITION_BINS = 100, 8
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the ridge, relative to the mean of the Gram matrix's diagonal."""
MEAN_OVER, EMA_DECAY = 8, 0.8

_resamplings = lru_cache(maxsize=4)(resamplings)
"""The same few documents for every code and target: 1 MB each."""

TARGETS = ("document", "token", "position")
DEFINITIONS = {
    "probe_document": "share of tokens in the second half of a document whose document a ridge on the code names, "
    f"trained on first halves, {GAP} tokens apart; up to {MAX_DOCUMENTS} documents, the first sequence of each, and "
    f"the {PROBE_LATENTS} latents of largest variance, or as many as the options have as probe_latents; null: always "
    "naming the document with most of the tested tokens",
    "probe_token": f"share of tokens, of the {N_TOKEN_IDS} most frequent, named in documents not trained on; null: "
    "always naming the most frequent",
    "probe_position": f"share of tokens whose position's bin (of {N_POSITION_BINS}, equally filled) is named in "
    "documents not trained on; null: always naming the most frequent",
}


class Plan(NamedTuple):
    """Which sequences are read, and the classes of their tokens; one row a counted token."""

    sequences: Int[ndarray, " n_documents"]
    document: Int[Tensor, " n"]
    """0 to the number of documents probed - 1."""
    within: Int[Tensor, " n"]
    """Counted tokens before it."""
    lengths: Int[Tensor, " n_documents"]
    targets: Int[Tensor, "3 n"]
    """In the order of TARGETS; -1: has no class."""

    def rows(self, batch: EvalBatch) -> Int[Tensor, " m"]:
        """The batch's counted tokens that are read, by number."""
        sequence = batch.counted.nonzero()[:, 0]
        starts = torch.searchsorted(sequence, sequence)
        within = torch.arange(len(sequence)) - starts
        read = torch.from_numpy(np.isin((sequence + batch.start).numpy(), self.sequences))
        return (read & (within < MAX_TOKENS)).nonzero().squeeze(1)


def plan_probes(split: Split, rules: CountingRules) -> Plan | None:
    """Choose documents by their first sequences; None if fewer than four have MIN_TOKENS counted tokens."""
    document = document_numbers(split)[0]
    first = np.flatnonzero(np.diff(document, prepend=-1))
    mask = counted(split, rules)
    able = first[mask[first].sum(1) >= MIN_TOKENS]
    if len(able) < 4:
        return None
    sequences = able[np.unique(np.linspace(0, len(able) - 1, min(MAX_DOCUMENTS, len(able))).astype(int))]
    chosen = mask[sequences] & (mask[sequences].cumsum(1) <= MAX_TOKENS)
    lengths = chosen.sum(1)
    number = np.repeat(np.arange(len(sequences)), lengths)
    within = np.arange(len(number)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = split.tokens[sequences][chosen]
    frequent, counts = np.unique(ids, return_counts=True)
    frequent = np.sort(frequent[np.argsort(-counts, kind="stable")[:N_TOKEN_IDS]])
    at = np.searchsorted(frequent, ids).clip(max=len(frequent) - 1)
    token = np.where(frequent[at] == ids, at, -1)
    edges = np.quantile(within, np.arange(1, N_POSITION_BINS) / N_POSITION_BINS)
    position = np.searchsorted(edges, within, side="right")
    targets = torch.from_numpy(np.stack([number, token, position]).astype(np.int64))
    return Plan(sequences, torch.from_numpy(number), torch.from_numpy(within), torch.from_numpy(lengths), targets)


def probe(
    plan: Plan, code: Float[Tensor, "n n_latents"]
) -> tuple[dict[str, dict[str, float | list[float] | None]], dict[str, Float64[Tensor, " n_rows"]]]:
    """{"probe_document": {"value", "null", "difference", "interval"}, ...} of a code of the plan's tokens.

    And each value on every resampling of the probed documents, which are the same for all codes.
    """
    mean = code.mean(0)
    squares = torch.stack([(part - mean).square_().sum(0) for part in code.split(SLICE)]).sum(0)
    spread = (squares / (len(code) - 1)).sqrt().mean().clamp(min=1e-12)
    code = torch.cat([(part - mean).div_(spread) for part in code.split(SLICE)])
    half = ((plan.lengths - GAP) // 2)[plan.document]
    odd = plan.document % 2 == 1
    halves, documents = (plan.within < half, plan.within >= half + GAP), (~odd, odd)
    figures, draws = {}, {}
    for names, (train, test) in ((("document",), halves), (("token", "position"), documents)):
        targets = {name: plan.targets[TARGETS.index(name)] for name in names}
        for name, guesses in _ridge(code, train, test, plan, targets).items():
            figures[f"probe_{name}"], draws[f"probe_{name}"] = _scored(plan, targets[name], test, guesses)
    return figures, draws


def smoothed(plan: Plan, code: Float[Tensor, "n n_latents"]) -> dict[str, Float[Tensor, "n n_latents"]]:
    """The code averaged over each token's last MEAN_OVER tokens, and with an exponential memory."""
    kernels = {"mean_pooled": mean_kernel(MAX_TOKENS, MEAN_OVER), "ema": ema_kernel(MAX_TOKENS, EMA_DECAY)}
    return {name: filtered_rows(code, plan.lengths.tolist(), kernel) for name, kernel in kernels.items()}


def largest_columns(code: Code, which: Bool[Tensor, " d_sae"], n_latents: int) -> Float[Tensor, "n n_kept"]:
    """The latents `which` as a matrix; of more than `n_latents`, those of largest variance."""
    chosen = which.nonzero().squeeze(1)
    if len(chosen) > n_latents:
        n = code.n_tokens if isinstance(code, SparseCode) else len(code)
        values = entry_values(code)
        total, squares = (_latent_sums(code, one) for one in (values, values.square()))
        variance = torch.where(which, squares / n - (total / n).square(), -1.0)
        chosen = variance.topk(n_latents).indices.sort().values
    return columns(code, chosen)


def _latent_sums(code: Code, values: Tensor) -> Float64[Tensor, " d_sae"]:
    """Sum over all tokens of `values`, which stand where the code's values do."""
    if isinstance(code, SparseCode):
        return torch.bincount(code.latents, weights=values.double(), minlength=code.d_sae)
    return values.sum(0, dtype=torch.float64)


def _ridge(
    code: Float[Tensor, "n p"],
    train: Bool[Tensor, " n"],
    test: Bool[Tensor, " n"],
    plan: Plan,
    targets: dict[str, Int[Tensor, " n"]],
) -> dict[str, Int[Tensor, " n_test"]]:
    """The class that a ridge names at each test token, for targets that share their training tokens.

    Every fourth block of training tokens chooses the strength: of every document where documents are the classes, else
    whole documents.
    """
    held = (plan.within // 4 % 4 == 3) if "document" in targets else (plan.document // 2 % 4 == 3)
    parts = [part.nonzero().squeeze(1) for part in (train & ~held, train & held, test)]
    fitted, held_out, tested = (code[part] for part in parts)
    grams = [one.T @ one for one in (fitted, held_out)]
    scale = float((grams[0] + grams[1]).diagonal().mean()) + 1e-12
    sides = {
        name: [
            _against_one_hot(one, classes[part], classes) for one, part in zip((fitted, held_out), parts, strict=False)
        ]
        for name, classes in targets.items()
    }
    best = dict.fromkeys(targets, (-1.0, STRENGTHS[0]))
    for strength in STRENGTHS:
        factor = _factor(grams[0], strength * scale)
        for name, classes in targets.items():
            weights = torch.cholesky_solve(sides[name][0], factor)
            hits = (held_out @ weights).argmax(1) == classes[parts[1]]
            best[name] = max(best[name], (float(hits.float().mean()), strength))
    guesses = {}
    for name in targets:
        factor = _factor(grams[0] + grams[1], best[name][1] * scale)
        weights = torch.cholesky_solve(sides[name][0] + sides[name][1], factor)
        guesses[name] = (tested @ weights).argmax(1)
    return guesses


def _factor(gram: Float[Tensor, "p p"], strength: float) -> Float[Tensor, "p p"]:
    return torch.linalg.cholesky(gram + strength * torch.eye(len(gram)))


def _against_one_hot(
    code: Float[Tensor, "m p"], classes: Int[Tensor, " m"], everywhere: Int[Tensor, " n"]
) -> Float[Tensor, "p n_classes"]:
    """code.T @ (one-hot classes - each class's share of all n tokens); -1: no class."""
    n_classes = int(everywhere.max()) + 1
    known = (classes >= 0).nonzero().squeeze(1)
    sums = torch.zeros(n_classes, code.shape[1]).index_add_(0, classes[known], code[known])
    shares = torch.bincount(everywhere[everywhere >= 0], minlength=n_classes) / len(everywhere)
    return (sums - shares[:, None] * code.sum(0)).T


def _scored(
    plan: Plan, classes: Int[Tensor, " n"], test: Bool[Tensor, " n"], guesses: Int[Tensor, " n_test"]
) -> tuple[dict[str, float | list[float] | None], Float64[Tensor, " n_rows"]]:
    """Share of hits over the tested tokens that have a class, against naming the commonest of these classes.

    Also the share on every resampling of the documents.
    """
    known = classes[test] >= 0
    if not known.any():  # no class to name: no tested token is of a frequent id
        nothing: dict[str, float | list[float] | None] = dict.fromkeys(("value", "null", "difference", "interval"))
        return nothing, torch.full((1,), torch.nan, dtype=torch.float64)
    document, truth, named = plan.document[test][known], classes[test][known], guesses[known]
    commonest = torch.bincount(truth).argmax()

    def per_document(hits: Tensor) -> Float64[Tensor, " n_documents"]:
        return torch.zeros(len(plan.lengths), dtype=torch.float64).index_add_(0, document, hits.double())

    counts, hits, null = (per_document(one) for one in (truth >= 0, truth == named, truth == commonest))
    tested = counts > 0
    weights = _resamplings(int(tested.sum()))
    n = weights @ counts[tested]
    value, chance = (weights @ one[tested] / n for one in (hits, null))
    figures = {
        "value": point(value),
        "null": point(chance),
        "difference": point(value - chance),
        "interval": interval(value - chance),
    }
    return figures, value
