"""Promise: every temporal measure is what its definition says, token by token, whatever the batches and their order."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.evaluate import batches
from tcsae.evaluate.measures import code_ops, position_removed, positions
from tcsae.evaluate.measures.positions import N_GROUPS, N_LABELS, Layout
from tcsae.evaluate.measures.temporal_figures import (
    FAR,
    MIN_FIRINGS,
    latent_measures,
    pool,
    slowness,
    token_measures,
)
from tcsae.evaluate.measures.temporal_run import XMoments, latent_groups, matched
from tcsae.evaluate.measures.temporal_sums import N_LAGS, Collector, TemporalSums, no_sums
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.sae.sparse import SparseCode, positive_code
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split, Store

LENGTH, WIDTH = 40, 7


class FakeStore(Store):
    """As much of a store as the measures ask of it."""

    sequence_length, sequences_per_chunk = LENGTH, 5

    def __init__(self) -> None:
        """Nothing on disk."""


class FakeSplit(Split):
    """A split in memory: documents of one to four sequences, lengths as they come, one of them over two pieces."""

    def __init__(self, seed: int, n_documents: int = 14) -> None:
        rng = np.random.default_rng(seed)
        n_sequences = rng.integers(1, 5, n_documents)
        self.documents = np.repeat(np.arange(n_documents) * 3, n_sequences)
        n = self.n_sequences = len(self.documents)
        self.lengths = rng.integers(1, LENGTH + 1, n).astype(np.int32)
        self.tokens = rng.integers(0, 9, (n, LENGTH)).astype(np.int32) ** 2
        self.store = FakeStore()
        # Latents that persist, that follow the position, the token, the document; and one that never fires.
        slow = np.cumsum(rng.normal(size=(n, LENGTH, WIDTH)), 1) * 0.4
        slow[..., 1] += np.linspace(-3, 3, LENGTH)
        slow[..., 2] += self.tokens % 5 - 2
        slow[..., 3] += rng.normal(size=n_documents)[self.documents // 3][:, None] * 2
        slow[..., 4] = -1
        self.code = np.maximum(slow, 0).astype(np.float16)

    def read(self, hook: str, start: int, stop: int) -> np.ndarray:  # noqa: ARG002
        return self.code[start:stop]


def collect(split: FakeSplit, skip_first: int, dense: bool, factor: float = 1.0) -> Collector:
    """The code is x itself, fed as a code."""
    rules = CountingRules(skip_first=skip_first)
    layout = Layout(split, rules)
    collector = Collector(WIDTH, layout)
    for batch in batches.batches(split, "hook", rules):
        code = batch.x[batch.counted] * factor
        collector.add(layout.view(batch), code if dense else positive_code(code))
    return collector


def naive_pairs(split: FakeSplit, skip_first: int, lag: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    result = []
    for i, length in enumerate(split.lengths):
        f = split.code[i, skip_first:length].astype(np.float64)
        result += [(f[t], f[t + lag], split.documents[i]) for t in range(len(f) - lag)]
    return result


def naive_tokens(split: FakeSplit, skip_first: int) -> list[tuple[np.ndarray, int, int, int]]:
    return [
        (split.code[i, p].astype(np.float64), p, int(split.tokens[i, p]), int(split.documents[i]))
        for i, length in enumerate(split.lengths)
        for p in range(skip_first, length)
    ]


def naive_share(f: np.ndarray, labels: np.ndarray) -> float:
    """Bias-corrected, pooled: from the variances around the labels' means."""
    within = sum(((f[labels == one] - f[labels == one].mean(0)) ** 2).sum() for one in np.unique(labels))
    share = 1 - within / ((f - f.mean(0)) ** 2).sum()
    return 1 - (1 - share) * (len(f) - 1) / (len(f) - len(np.unique(labels)))


EVERY = torch.ones(WIDTH, dtype=torch.bool)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("seed, skip_first", [(0, 0), (1, 1), (2, 3)])
def test_measures_follow_their_definitions(seed, skip_first, dense):
    split = FakeSplit(seed)
    whole = collect(split, skip_first, dense).sums.without(None)
    values, nulls, curves = latent_measures(whole, whole, EVERY)
    tokens = naive_tokens(split, skip_first)
    f, position, token, document = (np.array(one) for one in zip(*tokens, strict=True))
    mean, variance = f.mean(0), f.var(0)
    means = {one: f[document == one].mean(0) for one in np.unique(document)}
    within = f - np.array([means[one] for one in document])
    often = (f > 0).sum(0) >= MIN_FIRINGS
    for lag in (1, 2, 5, FAR, N_LAGS):
        pairs = naive_pairs(split, skip_first, lag)
        raw = np.mean([(a - mean) * (b - mean) for a, b, _ in pairs], 0)
        around = np.mean([(a - means[d]) * (b - means[d]) for a, b, d in pairs], 0)
        assert curves["rho_1"][lag - 1] == pytest.approx(raw.sum() / variance.sum(), rel=1e-6)
        assert curves["rho_1_within"][lag - 1] == pytest.approx(around.sum() / (within**2).mean(0).sum(), rel=1e-6)
        assert pool(whole).covariance[lag - 1].numpy() == pytest.approx(raw, rel=1e-6, abs=1e-9)
        half = torch.from_numpy((raw / np.where(variance > 0, variance, 1))[often]).median()
        assert curves["rho_1_median"][lag - 1] == pytest.approx(float(half), rel=1e-6)
    assert values[f"rho_{FAR}_within"] == curves["rho_1_within"][FAR - 1]
    adjacent = naive_pairs(split, skip_first, 1)
    steps = np.mean([(a - b) ** 2 for a, b, _ in adjacent], 0).sum()
    assert values["slowness"] == pytest.approx(steps / (2 * variance.sum()), rel=1e-6)
    p, starts = (f > 0).mean(0), sum((a > 0) for a, _, _ in adjacent)
    again = sum((a > 0) & (b > 0) for a, b, _ in adjacent)
    assert values["dwell"] == pytest.approx((starts * (1 - p)).sum() / (starts - again).sum(), rel=1e-9)
    assert values["position_share"] == pytest.approx(naive_share(f, position), abs=1e-6)
    assert values["token_share"] == pytest.approx(naive_share(f, token), abs=1e-6)
    assert values["document_share"] == pytest.approx(naive_share(f, document), abs=1e-6)
    assert values["slowness"] < 0.5 < nulls["slowness"], "the walk is slow, and permuted it is not"
    with np.errstate(invalid="ignore", divide="ignore"):
        own = {
            "slowness": np.mean([(a - b) ** 2 for a, b, _ in adjacent], 0) / (2 * variance),
            f"rho_{FAR}_within": np.mean(
                [(a - means[d]) * (b - means[d]) for a, b, d in naive_pairs(split, skip_first, FAR)], 0
            )
            / (within**2).mean(0),
            "dwell": (1 - p) / (1 - again / starts),
            "position_share": [naive_share(f[:, [i]], position) for i in range(WIDTH)],
            "document_share": [naive_share(f[:, [i]], document) for i in range(WIDTH)],
        }
    for name, each in own.items():
        live = np.array(each)[often]
        assert values[name + "_mean"] == pytest.approx(live.mean(), abs=1e-6), name
        assert values[name + "_median"] == pytest.approx(np.sort(live)[(len(live) - 1) // 2], abs=1e-6), name


@pytest.mark.parametrize("dense, n_bins", [(True, LENGTH), (False, LENGTH), (False, 8)])
def test_the_mean_by_position_is_taken_out(dense, n_bins, monkeypatch):
    monkeypatch.setattr(positions, "N_LABELS", n_bins)
    split, skip_first = FakeSplit(2), 1
    collector = collect(split, skip_first, dense)
    figures = position_removed.figures(collector.positions, collector.sums.without(None))
    f, position, _, document = (np.array(one) for one in zip(*naive_tokens(split, skip_first), strict=True))
    position = position * n_bins // LENGTH

    def centred(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
        means = {one: values[labels == one].mean(0) for one in np.unique(labels)}
        return values - np.array([means[one] for one in labels])

    within = centred(f, document)
    variance = (centred(within, position) ** 2).mean(0).sum()
    starts = np.cumsum([0, *np.maximum(split.lengths - skip_first, 0)])
    for lag in (1, FAR):
        first = np.concatenate([np.arange(a, max(a, b - lag)) for a, b in itertools.pairwise(starts)])
        one, other = (centred(within[at], position[first]) for at in (first, first + lag))
        assert figures[f"rho_{lag}_within"] == pytest.approx((one * other).mean(0).sum() / variance, rel=1e-5)
        if lag == 1:
            steps = (centred(f[first + 1] - f[first], position[first]) ** 2).mean(0).sum()
    g = centred(f, position)
    assert figures["slowness"] == pytest.approx(steps / (2 * (g**2).mean(0).sum()), rel=1e-5)
    assert figures["document_share"] == pytest.approx(naive_share(g, document), rel=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_whole_codes_are_compared_as_defined(dense):
    split = FakeSplit(3)
    collector = collect(split, 1, dense)
    values, nulls, _ = token_measures(collector.sums.without(None))

    def jaccard(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        met = [((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum() for a, b in pairs if ((a > 0) | (b > 0)).any()]
        return float(np.mean(met))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        energy = (a @ a) + (b @ b)
        return ((a - b) @ (a - b)) / energy if energy else 0.0

    adjacent = [(a, b) for a, b, _ in naive_pairs(split, 1, 1)]
    documents: dict[int, list[np.ndarray]] = {}
    for i, length in enumerate(split.lengths):
        if length > 1:
            documents.setdefault(split.documents[i], []).append(split.code[i, 1:length].astype(np.float64))
    in_order = list(documents.values())
    partners = [pair for one, two in itertools.pairwise(in_order) for pair in zip(one[0], two[0])]  # noqa: B905
    joins = [distance(one[-1][-1], two[0][0]) for one, two in itertools.pairwise(in_order)]
    assert values["jaccard_adjacent"] == pytest.approx(jaccard(adjacent), rel=1e-9)
    assert nulls["jaccard_adjacent"] == pytest.approx(jaccard(partners), rel=1e-9)
    inside = np.array([distance(a, b) for a, b in adjacent])
    restarts = np.array([distance(one[-1], two[0]) for own in in_order for one, two in itertools.pairwise(own)])

    def auc(larger: np.ndarray, smaller: np.ndarray) -> float:
        return float(np.mean([(one > smaller).mean() + (one == smaller).mean() / 2 for one in larger]))

    assert values["boundary_auc"] == pytest.approx(auc(np.array(joins), inside), abs=0.01), "up to the width of a bin"
    assert len(restarts) > 10 and values["restart_auc"] == pytest.approx(auc(restarts, inside), abs=0.01)
    assert values["join_auc"] == pytest.approx(auc(np.array(joins), restarts), abs=0.02)
    assert values["boundary_ratio"] == pytest.approx(np.mean(joins) / inside.mean(), rel=0.02)
    assert values["adjacent_difference"] == pytest.approx(np.mean([(a - b) @ (a - b) for a, b in adjacent]), rel=1e-6)


@pytest.mark.slow
def test_the_null_is_the_mean_over_permutations():
    """Closed forms against 300 permutations of the positions of every document."""
    split, rng = FakeSplit(4, 6), np.random.default_rng(0)
    whole = collect(split, 0, True).sums.without(None)
    _, nulls, _ = latent_measures(whole, whole, EVERY)
    drawn: dict[str, list[float]] = {"rho_1": [], "rho_1_within": [], "slowness": []}
    original = split.code.copy()
    for _ in range(300):
        for document in np.unique(split.documents):
            rows = split.documents == document
            valid = rows[:, None] & (np.arange(LENGTH) < split.lengths[:, None])
            values = original[valid]
            split.code[valid] = values[rng.permutation(len(values))]
        sums = collect(split, 0, True).sums.without(None)
        values, _, _ = latent_measures(sums, sums, EVERY)
        for name, result in drawn.items():
            result.append(values[name])
    for name, result in drawn.items():
        error = np.std(result) / np.sqrt(len(result))
        assert nulls[name] == pytest.approx(np.mean(result), abs=4 * error), name


def test_batches_change_nothing(monkeypatch):
    split = FakeSplit(5)
    before = collect(split, 1, False).sums
    for tokens in (1, 3 * LENGTH, 1000 * LENGTH):
        monkeypatch.setattr(batches, "BATCH_TOKENS", tokens)
        after = collect(split, 1, False).sums
        for name in before.__slots__:
            torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-6, atol=1e-6)


def test_chunks_and_the_order_of_documents_change_nothing(monkeypatch):
    """Values and the nulls in closed form; what is drawn (stand-ins, partners) depends on a document's number."""
    split, drawn = FakeSplit(5), ("position_share", "token_share", "dwell_median", "dwell_mean")

    def figures() -> tuple[dict, dict, dict]:
        sums = collect(split, 1, False).sums.without(None)
        values, nulls, curves = latent_measures(sums, sums, EVERY)
        kept = {name: null for name, null in nulls.items() if not name.startswith(drawn)}
        return values | token_measures(sums)[0], kept, curves

    before = figures()
    for n in (1, 3, 1000):
        monkeypatch.setattr(FakeStore, "sequences_per_chunk", n)
        for one, other in zip(figures(), before, strict=True):
            assert one == {name: pytest.approx(value, rel=1e-6) for name, value in other.items()}
    order = np.argsort(-split.documents, kind="stable")
    split.documents = split.documents.max() - split.documents[order]
    for name in ("lengths", "tokens", "code"):
        setattr(split, name, getattr(split, name)[order])
    across = {"jaccard_corrected", "boundary_auc", "join_auc", "boundary_ratio"}  # compare consecutive documents
    for one, other in zip(figures(), before, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - across:
            assert one[name] == pytest.approx(other[name], rel=1e-6), name


def test_sparse_and_dense_codes_give_the_same_sums():
    split = FakeSplit(6)
    sparse, dense = (collect(split, 1, kind).sums for kind in (False, True))
    for name in sparse.__slots__:
        torch.testing.assert_close(getattr(sparse, name), getattr(dense, name), rtol=1e-6, atol=1e-5)


def scaled(sums: TemporalSums, factor: float) -> TemporalSums:
    """The sums of the code times `factor`: of second order in f, or of first order, or counts."""
    first = "f edges permuted_m by_position by_token permuted_by_position permuted_by_token magnitude"
    second = "squares edge_squares products edges_m m_squares between permuted_squares permuted_products token_squares"
    second += " permuted_token_squares difference energy"
    powers = dict.fromkeys(first.split(), 1) | dict.fromkeys(second.split(), 2)
    return replace(
        sums, **{one.name: getattr(sums, one.name) * factor ** powers.get(one.name, 0) for one in fields(sums)}
    )


@given(st.sampled_from([0.25, 0.5, 2.0, 8.0]))
@settings(max_examples=4, deadline=None)
def test_a_scaled_code_moves_one_measure_only(factor):
    """The null of the scaled code: whatever shrinking alone would change is no measure of slowness."""
    split = FakeSplit(7)
    one, other = (collect(split, 1, False, by).sums.without(None) for by in (1.0, factor))
    before, after = ({**latent_measures(s, s, EVERY)[0], **token_measures(s)[0]} for s in (one, other))
    assert after.pop("adjacent_difference") == pytest.approx(factor**2 * before.pop("adjacent_difference"))
    assert after == pytest.approx(before, rel=1e-5)
    for name in one.__slots__:
        torch.testing.assert_close(getattr(scaled(one, factor), name), getattr(other, name), rtol=1e-5, atol=1e-5)


def test_principal_components_are_as_slow_as_their_projections():
    split = FakeSplit(8)
    layout = Layout(split, CountingRules(skip_first=1))
    moments, collector = XMoments(WIDTH), Collector(3, layout)
    x = np.concatenate([split.code[i, 1:length] for i, length in enumerate(split.lengths)]).astype(np.float64)
    _, vectors = np.linalg.eigh(np.cov(x.T))
    basis = torch.from_numpy(vectors[:, -3:]).float()
    for batch in batches.batches(split, "hook", CountingRules(skip_first=1)):
        view, counted = layout.view(batch), batch.x[batch.counted]
        moments.add(view, counted)
        collector.add(view, counted @ basis)
    expected, _ = slowness(collector.sums.without(None), torch.ones(3, dtype=torch.bool))
    assert moments.pca_slowness(3, None) == pytest.approx(expected, rel=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_lag_products_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 90))
    sequence = np.sort(rng.integers(0, 3, n))
    group = np.array([2, 0, 1])[sequence]
    f = (rng.exponential(size=(n, 4)) * (rng.random((n, 4)) < 0.5)).astype(np.float32)
    expected, both = np.zeros((N_GROUPS, N_LAGS, 4)), np.zeros((N_GROUPS, 4))
    for t in range(n):
        for k in range(1, N_LAGS + 1):
            if t + k < n and sequence[t] == sequence[t + k]:
                expected[group[t], k - 1] += f[t].astype(float) * f[t + k]
                both[group[t]] += (k == 1) * (f[t] > 0) * (f[t + k] > 0)
    for code in (torch.from_numpy(f), positive_code(torch.from_numpy(f))):
        sums = no_sums(4, 8)
        held, at = code_ops.by_latent(code), (torch.from_numpy(sequence), torch.from_numpy(group))
        code_ops.add_lag_products(sums.products, sums.both, held, *at)
        np.testing.assert_allclose(sums.products, expected, atol=1e-5)
        np.testing.assert_array_equal(sums.both, both)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_taking_tokens_is_indexing(seed):
    rng = np.random.default_rng(seed)
    f = torch.from_numpy((rng.random((9, 5)) * (rng.random((9, 5)) < 0.4)).astype(np.float32))
    at = torch.from_numpy(rng.integers(0, 9, int(rng.integers(0, 20))))
    taken = code_ops.take(positive_code(f), at)
    assert isinstance(taken, SparseCode)
    assert torch.equal(taken.dense(), f[at])


def test_stand_ins_permute_within_a_document_and_not_by_batch():
    split = FakeSplit(9)
    layout = Layout(split, CountingRules(skip_first=1))
    for batch in batches.batches(split, "hook", CountingRules(skip_first=1)):
        view = layout.view(batch)
        assert torch.equal(view.standing_in.sort().values, torch.arange(view.n))
        assert torch.equal(view.piece[view.standing_in], view.piece)
    assert (view.standing_in != torch.arange(view.n)).float().mean() > 0.5


def test_only_frequent_tokens_have_a_label():
    split = FakeSplit(10)
    split.tokens = np.arange(split.tokens.size).reshape(split.tokens.shape) // 2
    split.tokens[0, :5] = 3
    layout = Layout(split, CountingRules())
    assert int((layout.rank < N_LABELS).sum()) == N_LABELS
    assert layout.rank[3] == 0, "the most frequent"


def test_a_matched_group_fires_as_often():
    rng = np.random.default_rng(0)
    firings = torch.from_numpy(rng.lognormal(3, 1.5, 500).round())
    groups = latent_groups(SaeConfig(d_model=3, d_sae=500, groups=(0.2, 0.8)), firings)
    first, control = groups["first_group"], groups["frequency_matched"]
    assert int(first.sum()) == int(control.sum()) == 100
    assert not (first & control).any()
    ours, theirs = (firings[one].sort().values for one in (first, control))
    assert float((ours - theirs).abs().median()) <= 1
    assert abs(float(ours.mean() / theirs.mean()) - 1) < 0.2
    random = firings[100:200].sort().values
    assert float((ours - theirs).abs().mean()) < float((ours - random).abs().mean())
    assert int(matched(firings, torch.arange(500) < 400).sum()) == 100, "all others, where there are fewer"
