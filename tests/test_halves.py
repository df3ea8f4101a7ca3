"""Promise: `eval --documents choose` and `report` count two halves of the documents, which share none and miss none."""

import numpy as np
import pytest
import toy_eval as toy
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tcsae.evaluate.halves import half, in_choose
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.reader import open_store


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40))
def test_a_document_is_of_one_half_wherever_it_stands(documents):
    alone = [bool(in_choose(np.array([one]))[0]) for one in documents]
    assert in_choose(np.array(documents)).tolist() == alone


def test_about_half_are_of_each():
    assert 450 < in_choose(np.arange(1000)).sum() < 550


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("halves")
    store = toy.write_store(path / "a.zarr", toy.make_model(), {"train": 30, "eval": 40})
    toy.make_run(path / "runs", "run", toy.make_sae(), store)
    return path


def evaluation(place, *arguments: str) -> dict:
    return toy.run_eval(place / "a.zarr", place / "runs", *arguments)[0]


@pytest.mark.slow
def test_the_halves_add_up_to_the_whole(place):
    whole = evaluation(place)
    halves = [evaluation(place, "--documents", one) for one in ("choose", "report")]
    assert "documents" not in whole["options"]
    assert [one["options"]["documents"] for one in halves] == ["choose", "report"]
    for name in ("n_tokens", "n_tokens_skipped", "n_documents", "n_predictions"):
        assert sum(one[name] for one in halves) == whole[name]
        assert min(one[name] for one in halves) > 0
    weights = {"mse": "n_tokens", "l0": "n_tokens", "kl_div_with_sae": "n_tokens"}
    weights |= {f"ce_loss_{what}": "n_predictions" for what in ("without_sae", "with_sae", "with_ablation")}
    for name, weight in weights.items():
        total = sum(one["metrics"][name] * one[weight] for one in halves)
        assert total == pytest.approx(whole["metrics"][name] * whole[weight], rel=1e-6)


@pytest.mark.slow
def test_every_measure_of_the_whole_is_one_of_each_half(place):
    """Documents of the other half have no counted token, and were means over nothing."""
    whole, *halves = (
        evaluation(place, *given) for given in ((), *(("--documents", one) for one in ("choose", "report")))
    )

    def measured(one: dict) -> set[str]:
        """Those that need no number of documents or firings which a half of these has not."""
        rows = one["temporal"]["groups"]["all"]["measures"].items()
        return {name for name, row in rows if row["value"] is not None and not name.startswith("probe")} - {
            name for name, _ in rows if name.endswith(("_median", "_mean"))
        }

    assert {"rho_1_within", "rho_8_within", "document_share"} <= measured(whole)
    assert all(measured(one) == measured(whole) for one in halves)


def test_only_sequences_with_a_counted_position_go_through_the_tail(place, tmp_path, monkeypatch):
    store = open_store(str(place / "a.zarr"))
    split = half(store.eval, "report")
    toy.make_run(tmp_path / "runs", "run", toy.make_sae(), store)
    read, hidden = [], Tail.hidden
    monkeypatch.setattr(Tail, "hidden", lambda tail, x: (read.append(len(x)), hidden(tail, x))[1])
    toy.run_eval(place / "a.zarr", tmp_path / "runs", "--no-temporal", "--documents=report", "--skip-first=1")
    n = int((split.lengths > 1).sum())
    assert 0 < n < int((store.eval.lengths > 1).sum())
    assert sum(read) == 5 * n  # x, xhat and three ablations


def test_a_half_without_a_document_is_refused(tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), {"train": 6, "eval": 2})
    split = open_store(store.location).eval
    empty = "report" if in_choose(split.documents).all() else "choose"
    assert split.n_documents == 1
    toy.make_run(tmp_path / "runs", "run", toy.make_sae(), store)
    arguments = ["--store", store.location, "--runs", str(tmp_path / "runs"), "eval", "--documents", empty]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1
    assert f"none of its 1 eval documents is of the half --documents {empty}" in done.stderr
    assert half(split, "all") is split
