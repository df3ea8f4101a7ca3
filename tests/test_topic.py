"""Promise: topic pairs are far tokens of one document in different words, told from documents of similar words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.sae.sparse import positive_code
from tcsae.train.batch import Batch, Text
from tcsae.train.loader import SegmentLoader, document_order
from tcsae.train.losses.contrastive import contrastive
from tcsae.train.losses.topic import MATCHED, local_topic, topic, topic_pairs
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs
from tcsae.train.settings.temporal_settings import ContrastConfig, TemporalConfig

D, LENGTH = 6, 20


def batch_of(lengths: list[int], seed: int, n_words: int) -> Batch:
    """Segments of a few documents, from anywhere in them."""
    rng, n = np.random.default_rng(seed), len(lengths)
    documents = rng.integers(0, max(1, n // 2), n)
    starts = rng.integers(0, 30, n)
    place = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    text = Text(rng.integers(0, n_words, sum(lengths)), place)
    return Batch(torch.zeros(sum(lengths), 3), np.array(lengths), starts, documents, text=text)


def around(batch: Batch, t: int, width: int) -> set[int]:
    segment = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    return {int(batch.text.tokens[u]) for u in range(max(0, t - width), min(len(segment), t + width + 1))
            if segment[u] == segment[t]}  # fmt: skip


def similar(batch: Batch) -> dict[tuple[int, int], bool]:
    """Of two documents: whether one is in the nearer half of the other's others, by cosine of tf-idf."""
    document = np.repeat(batch.documents, batch.lengths)
    names, words = np.unique(document), np.unique(batch.text.tokens)
    counts = np.array([[((document == d) & (batch.text.tokens == w)).sum() for w in words] for d in names], float)
    weighted = counts * np.log(len(names) / (counts > 0).sum(0))
    norms = np.linalg.norm(weighted, axis=1)
    result = {}
    for i, one in enumerate(names):
        others = [j for j in range(len(names)) if j != i]
        scores = {j: weighted[i] @ weighted[j] / max(norms[i] * norms[j], 1e-12) for j in others}
        limit = sorted(scores.values(), reverse=True)[: int(np.ceil(MATCHED * len(others)))]
        for j in others:
            result[int(one), int(names[j])] = bool(limit) and scores[j] >= limit[-1] - 1e-6
    return result


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(0, 3),
    st.sampled_from([None, 3]),
    st.sampled_from([3, 60]),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_pairs_and_negatives_are_as_promised(lengths, distance, width, per_segment, n_words, seed):
    batch = batch_of(lengths, seed, n_words)
    contrast = ContrastConfig(distance=distance, around=width, per_segment=per_segment)
    anchor, partner, negatives = topic_pairs(contrast, batch, seed)
    document, segment = (np.repeat(one, batch.lengths) for one in (batch.documents, np.arange(len(lengths))))
    assert np.bincount(segment[anchor], minlength=1).max(initial=0) <= (per_segment or 1)
    like = similar(batch)
    for i, (t, u) in enumerate(zip(anchor, partner, strict=True)):
        assert document[t] == document[u]
        assert abs(batch.text.places[t] - batch.text.places[u]) >= distance
        assert not around(batch, t, width) & around(batch, u, width)
        for j, v in enumerate(partner):
            a, b = int(document[t]), int(document[v])
            apart = a != b and not around(batch, t, width) & around(batch, v, width)
            # Documents that are equally far may fall on either side of the half.
            assert not negatives[i, j] or (apart and (like[a, b] or like[b, a]))
            assert negatives[i, j] or not apart or not (like[a, b] and like[b, a]) or ties(batch)


def ties(batch: Batch) -> bool:
    """Whether more than half of the others are as near as the half: then which of them count is not said."""
    like = similar(batch)
    n = len(np.unique(batch.documents)) - 1
    return any(
        sum(like[one, other] for other in np.unique(batch.documents) if other != one) > np.ceil(MATCHED * n)
        for one in np.unique(batch.documents)
    )


def test_the_loss_is_info_nce_over_its_pairs():
    torch.manual_seed(0)
    batch, f = batch_of([9] * 12, 3, 40), torch.rand(108, D, dtype=torch.float64)
    contrast = ContrastConfig(distance=4, around=1, per_segment=2, temperature=0.4)
    config = TemporalConfig(weight=1.0, kind="topic", contrast=contrast)
    anchor, partner, negatives = topic_pairs(contrast, batch, 7)
    scores = F.cosine_similarity(f[anchor][:, None], f[partner][None], dim=2) / 0.4
    losses = []
    for i in range(len(anchor)):
        if min(negatives[i].sum(), negatives[:, i].sum()) < 1:
            continue
        for row, others in ((scores[i], negatives[i]), (scores[:, i], negatives[:, i])):
            losses.append(torch.cat([row[[i]], row[torch.from_numpy(others)]]).logsumexp(0) - row[i])
    assert len(losses) > 10
    for code in (f, positive_code(f)):
        value = topic(config, code, batch._replace(x=batch.x.double()), 7)
        assert value.item() == pytest.approx(torch.stack(losses).mean().item())
    both = local_topic(TemporalConfig(kind="local-topic", contrast=ContrastConfig(distance=4, gap=3)), f, batch, 7)
    local = contrastive(TemporalConfig(kind="local", contrast=ContrastConfig(gap=3)), f, batch, 7)
    alone = topic(TemporalConfig(kind="topic", contrast=ContrastConfig(distance=4)), f, batch, 7)
    assert both.item() == pytest.approx((local.item() + alone.item()) / 2)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_documents_stay_together_and_all_segments_come_once(documents, together, seed):
    documents = np.array(sorted(documents), np.int64)
    order = document_order(documents, together, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(documents)))
    shown = documents[order]
    for one in np.unique(documents).tolist():
        runs = np.flatnonzero(np.diff(np.flatnonzero(shown == one), prepend=-9) > 1)
        assert len(runs) <= -(-int((documents == one).sum()) // together)
    if together == 1:
        assert (order == np.random.default_rng(seed).permutation(len(documents))).all(), "as it always was"


@pytest.fixture(scope="module")
def make_store(tmp_path_factory):
    def make(pieces: int = 3, n_words: int = 500, n_documents: int = 40):
        path, rng = tmp_path_factory.mktemp("store") / "a.zarr", np.random.default_rng(0)
        with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as store:
            for split, n, first in (("train", n_documents, 0), ("eval", 2, 1000)):
                tokens = rng.integers(0, n_words, (n * pieces, LENGTH))
                x = np.repeat(tokens[..., None] / 100, D, 2) + rng.normal(size=(n * pieces, LENGTH, D))
                lengths = np.where(np.arange(n * pieces) % pieces == pieces - 1, LENGTH // 2, LENGTH)
                documents = np.repeat(np.arange(n) + first, pieces)
                store.append(split, {"h": x.astype("f4")}, lengths=lengths, tokens=tokens, documents=documents)
        return tcsae.open_store(str(path))

    return make


SMALL = ("sae.d_sae=32", "sae.k=3", "steps=8", "data.n_segments=24", "data.segment_length=5")


def topic_run(*more: str, name: str = "topic") -> Run:
    return Run(name, name, with_settings(preset(name, D), [*SMALL, "temporal.contrast.distance=12", *more]))


def test_the_loader_gives_what_stands_at_each_token(make_store):
    store = make_store()
    config = topic_run().config.data
    loader, split = SegmentLoader(store, config, text=True), store.train
    by_value = {tuple(row): i for i, row in enumerate(split.tokens.tolist())}
    for batch, _ in zip(loader, range(12), strict=False):
        at = together = 0
        before = -1
        for length, start, document in zip(batch.lengths, batch.starts, batch.documents, strict=True):
            tokens, places = (one[at : at + length] for one in batch.text)
            (i,) = (i for row, i in by_value.items() if list(row[start : start + length]) == tokens.tolist())
            assert split.documents[i] == document
            assert places.tolist() == (split.starts[i] + start + np.arange(length)).tolist()
            together += document == before
            at, before = at + length, document
        assert together > len(batch.lengths) / 3
        assert len(batch.x) == at == len(batch.text.tokens)
    assert next(iter(SegmentLoader(store, config))).text is None


@pytest.mark.slow
def test_topics_are_trained_with_others_in_one_pass_and_resumed(make_store, tmp_path):
    store = make_store()
    runs = [topic_run(), topic_run("temporal.contrast.gap=2", name="local-topic")]
    plain = Run("plain", "topk", with_settings(preset("topk", D), [*SMALL, "data.document_segments=4"]))
    runs[1] = runs[1]._replace(config=with_settings(runs[1].config, ["data.document_segments=4"]))
    train_runs(store, tmp_path / "together", [*runs, plain])
    for run in (*runs, plain):
        train_runs(store, tmp_path / "alone", [run])
        file = f"{run.name}/sae_weights.safetensors"
        assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert '"temporal": 0.0' not in (tmp_path / "alone" / "topic" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("store_of", "settings_", "line"),
    [
        ({}, ("data.document_segments=1",), "few documents have two in a batch. Set data.document_segments=4, or"),
        ({}, ("temporal.contrast.distance=50",), "the longest document of .* has 50 tokens. Lower"),
        ({"n_words": 1}, (), "tells tokens by their ids; .* has the same everywhere"),
        ({"n_documents": 1}, (), "temporal.kind='topic' contrasts documents; .* has one alone"),
    ],
)
def test_a_store_without_topics_is_refused(make_store, tmp_path, store_of, settings_, line):
    with pytest.raises(ConfigError, match=line):
        train_runs(make_store(**store_of), tmp_path, [topic_run(*settings_)])
