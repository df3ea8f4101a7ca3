"""Promise: `tcsae eval` does what its options say, scores everybody alike, and takes damage for what it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_eval as toy
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tcsae.evaluate.batches import batches
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.evaluation_files import REPLICATES
from tcsae.evaluate.intervals import N_RESAMPLINGS, holm, jackknife, jackknife_draws, over_seeds, p_value, resamplings
from tcsae.evaluate.measures.cross_entropy import sequence_losses
from tcsae.evaluate.measures.saebench import FILE, max_cosines
from tcsae.evaluate.printed_tables import _figure, check_comparable, differences, seed_differences
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.errors import RunError
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.reader import Split, Store

make_run, make_sae = toy.make_run, toy.make_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy.write_store(tmp_path_factory.mktemp("store") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


def call(store: Store, runs: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), "eval", *arguments])


def evaluation(runs: Path, name: str) -> dict:
    return json.loads((runs / name / "eval.json").read_text())


@pytest.mark.slow
def test_the_tables_say_what_is_needed_to_read_them(store, tmp_path):
    make_run(tmp_path, "one", make_sae(), store)
    make_run(tmp_path, "two", make_sae(groups=(0.25, 0.75)), store)
    done = call(store, tmp_path, "--baselines")
    assert done.exit_code == 0, done.output
    for text in ("random topk", "untrained", "pca", "mean output", "95%", "through the tail", "x itself", "--details"):
        assert text in done.stdout, text
    assert "null is" not in done.stdout
    assert any(set(word) <= set("▁▂▃▄▅▆▇█") for word in done.stdout.split()), "curves over lags"
    done = call(store, tmp_path, "--details")
    assert "null is" in done.stdout
    assert "first_group: rho_1" in done.stdout
    assert "frequency_matched: rho_1" in done.stdout
    assert done.stdout.count("x itself: pairs within a sequence") == 1, "x is the same for all"
    lags = [line for line in done.stdout.splitlines() if line.startswith("│ rho_within ")]
    assert len(lags) == 3, "x and two runs"
    curve = evaluation(tmp_path, "one")["temporal"]["groups"]["all"]["curves"]["rho_1_within"]
    assert [cell.strip() for cell in lags[1].split("│")[2:4]] == [f"{curve[lag]:.4g}" for lag in (0, 1)]
    assert max(len(line.rstrip()) for line in done.stdout.splitlines() if "│" in line) <= 122
    figures = evaluation(tmp_path, "one")["baselines"]
    assert figures["pca"]["explained_variance"] > figures["mean_output"]["explained_variance"]
    assert figures["random_topk"]["l0"] <= 5
    assert figures["untrained"]["l0"] > 10


@pytest.mark.parametrize("cosine, shown", [(0.01, None), (-0.01, None), (None, None), (0.9, 86.0), (-0.9, 86.0)])
def test_a_ratio_of_next_to_nothing_is_a_dash(cosine, shown):
    figures = {"cossim": cosine, "relative_reconstruction_bias": 86.0}
    assert _figure(figures, "relative_reconstruction_bias") == shown
    assert _figure(figures, "cossim") == cosine


def test_intervals_hold_the_figure_and_grow_as_documents_get_fewer(store, tmp_path):
    make_run(tmp_path, "one", make_sae(), store)
    result = evaluate_runs(store, tmp_path)[0][0]
    for name, value in result["metrics"].items():
        if name not in ("dead_fraction", "ce_loss_score_mean", "ce_loss_score_unigrams"):  # the toy's gaps are small
            low, high = result["intervals"][name]
            assert low <= value <= high, name
            assert low < high or name in ("l0", "l0_nonzero", "ce_loss_with_ablation"), name
    draws = safetensors.torch.load_file(tmp_path / "one" / REPLICATES)
    assert len(draws["ce_loss_score"]) == N_RESAMPLINGS + 1
    assert float(draws["mse"][0]) == result["metrics"]["mse"]
    spread = [float(resamplings(n)[1:].matmul(torch.arange(n).double()).std() / n) / n for n in (5, 500)]
    assert spread[0] > 5 * spread[1]


@pytest.mark.slow
def test_two_saes_are_compared_on_the_same_documents(store, tmp_path):
    make_run(tmp_path, "a", make_sae(), store)
    make_run(tmp_path, "b", make_sae(), store)
    make_run(tmp_path, "other", make_sae(seed=4), store)
    done = call(store, tmp_path, "--compare", "a", "--with", "other")
    assert done.exit_code == 0, done.output
    assert "a minus other, paired over 10 documents" in done.stdout
    evaluations = {one["name"]: one for one in evaluate_runs(store, tmp_path)[0]}
    same = differences(tmp_path, evaluations["a"], evaluations["b"])
    assert {tuple(one["interval"]) for one in same.values() if one["interval"]} == {(0.0, 0.0)}, "paired: no noise left"
    result = differences(tmp_path, evaluations["a"], evaluations["other"])["mse"]
    assert result["difference"] == pytest.approx(result["a"] - result["b"])
    assert result["interval"][0] < result["difference"] < result["interval"][1]
    slow = differences(tmp_path, evaluations["a"], evaluations["other"])["rho_1"]
    assert slow["difference"] == pytest.approx(slow["a"] - slow["b"])
    evaluations["b"]["options"]["skip_first"] = 3
    with pytest.raises(RunError, match="a and b differ in options .* cannot be paired"):
        differences(tmp_path, evaluations["a"], evaluations["b"])
    assert call(store, tmp_path, "--compare", "a").exit_code == 2


PLAIN = {"hook": "h", "skip_first": 1, "splice": "counted", "split": "eval"}


@pytest.mark.parametrize(
    "more",
    [
        {"documents": "report"},
        {"ce_tokens": 100},
        {"probe_latents": 4096},
        {"positions": ["user"]},
        {"exclude_tokens": ["special"]},
        {"max_norm": 10.0},
        {"splice": "all"},
    ],
    ids=str,
)
def test_evaluations_of_other_documents_or_positions_are_not_paired(more):
    one = {"name": "a", "store": {"content": "c"}, "options": PLAIN}
    with pytest.raises(
        RunError, match=r"a and b differ in options .* cannot be paired. Give both the same --documents"
    ):
        check_comparable(one, one | {"name": "b", "options": PLAIN | more})
    check_comparable(one, one | {"options": PLAIN | {"smooth": "ema=0.3", "temporal": False, "precision": "tf32"}})


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_is_the_step_down_adjustment(p_values):
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    expected = np.empty(len(p_values))
    expected[order] = stepped
    assert holm(p_values) == pytest.approx(expected.tolist())


def test_a_p_value_counts_the_draws_beyond_zero():
    draws = torch.linspace(-1, 3, 1000, dtype=torch.float64)  # a quarter below 0
    assert p_value(torch.cat([torch.ones(1, dtype=torch.float64), draws])) == pytest.approx(0.5, abs=0.01)
    assert p_value(torch.cat([torch.ones(1, dtype=torch.float64), draws + 2])) == pytest.approx(2 / 1001)
    assert p_value(torch.tensor([1.0], dtype=torch.float64)) is None


@pytest.mark.slow
def test_seeds_are_compared_over_seeds_and_documents(store, tmp_path):
    for name, seed in (("a0", 0), ("a1", 1), ("b0", 2), ("b1", 3)):
        make_run(tmp_path, name, make_sae(seed=seed), store)
    pairs = ["--compare=a0", "--compare=a1", "--with=b0", "--with=b1"]
    printed = json.loads(call(store, tmp_path, *pairs, "--json").stdout)
    assert (printed["run"], printed["with"]) == (["a0", "a1"], ["b0", "b1"])
    runs = {one["name"]: one for one in evaluate_runs(store, tmp_path)[0]}
    alone = [differences(tmp_path, runs[f"a{i}"], runs[f"b{i}"]) for i in (0, 1)]
    for name in ("mse", "rho_1_within"):
        result = printed["differences"][name]
        assert result["difference"] == pytest.approx(sum(one[name]["difference"] for one in alone) / 2)
        assert result["interval"][0] < result["difference"] < result["interval"][1]
    same = seed_differences(tmp_path, [runs["a0"], runs["a1"]], [runs["a0"], runs["a1"]])
    assert {tuple(one["interval"]) for one in same.values() if one["interval"]} == {(0.0, 0.0)}
    assert "and 2 seeds" in call(store, tmp_path, *pairs).stdout
    assert call(store, tmp_path, *pairs[:3]).exit_code == 2


def test_draws_spread_as_seeds_and_documents_do():
    """Variances add: of the documents' draws, and of the seeds' mean with n - 1 in its denominator."""
    rng = np.random.default_rng(0)
    seeds, documents = np.array([0.0, 1.0, 2.0]), rng.normal(size=N_RESAMPLINGS + 1)
    draws = over_seeds(torch.from_numpy(seeds[:, None] + documents))
    assert float(draws[0]) == pytest.approx(1 + documents[0])
    assert float(draws[1:].var()) == pytest.approx(seeds.var(ddof=1) / 3 + documents.var(), rel=0.1)
    left = list(rng.normal(size=8))
    low, high = jackknife(0.5, left)
    made = jackknife_draws(0.5, left)
    assert float(made[0]) == 0.5
    assert float(made[1:].std()) * 1.96 == pytest.approx((high - low) / 2, rel=0.1)


@pytest.mark.slow
def test_probes_are_compared_on_the_same_documents(tmp_path_factory, tmp_path, monkeypatch):
    """The toy's sequences are too short for the usual gap, and its documents too few to test every other one on."""
    store = toy.write_store(tmp_path_factory.mktemp("more") / "a.zarr", toy.make_model(), {"train": 30, "eval": 60})
    monkeypatch.setattr("tcsae.evaluate.measures.probes.GAP", 2)
    monkeypatch.setattr("tcsae.evaluate.measures.probes.MIN_TOKENS", 6)
    for name, seed in (("a", 0), ("b", 0), ("other", 4)):
        make_run(tmp_path, name, make_sae(seed=seed), store)
    one, same, other = evaluate_runs(store, tmp_path)[0]
    for name in ("probe_document", "probe_token", "probe_position"):
        result = differences(tmp_path, one, other)[name]
        assert result["a"] == one["temporal"]["groups"]["all"]["measures"][name]["value"]
        assert result["difference"] == pytest.approx(result["a"] - result["b"])
        assert result["interval"][0] <= result["difference"] <= result["interval"][1]
        assert differences(tmp_path, one, same)[name]["interval"] == [0.0, 0.0]


@pytest.mark.slow
def test_the_losses_that_no_sae_changes_are_worked_out_once(store, tmp_path, monkeypatch):
    calls: list[int] = []
    hidden = Tail.hidden

    def counting(self: Tail, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return hidden(self, x)

    monkeypatch.setattr(Tail, "hidden", counting)
    n_batches = sum(1 for _ in batches(store.eval, toy.HOOK, toy.FROM_1))
    make_run(tmp_path, "one", make_sae(), store)
    first = evaluate_runs(store, tmp_path, EvalRequest(temporal=False))[0][0]
    assert len(calls) == n_batches * 5, "x, the SAE, and three ablations"
    calls.clear()
    again = evaluate_runs(store, tmp_path, EvalRequest(force=True, temporal=False))[0][0]
    assert len(calls) == n_batches * 2, "x and the SAE"
    assert again["metrics"].keys() == first["metrics"].keys()
    for name, value in first["metrics"].items():
        assert again["metrics"][name] == (value and pytest.approx(value, rel=1e-12)), name
    assert again["baselines"] == first["baselines"]
    for options in ({"skip_first": 2}, {"splice": "all"}):
        calls.clear()
        evaluate_runs(store, tmp_path, EvalRequest(temporal=False, **options))
        assert len(calls) == n_batches * 5, options
    for path in (tmp_path / ".reference").iterdir():
        path.write_bytes(b"damaged")
    assert evaluate_runs(store, tmp_path, EvalRequest(force=True))[0][0]["metrics"] == pytest.approx(first["metrics"])


@pytest.mark.parametrize("splice", ["counted", "all"])
def test_splicing_replaces_what_it_says(store, tmp_path, splice):
    """At skip_first = LENGTH - 2 nearly nothing is counted: only "all" still replaces the rest."""
    make_run(tmp_path, "one", make_sae(), store)
    request = EvalRequest(splice=splice, skip_first=toy.LENGTH - 2, temporal=False)
    result = evaluate_runs(store, tmp_path, request)[0][0]
    near = abs(result["metrics"]["ce_loss_with_sae"] - result["metrics"]["ce_loss_without_sae"])
    zero = result["baselines"]["zero_output"]["kl_div_with_sae"]
    ablated = result["metrics"]["kl_div_with_ablation"]
    assert (zero == pytest.approx(ablated, rel=1e-6)) == (splice == "all")
    assert result["splice"].startswith("xhat stands at the counted" if splice == "counted" else "xhat stands at all")
    assert near >= 0


@pytest.mark.parametrize("factor", [1.0, 300.0])
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_losses_are_those_of_the_logits(store, monkeypatch, factor, block):
    """A few rows at a time, and with logits so large that an exponential of them is no number."""
    monkeypatch.setattr("tcsae.evaluate.measures.cross_entropy.BLOCK_LOGITS", block)
    tail = Tail.load(store.tail_path(toy.HOOK))
    tail._unembedding.weight.mul_(factor)
    (batch, *_) = batches(store.eval, toy.HOOK, toy.FROM_1)
    others = [batch.x * 0.7, batch.x.flip(0)]
    result = sequence_losses(tail, batch.x, others, batch.tokens, batch.counted, batch.has_next)
    p = tail.logits(batch.x).double().log_softmax(-1)
    targets = batch.tokens.roll(-1, 1).long()[..., None]
    for one, x in zip(result, (batch.x, *others), strict=True):
        q = tail.logits(x).double().log_softmax(-1)
        ce = torch.where(batch.counted & batch.has_next, -q.gather(2, targets).squeeze(2), 0).sum(1)
        kl = torch.where(batch.counted, (p.exp() * (p - q)).sum(2), 0).sum(1)
        torch.testing.assert_close(one.ce, ce, rtol=1e-5, atol=1e-5 * factor)
        torch.testing.assert_close(one.kl, kl, rtol=1e-5, atol=1e-5 * factor)


@pytest.mark.slow
def test_foreign_saes_stand_in_the_same_table(store, tmp_path):
    ours = make_run(tmp_path, "ours", make_sae("relu"), store)
    shutil.copytree(ours, tmp_path / "theirs")
    (tmp_path / "theirs" / "tcsae.json").unlink()
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = toy.HOOK
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config))
    done = call(store, tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("│ theirs ") >= 2
    mine, theirs = evaluation(tmp_path, "ours"), evaluation(tmp_path, "theirs")
    assert theirs["metrics"] == mine["metrics"]
    assert theirs["preset"] == "SAELens standard"
    assert "Evaluated already: ours, theirs" in call(store, tmp_path).stderr
    config["d_in"] = 99
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config))
    done = call(store, tmp_path)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: theirs: its SAE reads d_model 99")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_a_dead_sae_has_figures_and_says_so(store, tmp_path, activation):
    sae = make_sae(activation)
    sae.b_enc.data.fill_(-1e9)
    make_run(tmp_path, "dead", sae, store)
    done = call(store, tmp_path)
    assert done.exit_code == 0, done.output
    result = evaluation(tmp_path, "dead")
    assert (result["metrics"]["dead_fraction"], result["metrics"]["l0"]) == (1.0, 0.0)
    assert result["metrics"]["explained_variance"] is not None
    measures = result["temporal"]["groups"]["all"]["measures"]
    assert {measures[name]["value"] for name in ("jaccard_adjacent", "rho_1", "dwell", "token_share")} == {None}
    core = json.loads((tmp_path / "dead" / FILE).read_text())
    assert core["eval_result_metrics"]["misc_metrics"]["frac_alive"] == 0
    assert core["eval_result_details"][0]["consistent_activation_heuristic"] == -1, "SAEBench's form of NaN"


@pytest.mark.slow
def test_more_than_is_asked_for_will_do(store, tmp_path, monkeypatch):
    reads = []
    read = Split.read
    monkeypatch.setattr(Split, "read", lambda *arguments: reads.append(1) or read(*arguments))
    make_run(tmp_path, "one", make_sae(), store)

    def redone(**options: object) -> bool:
        reads.clear()
        evaluate_runs(store, tmp_path, EvalRequest(**options))
        return bool(reads)

    assert redone(temporal=False)
    assert not redone(temporal=False)
    assert redone(), "temporal measures were not there"
    assert not redone(temporal=False)
    assert redone(splice="all")
    assert redone(skip_first=0, splice="all")
    assert redone(skip_first=0, splice="all", baselines=True)
    assert not redone(skip_first=0, splice="all")


def test_the_largest_cosine_with_another(monkeypatch):
    rows = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    for block in (5, 37, 1000):
        monkeypatch.setattr("tcsae.evaluate.measures.saebench.BLOCK", block)
        np.testing.assert_allclose(max_cosines(rows).numpy(), cosines.max(1), rtol=1e-5)
