"""Promise: a split that cannot tell a figure gives none, shown as a dash, never one that looks like any other."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_eval as toy
from click.testing import CliRunner, Result

import tcsae
from tcsae.evaluate import batches, intervals, one_pass
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.intervals import MIN_DOCUMENTS, N_RESAMPLINGS, Resamplings, interval, jackknife, resamplings
from tcsae.evaluate.measures import probes
from tcsae.evaluate.printed_tables import differences
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import Store, open_store


def make_store(folder: Path, lengths: list[int], train_length: int = 16, sequence_length: int = 16) -> Store:
    """A document each sequence, of these lengths in the eval split."""
    rng = np.random.default_rng(0)
    with tcsae.create_store(folder / "a.zarr", hooks={"h": toy.WIDTH}, sequence_length=sequence_length) as store:
        for split, of, first in (("train", [train_length] * 6, 0), ("eval", lengths, 1000)):
            x = rng.normal(size=(len(of), sequence_length, toy.WIDTH)).astype("f4") + 1
            tokens = rng.integers(0, 30, (len(of), sequence_length))
            numbers = np.arange(len(of)) + first
            store.append(split, {"h": x}, lengths=np.array(of), documents=numbers, tokens=tokens)
    return open_store(folder / "a.zarr")


def evaluate(store: Store, runs: Path, *saes: torch.nn.Module, **options: object) -> list[dict]:
    for i, sae in enumerate(saes or [toy.make_sae()]):
        toy.make_run(runs, f"run{i}", sae, store, hook="h")
    evaluations, refused = evaluate_runs(store, runs, EvalRequest(**options))
    assert not refused
    return evaluations


def call(store: Store, runs: Path, *arguments: str) -> Result:
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def all_intervals(evaluation: dict) -> list[list[float] | None]:
    result = list(evaluation["intervals"].values())
    for part in (*evaluation["temporal"]["groups"].values(), evaluation["temporal"]["x"]):
        result += [row["interval"] for row in part["measures"].values()]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[16], [16] * 4, [16] * 4 + [1] * 30, [1, 16, 1, 1]])
def test_few_documents_have_no_interval_anywhere(tmp_path, lengths):
    """Also where many documents have no counted token: their resamplings would be of the few that have."""
    store = make_store(tmp_path, lengths)
    one, other = evaluate(store, tmp_path / "runs", toy.make_sae(), toy.make_sae(seed=2))
    assert set(map(str, all_intervals(one))) == {"None"}
    assert one["metrics"]["explained_variance"] is not None
    result = differences(tmp_path / "runs", one, other)
    assert {row["interval"] for row in result.values()} == {None}
    assert result["mse"]["difference"] == pytest.approx(one["metrics"]["mse"] - other["metrics"]["mse"])
    done = call(store, tmp_path / "runs", "eval")
    assert f"{one['metrics']['explained_variance']:.4f} ±-" in done.stdout
    assert "none of fewer than 5 documents" in " ".join(done.stdout.split())
    if len(lengths) == 1:
        assert call(store, tmp_path / "runs", "report").exit_code == 0
        assert "±–" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_enough_documents_have_intervals(tmp_path):
    (one,) = evaluate(make_store(tmp_path, [16] * MIN_DOCUMENTS), tmp_path / "runs")
    assert all(one["intervals"][name] for name in ("explained_variance", "mse", "l0"))
    assert one["temporal"]["groups"]["all"]["measures"]["rho_1"]["interval"]


def test_predictions_of_few_documents_have_no_interval(tmp_path):
    """Twenty documents of 2 tokens and two of more: at the second token nothing is predicted."""
    lengths = {"train": 10, "eval": 20}
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), lengths)
    skip_first = int(np.sort(store.eval.lengths)[-3])  # positions that three sequences have
    toy.make_run(tmp_path / "runs", "run", toy.make_sae(), store, train={"data": {"skip_first": skip_first - 1}})
    (one,) = evaluate_runs(store, tmp_path / "runs")[0]
    assert one["intervals"]["ce_loss_with_sae"] is None


@pytest.mark.parametrize("kind", ["jackknife", "percentiles"])
@pytest.mark.parametrize("n", range(1, 8))
def test_an_interval_takes_five_documents(kind, n):
    values = list(map(float, range(n)))
    if kind == "jackknife":
        result = jackknife(1.0, values)
    else:
        result = interval(resamplings(n) @ torch.tensor(values, dtype=torch.float64))
    assert (result is None) == (n < 5)


@pytest.mark.slow
def test_no_pair_at_a_lag_is_no_autocorrelation(tmp_path):
    """Sequences of one counted token have no pair at all, those of nine none beyond lag 7."""
    (one,) = evaluate(make_store(tmp_path / "short", [2] * 12), tmp_path / "short" / "runs")
    group = one["temporal"]["groups"]["all"]
    for part in (group, one["temporal"]["x"]):
        for name in ("rho_1", "rho_1_within", "rho_8_within", "slowness"):
            assert part["measures"][name] == {
                "value": None,
                "null": None,
                "difference": None,
                "interval": None,
                "replicates": part["measures"][name]["replicates"],
            }, name
        assert {value for curve in part["curves"].values() for value in curve} == {None}
    (one,) = evaluate(make_store(tmp_path / "nine", [9] * 12), tmp_path / "nine" / "runs")
    curve = one["temporal"]["groups"]["all"]["curves"]["rho_1_within"]
    assert [value is None for value in curve] == [lag > 7 for lag in range(1, 33)]
    done = call(open_store(tmp_path / "nine" / "a.zarr"), tmp_path / "nine" / "runs", "feature", "--id", "0")
    assert done.exit_code == 0, done.stderr
    assert ", - at 8; permuted" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_one_label_has_no_share(tmp_path):
    """One document, and one position: no variance lies between labels, and 0 would say that there is none."""
    (one,) = evaluate(make_store(tmp_path, [16]), tmp_path / "runs")
    assert one["temporal"]["groups"]["all"]["measures"]["document_share"]["value"] is None
    (one,) = evaluate(make_store(tmp_path / "b", [2] * 12), tmp_path / "b" / "runs")
    assert one["temporal"]["groups"]["all"]["measures"]["position_share"]["value"] is None


def test_an_empty_train_split_gives_no_figure_around_its_mean(tmp_path):
    store = make_store(tmp_path, [16] * 6, train_length=1)
    store.train.n_tokens = 0
    (one,) = evaluate(store, tmp_path / "runs")
    assert one["metrics"]["explained_variance_legacy"] is None
    assert one["baselines"]["mean_output"]["mse"] is None
    for figure in ("explained_variance", "mse", "l0"):
        assert one["metrics"][figure] is not None
    assert one["temporal"]["groups"]["all"]["measures"]["slowness_to_x"]["value"] is not None
    done = call(store, tmp_path / "runs", "eval", "--baselines", "--force")
    assert done.exit_code == 1
    assert "its train split has no position from 1 on, so there are no principal components" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [("report",), ("feature", "--id", "0")])
def test_nothing_to_look_at_is_one_line(tmp_path, command):
    store = make_store(tmp_path, [16] * 6, train_length=1)
    evaluate(store, tmp_path / "runs")
    done = call(store, tmp_path / "runs", *command, "--split", "train")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"Error: {store.location}: its train split has no position from 1 on"
    )
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
@pytest.mark.parametrize("n_alive", [0, 1])
def test_a_report_of_an_sae_with_next_to_no_latent_alive(tmp_path, n_alive):
    store = make_store(tmp_path, [16] * 6)
    sae = toy.make_sae("relu")
    sae.b_enc.data[n_alive:] = -1e9
    (one,) = evaluate(store, tmp_path / "runs", sae)
    assert one["metrics"]["dead_fraction"] == 1 - n_alive / toy.LATENTS
    done = call(store, tmp_path / "runs", "report")
    assert done.exit_code == 0, done.stderr
    listing = (tmp_path / "report" / "runs" / "run0" / "data" / "index.js").read_text()
    assert f'"latents":{list(range(n_alive))}'.replace(" ", "") in listing
    assert "NaN" not in listing


def test_probes_without_a_class_name_nothing():
    plan = probes.Plan(
        np.arange(4), torch.arange(4).repeat_interleave(60), torch.arange(60).repeat(4), torch.full((4,), 60),
        torch.stack((torch.arange(4).repeat_interleave(60), torch.full((240,), -1), torch.arange(240) % 8)),
    )  # fmt: skip
    plan.targets[1, :60] = 0  # a class that only documents to train on have
    result, draws = probes.probe(plan, torch.randn(240, 5, generator=torch.Generator().manual_seed(0)))
    assert set(result["probe_token"].values()) == {None}
    assert draws["probe_token"].isnan().all()
    assert result["probe_document"]["value"] is not None


# Memory: sums on resamplings, in blocks.


@pytest.mark.parametrize("n_documents", [5, 23, 1000, 5000])
def test_blocks_of_weights_are_the_draws_of_all_documents(monkeypatch, n_documents):
    expected = np.random.default_rng(0).multinomial(n_documents, np.full(n_documents, 1 / n_documents), N_RESAMPLINGS)
    monkeypatch.setattr(intervals, "FOLD", 7)
    drawn = Resamplings(n_documents)
    result = torch.cat([drawn.weights(*block) for block in drawn.blocks()], 1)
    assert (result[0] == 1).all()
    assert (result[1:].numpy() == expected).all()
    values = torch.randn(n_documents, 3, dtype=torch.float64)
    torch.testing.assert_close(drawn.sums(values), result @ values)


def test_strata_of_documents_are_drawn_as_all_would_be(monkeypatch):
    monkeypatch.setattr(intervals, "STRATUM", 8)
    monkeypatch.setattr(intervals, "FOLD", 4)
    drawn = Resamplings(37)
    result = torch.cat([drawn.weights(*block) for block in drawn.blocks()], 1)[1:]
    assert (result.sum(1) == 37).all(), "each resampling has as many documents as the split"
    assert result.mean(0).sub(1).abs().max() < 0.15
    assert result.var(0).sub(36 / 37).abs().max() < 0.25
    assert abs(np.corrcoef(result[:, :8].sum(1), result[:, 8:16].sum(1))[0, 1] + 8 / 29) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("n_open", [1, 3])
def test_few_open_documents_give_the_same_figures(tmp_path, monkeypatch, n_open):
    """Documents of several sequences, across batches and blocks."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"h": toy.WIDTH}, sequence_length=8) as writer:
        for split, first in (("train", 0), ("eval", 100)):
            x = rng.normal(size=(len(documents), 8, toy.WIDTH)).astype("f4")
            lengths = rng.integers(1, 9, len(documents))
            writer.append(split, {"h": x}, lengths=lengths, documents=documents + first)
    store = open_store(tmp_path / "a.zarr")
    monkeypatch.setattr(batches, "BATCH_TOKENS", 24)
    (whole,) = evaluate(store, tmp_path / "whole", temporal=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    monkeypatch.setattr(one_pass, "OPEN_DOCUMENTS", n_open)
    monkeypatch.setattr(intervals, "FOLD", 5)
    (parts,) = evaluate_runs(store, tmp_path / "parts", EvalRequest(temporal=False, force=True))[0]
    for name, value in whole["metrics"].items():
        assert parts["metrics"][name] == (value and pytest.approx(value, rel=1e-12)), name
    for name, result in whole["intervals"].items():
        assert parts["intervals"][name] == (result and pytest.approx(result, rel=1e-10)), name
    assert all(math.isfinite(value) for result in whole["intervals"].values() if result for value in result)
    assert json.loads((tmp_path / "parts" / "run0" / "eval.json").read_text())["n_documents"] == 30


@pytest.mark.slow
def test_open_rows_do_not_grow_with_the_documents():
    sums = one_pass._Accumulator(2, Resamplings(20_000), 16)
    for start in range(0, 20_000, 100):
        sums.begin(torch.arange(start, start + 100))
        sums.open_x[0, -1] += 1.0
        assert sums.open_x.shape[1] <= 2 * one_pass.OPEN_DOCUMENTS + 100
