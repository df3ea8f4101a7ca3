"""Promise: tokens left out (by id, role or norm) are left out of training and of evaluation alike, and counted."""

import itertools
import json

import numpy as np
import pytest
import torch

from tcsae.api import convert
from tcsae.evaluate.batches import batches
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.measures.positions import Layout
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.base.settings import to_dict
from tcsae.shared.sae.layout import SaeConfig, SaeMetadata
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.counted import CountingRules, counted, left_out, norm_median
from tcsae.shared.store.format import (
    SPLITS,
    ChatRecipe,
    CorpusRecipe,
    HookRecipe,
    ModelRecipe,
    Recipe,
    SequenceRecipe,
)
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.plan import Request, plan_runs
from tcsae.train.run import train_runs

HOOK, LENGTH, N, ROLES = "h", 12, 40, ("assistant", "user")
RULES = {
    "ids": CountingRules(skip_first=1, exclude_tokens=("3", "7")),
    "role": CountingRules(skip_first=1, positions=("user",)),
    "norm": CountingRules(skip_first=1, max_norm=1.5),
    "all": CountingRules(skip_first=2, exclude_tokens=("3",), positions=("assistant", "user"), max_norm=1.5),
}


def rows(n: int, seed: int, first: int, roles: bool) -> Rows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, LENGTH + 1, n).astype(np.int32)
    valid = np.arange(LENGTH) < lengths[:, None]
    tokens = np.where(valid, rng.integers(1, 12, (n, LENGTH)), 0).astype(np.int32)
    whose = np.where(valid, rng.integers(0, 3, (n, LENGTH)), 0).astype(np.uint8)
    documents = first + np.arange(n, dtype=np.int64)
    return Rows(tokens, lengths, documents, np.zeros(n, np.int32), whose if roles else None)


def store_at(path, roles: bool = True):
    recipe = Recipe(
        model=ModelRecipe(name="m", revision="r"),
        corpus=CorpusRecipe(name="c", revision="r"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=3),),
        codec="float32",
        n_tokens=N * LENGTH,
        chat=ChatRecipe(template="t", roles=ROLES, spans=("generation", "content")) if roles else None,
    )
    parts = {"train": rows(N, 0, 0, roles), "eval": rows(N, 1, N, roles)}
    with open_writer(str(path), recipe) as writer:
        writer.commit(parts, {})
        counts = {s: {"sequences": N, "tokens": int(parts[s].lengths.sum()), "documents": N} for s in SPLITS}
        writer.finish_sequences(counts)
        for shard in writer.missing_shards():
            sequence, position = np.mgrid[shard.start : shard.stop, 0:LENGTH]
            loud = np.where((sequence + position) % 5 == 0, 400.0, 10.0)
            writer.write_shard(shard, {HOOK: np.stack([sequence, position, loud], -1).astype(np.float32)})
        writer.seal({HOOK: {"none": "a test"}}, [], {})
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_at(tmp_path_factory.mktemp("counted") / "a.zarr")


def expected(store, rules: CountingRules, split: str) -> set[tuple[int, int]]:
    """(sequence, position) that count, one by one."""
    one, limit = store.split(split), (rules.max_norm or np.inf) * norm_median(store, HOOK)
    x = one.read(HOOK, 0, N)
    return {
        (s, p)
        for s in range(N)
        for p in range(rules.skip_first, one.lengths[s])
        if str(one.tokens[s, p]) not in rules.exclude_tokens
        and (not rules.positions or ("", *ROLES)[one.roles[s, p]] in rules.positions)
        and np.linalg.norm(x[s, p]) <= limit
    }


@pytest.mark.parametrize("rules", [*RULES.values(), CountingRules()], ids=[*RULES, "none"])
def test_a_converted_saes_threshold_is_of_what_counted_in_its_training(store, rules, monkeypatch):
    sae, samples = SparseAutoencoder(SaeConfig(d_model=3, d_sae=8, k=2)), []
    sae.metadata = SaeMetadata(hook=HOOK, record={"train": {"data": to_dict(rules)}}, skip_first=rules.skip_first)
    monkeypatch.setattr(convert, "_threshold", lambda sae, x, k: samples.append(x) or 0.0)  # noqa: ARG005
    convert.to_jumprelu(sae, store)
    assert sorted((int(s), int(p)) for s, p, _ in samples[0]) == sorted(expected(store, rules, "train"))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_an_epoch_has_what_counts_once_and_no_segment_spans_what_does_not(store, rules):
    config = DataConfig(
        n_segments=5,
        segment_length=4,
        skip_first=rules.skip_first,
        exclude_tokens=rules.exclude_tokens,
        positions=rules.positions,
        max_norm=rules.max_norm,
    )
    loader = SegmentLoader(store, config)
    result, n_out = [], 0
    for batch in itertools.islice(loader, -(-loader.n_segments // 5)):
        n_out += batch.n_left_out
        for part, start in zip(np.split(batch.x.numpy(), np.cumsum(batch.lengths)[:-1]), batch.starts, strict=True):
            assert len(part) <= 4
            np.testing.assert_array_equal(part[:, 0], part[0, 0])
            np.testing.assert_array_equal(part[:, 1], start + np.arange(len(part)))
            result += [(int(s), int(p)) for s, p, _ in part]
    wanted = expected(store, rules, "train")
    assert set(result) == wanted
    assert loader.n_tokens + sum(loader.left_out().values()) == store.train.n_tokens
    if rules.max_norm is None:  # the last batch begins the next epoch
        assert len(wanted) == loader.n_tokens
    else:
        assert n_out > 0


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_evaluation_counts_the_same_and_pairs_no_token_across_what_it_leaves_out(store, rules):
    mask = counted(store.eval, rules)
    assert {(int(s), int(p)) for s, p in np.argwhere(mask)} == expected(store, rules, "eval")
    assert sum(left_out(store.eval, rules).values()) == store.eval.n_tokens - mask.sum()
    layout, seen = Layout(store.eval, rules), 0
    for batch in batches(store.eval, HOOK, rules):
        view, x = layout.view(batch), batch.x[batch.counted]
        step = (x[1:] - x[:-1])[view.adjacent]
        assert (step[:, 0] == 0).all()
        assert (step[:, 1] == 1).all(), "neighbours in the text, not merely in the batch"
        n = len(batch.tokens)
        both = torch.from_numpy(mask[batch.start : batch.start + n])
        assert view.adjacent.sum() == (both[:, 1:] & both[:, :-1]).sum()
        assert int(batch.counted.sum() + batch.skipped.sum()) == int(batch.lengths.sum())
        seen += n
    assert seen == N


@pytest.mark.slow
def test_a_run_is_scored_on_what_it_was_trained_on(store, tmp_path):
    settings = ("sae.d_sae=8", "sae.k=2", "steps=5", "data.n_segments=4", "data.segment_length=4")
    rules = ("data.exclude_tokens=3,7", "data.positions=user", "data.max_norm=1.5")
    runs = plan_runs(store, Request(["topk"], (*settings, *rules)))
    (record,) = train_runs(store, tmp_path, runs)
    out = record["left_out"]
    assert out["exclude_tokens_per_epoch"] > 0
    assert out["positions_per_epoch"] > 0
    assert out["max_norm"] > 0
    (evaluation,), refused = evaluate_runs(store, tmp_path, EvalRequest(temporal=True))
    assert not refused
    assert evaluation["options"]["exclude_tokens"] == ["3", "7"]
    as_trained = CountingRules(skip_first=1, exclude_tokens=("3", "7"), positions=("user",), max_norm=1.5)
    assert evaluation["n_tokens"] == counted(store.eval, as_trained).sum()
    assert sum(evaluation["left_out"].values()) == evaluation["n_tokens_skipped"]
    (other,), _ = evaluate_runs(store, tmp_path, EvalRequest(positions=("assistant",)))
    assert other["options"]["positions"] == ["assistant"]
    assert json.loads((tmp_path / record["name"] / "eval.json").read_text())["n_tokens"] == other["n_tokens"]


def test_a_store_with_roles_is_of_version_3_and_others_stay_of_version_2(store, tmp_path):
    assert store.manifest.version == 3
    assert store.train.roles.dtype == np.uint8
    assert not list(find_faults(store.location, [].append))
    plain = store_at(tmp_path / "b.zarr", roles=False)
    assert plain.manifest.version == 2
    assert "chat" not in plain.manifest.to_json()["recipe"]
    with pytest.raises(StoreError, match="does not say whose tokens are whose. Harvest conversations with --chat-temp"):
        counted(plain.train, CountingRules(positions=("user",)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (("data.exclude_tokens=dog",), ConfigError, "data.exclude_tokens='dog': give token ids with commas between"),
        (("data.exclude_tokens=special",), StoreError, r"keeps no tokenizer.json.* data.exclude_tokens=0,1"),
        (("data.positions=asistant",), ConfigError, "Unknown role 'asistant'. Did you mean 'assistant'"),
        (
            ("data.exclude_tokens=1,2,3,4,5,6,7,8,9,10,11",),
            StoreError,
            r"no train token counts, from 1 on, without the tokens 1,2.*Leave out fewer",
        ),
    ],
)
def test_what_cannot_be_left_out_is_said(store, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train_runs(
            store, tmp_path, plan_runs(store, Request(["topk"], (*settings, "steps=1", "sae.d_sae=8", "sae.k=2")))
        )
