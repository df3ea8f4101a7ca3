"""Promise: decoders are compared as defined: a permuted copy is the same, random ones are not."""

import json

import numpy as np
import pytest
import torch
import toy_eval
from click.testing import CliRunner

from tcsae.evaluate.dictionary.similarity import null_cosine, pair, redundancy
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder


def test_redundancy_by_hand():
    rows = np.array([[1, 0, 0], [2, 0.1, 0], [-1, 0, 0.0], [0, 3, 0], [0, 0, 0]])
    result = redundancy(rows)
    assert (result["latents"], result["antipodal_pairs"], result["near_duplicates"]) == (4, 2, 1)
    assert result["has_neighbour"] == 0.5
    assert redundancy(np.eye(5))["effective_rank"] == pytest.approx(5)
    assert redundancy(np.eye(5))["nearest_cosine"] == 0
    assert redundancy(np.zeros((3, 4)))["latents"] == 0


def test_redundancy_agrees_with_all_pairs(monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.dictionary.similarity.BLOCK", 7)
    rows = np.random.default_rng(0).normal(size=(40, 3))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = [units[i] @ units[j] for i in range(40) for j in range(i)]
    result = redundancy(rows)
    assert result["near_duplicates"] == sum(one > 0.9 for one in cosines)
    assert result["antipodal_pairs"] == sum(one < -0.9 for one in cosines)


def test_a_permuted_copy_is_the_same_and_its_negative_is_not():
    rng = np.random.default_rng(1)
    rows, order = rng.normal(size=(30, 12)), rng.permutation(30)
    result = pair(rows, 3 * rows[order])
    assert result.figures() == pytest.approx({"mean_cosine": 1, "median_cosine": 1, "share_same": 1})
    assert (order[result.second] == result.first).all()
    assert pair(rows, -rows).figures()["share_same"] < 0.5
    random = pair(rows, rng.normal(size=(30, 12))).cosine.mean()
    assert random == pytest.approx(null_cosine(rows, 30), abs=0.08)


def test_the_command(tmp_path):
    class Store:
        content = "0" * 64

    for name, width, seed in (("a", 8, 0), ("b", 8, 0), ("c", 8, 1), ("wide", 9, 0)):
        sae = SparseAutoencoder(SaeConfig(d_model=width, d_sae=20, activation="topk", k=3))
        sae.W_dec.data = torch.randn(20, width, generator=torch.Generator().manual_seed(seed))
        toy_eval.make_run(tmp_path, name, sae, Store())

    def run(*arguments: str):
        return CliRunner().invoke(cli, ["--runs", str(tmp_path), "stability", *arguments])

    result = json.loads(run("--json").output)
    by_pair = {(one["run"], one["with"]): one for one in result["pairs"]}
    assert set(by_pair) == {("a", "b"), ("a", "c"), ("b", "c")} and set(result["runs"]) == {"a", "b", "c", "wide"}
    assert by_pair["a", "b"]["share_same"] == 1 and by_pair["a", "c"]["mean_cosine"] < 0.9
    assert "Latents shared" in run("--run", "a", "--run", "c", "--pairs", "2").output
    refused = run("--run", "a", "--run", "wide")
    assert refused.exit_code == 1 and "No two of these runs have the same d_model (a 8, wide 9)" in refused.output
