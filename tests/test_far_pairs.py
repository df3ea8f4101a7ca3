"""Promise: temporal.order=document shows a term tokens of one document that are far apart, and only those."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch, Text, far_apart
from tcsae.train.checks import check_parallel
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs

WIDTH, LENGTH = 6, 20


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=12),
    st.integers(1, 30),
)
@settings(deadline=None)
def test_neighbours_are_of_one_document_and_far_apart(segments, distance):
    lengths, documents, starts = (np.array(one) for one in zip(*segments, strict=True))
    places = np.concatenate([start + np.arange(n) for n, start in zip(lengths, starts, strict=True)])
    x = torch.arange(int(lengths.sum()))[:, None].float()
    batch = Batch(x, lengths, np.zeros_like(lengths), documents, text=Text(places, places))
    order, ordered = far_apart(batch, distance)
    tokens = order.numpy()
    assert sorted(tokens.tolist()) == list(range(len(x))), "every token once"
    assert (ordered.x[:, 0].long() == order).all()
    assert int(ordered.lengths.sum()) == len(x) and ordered.longest <= batch.longest
    segment = np.repeat(np.arange(len(ordered.lengths)), ordered.lengths)
    document = np.repeat(documents, lengths)[tokens]
    assert (np.repeat(ordered.documents, ordered.lengths) == document).all()
    gaps = np.abs(np.diff(places[tokens]))[segment[1:] == segment[:-1]]
    assert (gaps >= distance).all()


def test_far_tokens_are_found_where_a_document_has_them():
    lengths, starts = np.full(4, 16), np.array([0, 200, 400, 600])
    places = (starts[:, None] + np.arange(16)).ravel()
    batch = Batch(torch.zeros(64, 2), lengths, starts, np.zeros(4, np.int64), text=Text(places, places))
    _, ordered = far_apart(batch, 64)
    assert ordered.lengths.tolist() == [16, 16, 16, 16]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of four sequences."""
    path, rng = tmp_path_factory.mktemp("far") / "a.zarr", np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH, codec="float32") as creation:
        for split, n, first in (("train", 80, 0), ("eval", 8, 100)):
            creation.append(
                split,
                {"h": rng.normal(size=(n, LENGTH, WIDTH)).astype("f4")},
                documents=first + np.repeat(np.arange(n // 4), 4),
            )
    return tcsae.open_store(path)


def config(*more: str, name: str = "temporal-topk"):
    small = ["sae.d_sae=32", "sae.k=4", "steps=6", "log_every=3", "data.n_segments=16", "data.segment_length=5"]
    far = ["temporal.order=document", "temporal.contrast.distance=25", "data.document_segments=4"]
    return with_settings(preset(name, WIDTH), [*small, *far, *more])


@pytest.mark.parametrize("kind", ["contrastive", "relative"])
def test_a_term_trains_on_them(store, tmp_path, kind):
    (record,) = train_runs(store, tmp_path, [Run("a", "temporal-topk", config(f"temporal.kind={kind}"))])
    assert record["steps"] == 6 and not record["ended"]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert '"temporal": 0.0' not in lines, "pairs are there"


def test_what_cannot_have_them_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"temporal.order='document' is for .* sae.window=3"):
        config("sae.window=3", "temporal.kind=relative")
    with pytest.raises(ConfigError, match=r"temporal.order='document' pairs tokens of the whole batch"):
        check_parallel(config(), 2)
    with pytest.raises(ConfigError, match=r"temporal.order='document' pairs .*distance=25 apart.*document_segments=4"):
        train_runs(store, tmp_path, [Run("a", "temporal-topk", config("data.document_segments=1"))])
