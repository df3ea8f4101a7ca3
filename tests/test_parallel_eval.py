"""Promise: `eval` in several processes finds what one process finds, whatever is dealt out: SAEs or documents."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_eval as toy
from click.testing import CliRunner
from toy_ranks import fork

import tcsae
from tcsae.evaluate import batches, candidates, evaluation_files, run
from tcsae.evaluate import parallel as together
from tcsae.evaluate.run import evaluate_parallel
from tcsae.shared.base.distributed import Ranks
from tcsae.shared.base.errors import StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import open_store

pytestmark = pytest.mark.slow


LENGTH = 64
FLOAT32 = ("position_share", "token_share", "position_removed")
"""Of sums by position and by token, which are kept in float32: the order of addition shows."""


OWN = {"seconds", "datetime_epoch_millis", "eval_id", "files", "digest"}
"""What no two evaluations share."""


def far(one, other, path="") -> list[tuple[str, float]]:
    """Where two evaluations differ by more than rounding, and by how much."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [result for key in one.keys() - OWN for result in far(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list):
        assert len(one) == len(other)
        return [result for i, pair in enumerate(zip(one, other, strict=True)) for result in far(*pair, f"{path}/{i}")]
    if isinstance(one, float) and isinstance(other, float):
        rounding = 1e-12
        if any(f"/{name}" in path for name in FLOAT32):
            rounding = 3e-7 if "_median/" in path else 1e-7  # one latent's, where others' errors do not cancel
        return [] if math.isclose(one, other, rel_tol=1e-9, abs_tol=rounding) else [(path, one - other)]
    return [] if one == other else [(path, math.inf)]


def probed_store(folder: Path) -> str:
    """Documents of 1 to 5 sequences, long enough for probes; some begin with sequences that hold no counted token."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(24), rng.integers(1, 6, 24))
    lengths = rng.integers(50, LENGTH + 1, len(documents))
    lengths[rng.random(len(documents)) < 0.2] = 1
    means = rng.normal(size=(24, toy.WIDTH))[documents]
    with tcsae.create_store(folder / "probed.zarr", hooks={"h": toy.WIDTH}, sequence_length=LENGTH) as store:
        for first, split in ((0, "train"), (24, "eval")):
            x = means[:, None] + rng.normal(size=(len(documents), LENGTH, toy.WIDTH))
            tokens = rng.integers(0, 40, (len(documents), LENGTH))
            store.append(split, {"h": x.astype("f4")}, lengths=lengths, documents=documents + first, tokens=tokens)
    return str(folder / "probed.zarr")


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "tail": toy.write_store(folder / "a.zarr", toy.make_model(), toy.N_SEQUENCES).location,
        "probes": probed_store(folder),
    }


SAES = {
    "topk": {},
    "gelu": {"activation": "gelu"},
    "nested": {"activation": "batchtopk", "groups": (0.25, 0.75)},
}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tail", "probes"])
@pytest.mark.parametrize("sae", SAES)
def test_one_sae_is_scored_by_all_to_the_figures_of_one_process(stores, tmp_path, monkeypatch, kind, world, sae):
    store = open_store(stores[kind])
    changes = {} if kind == "tail" else {"hook": "h"}
    toy.make_run(tmp_path / "alone", "run", toy.make_sae(**SAES[sae]), store, **changes)
    shutil.copytree(tmp_path / "alone", tmp_path / "parts")
    monkeypatch.setattr(batches, "BATCH_TOKENS", 3 * store.sequence_length)
    monkeypatch.setattr(batches, "PIECE_SEQUENCES", 2)
    request = candidates.EvalRequest(baselines=True, force=True, smooth=("ema=0.3",))

    def do(ours: Ranks) -> None:
        result = evaluate_parallel(open_store(stores[kind]), tmp_path / "parts", request, ours)
        assert len(result.evaluations) == 2 * (ours.rank == 0)

    fork(world, do)
    run.evaluate_runs(store, tmp_path / "alone", request)
    for file in ("eval.json", "eval+ema=0.3.json", "saebench_core.json"):
        ours, theirs = (json.loads((tmp_path / name / "run" / file).read_text()) for name in ("parts", "alone"))
        print(far(ours, theirs))
        assert far(ours, theirs) == []
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "run" / evaluation_files.REPLICATES)
        for name in ("parts", "alone")
    )
    for name, draws in theirs.items():
        torch.testing.assert_close(ours[name], draws, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert ("probe_document" in theirs) == (kind == "probes")
    assert ("ce_loss_score" in theirs) == (kind == "tail")


def test_two_processes_write_the_figures_of_one(tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    for i in range(3):
        toy.make_run(tmp_path / "alone", f"run{i}", toy.make_sae(seed=i), store)
    shutil.copytree(tmp_path / "alone", tmp_path / "dealt")
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path / "alone"), "eval"])
    assert done.exit_code == 0, done.output

    def do(ours: Ranks) -> None:
        said = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path / "dealt"), "eval"])
        (tmp_path / f"out{ours.rank}").write_text(said.stdout)
        assert said.exit_code == 0, said.output

    fork(2, do)
    assert (tmp_path / "out1").read_text() == ""
    assert "run0" in (tmp_path / "out0").read_text()
    assert "run2" in (tmp_path / "out0").read_text()
    for i in range(3):
        ours, theirs = (
            json.loads((tmp_path / name / f"run{i}" / "eval.json").read_text()) for name in ("dealt", "alone")
        )
        assert ours["metrics"] == theirs["metrics"]
        assert ours["temporal"] == theirs["temporal"]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("per_batch", [1, 3, 1000])
def test_every_document_is_in_one_part(stores, monkeypatch, world, per_batch):
    split = open_store(stores["probes"]).eval
    monkeypatch.setattr(batches, "BATCH_TOKENS", per_batch * LENGTH)
    parts = [together.part_of(split, toy.FROM_1, Ranks(rank, world, rank)) for rank in range(world)]
    assert [one for part in parts for one in part.own] == batches.batch_ranges(split)
    documents = [
        {int(one) for start, stop in part.own for one in split.documents[start:stop]} for part in parts if part.own
    ]
    assert sum(len(one) for one in documents) == len(set().union(*documents)) == split.n_documents
    if world <= 3 and per_batch < 1000:
        assert all(abs(part.n_tokens(split) * world / split.n_tokens - 1) < 0.5 for part in parts)
    assert any(part.before for part in parts) == (len(documents) > 1)


def test_a_process_without_a_document_adds_nothing(tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), {"train": 30, "eval": 6})
    toy.make_run(tmp_path / "alone", "run", toy.make_sae(), store)
    shutil.copytree(tmp_path / "alone", tmp_path / "parts")
    request = candidates.EvalRequest()  # all three documents are one batch
    fork(2, lambda ours: evaluate_parallel(open_store(store.location), tmp_path / "parts", request, ours))
    run.evaluate_runs(store, tmp_path / "alone", request)
    ours, theirs = (json.loads((tmp_path / name / "run" / "eval.json").read_text()) for name in ("parts", "alone"))
    assert far(ours, theirs) == []


def test_a_tail_that_one_process_cannot_read_is_named(stores, tmp_path):
    toy.make_run(tmp_path, "run", toy.make_sae(), open_store(stores["tail"]))

    def do(ours: Ranks) -> None:
        if ours.rank == 1:
            run._tail = lambda *_: (None, "it is damaged")
        with pytest.raises(StoreError, match="Process 1 of 2 cannot read the tail that others read: it is damaged"):
            evaluate_parallel(open_store(stores["tail"]), tmp_path, candidates.EvalRequest(), ours)

    fork(2, do)


def test_without_a_rendezvous_one_sae_is_dealt_to_one_process(stores, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    store = open_store(stores["tail"])
    toy.make_run(tmp_path, "run", toy.make_sae(), store)
    result = [evaluate_parallel(store, tmp_path, candidates.EvalRequest(), Ranks(rank, 2, rank)) for rank in (1, 0)]
    assert [[one["name"] for one in each.evaluations] for each in result] == [[], ["run"]]
