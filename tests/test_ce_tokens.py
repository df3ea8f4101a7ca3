"""Promise: `eval --ce-tokens N` takes cross-entropies of the first documents of N tokens, all else of all documents."""

import json

import numpy as np
import pytest
import torch
import toy_eval as toy
from click.testing import CliRunner

from tcsae.evaluate.batches import n_sequences
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.reader import open_store

N_TOKENS = 100


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.make_place(tmp_path_factory.mktemp("ce_tokens"), n_eval=40)


def evaluation(place, *arguments: str) -> tuple[dict, str]:
    return toy.run_eval(place / "a.zarr", place / "runs", "--no-temporal", *arguments)


@torch.no_grad()
def naive(place, end: int) -> tuple[float, float, float, int]:
    """Of the eval split's first sequences: mean cross-entropy with the SAE, KL divergence, cross-entropy of how often
    each token is predicted, and the number of predictions.
    """
    store, sae = open_store(str(place / "a.zarr")), toy.make_sae()
    split, tail = store.eval, Tail.load(store.tail_path(toy.HOOK))
    ce, kl, targets = [], [], []
    for x, tokens, length in zip(split.read(toy.HOOK, 0, end), split.tokens, split.lengths, strict=False):
        x = torch.from_numpy(np.asarray(x, np.float32))[:length]
        x_hat = x.clone()
        x_hat[1:] = sae(x[1:]) if length > 1 else x_hat[1:]
        clean, spliced = (tail.unembed(tail.hidden(one[None])[0]).log_softmax(-1) for one in (x, x_hat))
        kl += (clean.exp() * (clean - spliced)).sum(-1)[1:].tolist()
        targets += tokens[2:length].tolist()
        ce += [-float(spliced[i, tokens[i + 1]]) for i in range(1, length - 1)]
    _, kind, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return float(np.mean(ce)), float(np.mean(kl)), float(-np.log(counts[kind] / len(ce)).mean()), len(ce)


def test_cross_entropies_are_of_the_first_documents_and_all_else_is_of_all(place):
    whole, _ = evaluation(place)
    part, said = evaluation(place, "--ce-tokens", str(N_TOKENS))
    end = n_sequences(open_store(str(place / "a.zarr")).eval, N_TOKENS)
    ce, kl, unigrams, n_predictions = naive(place, end)
    assert 0 < n_predictions < whole["n_predictions"]
    assert part["n_predictions"] == n_predictions
    assert part["metrics"]["ce_loss_with_sae"] == pytest.approx(ce, rel=1e-5)
    assert part["metrics"]["ce_loss_with_unigrams"] == pytest.approx(unigrams, rel=1e-9)
    assert part["metrics"]["kl_div_with_sae"] == pytest.approx(kl, rel=1e-4)
    for name, value in whole["metrics"].items():
        if name.startswith(("ce_", "kl_")):
            same = value is None or name == "ce_loss_with_ablation"  # the toy's is log(61)
            assert same or part["metrics"][name] != value, name
        else:
            assert (part["metrics"][name], part["intervals"].get(name)) == (value, whole["intervals"].get(name)), name
    assert f"Cross-entropies: of the first {n_predictions:,} predictions." in said
    saebench = json.loads((place / "runs" / "run" / "saebench_core.json").read_text())
    read = saebench["eval_result_metrics"]["token_stats"]["total_tokens_eval_reconstruction"]
    assert read == part["n_ce_tokens"] == int(open_store(str(place / "a.zarr")).eval.lengths[:end].sum())
    assert whole["n_ce_tokens"] == whole["n_tokens"] + whole["n_tokens_skipped"]
    assert "ce_tokens" not in whole["options"] and part["options"]["ce_tokens"] == N_TOKENS


def test_nothing_behind_them_goes_through_the_tail(place, tmp_path, monkeypatch):
    store = open_store(str(place / "a.zarr"))
    toy.make_run(tmp_path, "run", toy.make_sae(), store)
    read, hidden = [], Tail.hidden
    monkeypatch.setattr(Tail, "hidden", lambda tail, x: (read.append(len(x)), hidden(tail, x))[1])
    evaluate_runs(store, tmp_path, EvalRequest(temporal=False, ce_tokens=N_TOKENS))
    end = n_sequences(store.eval, N_TOKENS)
    assert sum(read) == 5 * int((store.eval.lengths[:end] > 1).sum())  # x, xhat and three ablations


def test_intervals_of_other_figures_stay_where_cross_entropies_have_too_few_documents(place):
    whole, _ = evaluation(place)
    part, _ = evaluation(place, "--ce-tokens", "1")
    assert part["intervals"]["mse"] == whole["intervals"]["mse"] is not None
    assert part["intervals"]["ce_loss_with_sae"] is None and part["metrics"]["ce_loss_with_sae"] is not None


def test_more_than_there_are_is_all(place):
    whole, _ = evaluation(place)
    more, _ = evaluation(place, "--ce-tokens", "1000000")
    assert more["metrics"] == whole["metrics"]


def test_another_number_is_another_evaluation(place):
    evaluation(place, "--ce-tokens", str(N_TOKENS))
    _, said = evaluation(place, "--ce-tokens", str(N_TOKENS))
    assert "Evaluated already: run." in said
    _, said = evaluation(place, "--ce-tokens", str(2 * N_TOKENS))
    assert "Evaluated already" not in said


def test_none_is_refused(place):
    arguments = ["--store", str(place / "a.zarr"), "--runs", str(place / "runs"), "eval", "--ce-tokens", "0"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2 and "0 is not in the range x>=1" in done.stderr
