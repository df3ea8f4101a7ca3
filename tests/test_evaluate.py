"""Promise: `eval` gives the figures that a plain recomputation gives, once per SAE, without the language model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_eval as toy
from click.testing import CliRunner
from transformers import GPTNeoXForCausalLM

from tcsae.evaluate import batches, systems
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.measures import core as metrics
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.base.errors import RunError, StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.reader import Split, Store, open_store

HOOK, LAYER, LATENTS, LENGTH, N_SEQUENCES, WIDTH = (
    toy.HOOK,
    toy.LAYER,
    toy.LATENTS,
    toy.LENGTH,
    toy.N_SEQUENCES,
    toy.WIDTH,
)
make_run, make_sae, write_store = toy.make_run, toy.make_sae, toy.write_store


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    return toy.make_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("store") / "a.zarr", model, N_SEQUENCES)


def naive(
    store: Store, sae: SparseAutoencoder, model: GPTNeoXForCausalLM, skip_first: int, splice_all: bool = False
) -> dict[str, float]:
    """Dense codes, one sequence at a time without padding, and the whole language model with its residual replaced."""
    split, mean = store.eval, store.array(f"statistics/{HOOK}/mean")[:]
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []
    losses: dict[str, list[float]] = {name: [] for name in ("clean", "sae", "zero", "mean")}
    kls: dict[str, list[float]] = {name: [] for name in losses}
    for i, length in enumerate(split.lengths):
        x = split.read(HOOK, i, i + 1)[0, :length].astype(np.float32)
        with torch.no_grad():
            f = sae.encode(torch.from_numpy(x))
            x_hat = sae.decode(f, torch.from_numpy(x)).numpy()
        seen += [(x[p], x_hat[p], f[p].numpy(), p >= skip_first) for p in range(length)]
        keep = (np.arange(length)[:, None] < skip_first) & (not splice_all)
        mean_32 = mean.astype(np.float32)
        spliced = {"clean": x, "sae": np.where(keep, x, x_hat), "zero": 0 * x, "mean": np.where(keep, x, mean_32)}
        clean = full_model_log_p(model, split.tokens[i, :length], x)
        for name, values in spliced.items():
            log_p = full_model_log_p(model, split.tokens[i, :length], values)
            next_tokens = split.tokens[i, 1:length]
            losses[name] += [-log_p[p, token] for p, token in enumerate(next_tokens)][skip_first:]
            kls[name] += list((np.exp(clean) * (clean - log_p)).sum(1)[skip_first:])
    x, x_hat, f, counted = (np.array(one, np.float64) for one in zip(*seen, strict=True))
    counted = counted.astype(bool)
    ev = {
        name: 1 - ((x[rows] - x_hat[rows]) ** 2).sum() / ((x[rows] - x[rows].mean(0)) ** 2).sum()
        for name, rows in (("explained_variance", counted), ("explained_variance_all_positions", counted | True))
    }
    ce = {name: float(np.mean(values)) for name, values in losses.items()}
    targets = np.concatenate([split.tokens[i, skip_first + 1 : n] for i, n in enumerate(split.lengths)])
    shares = np.bincount(targets) / len(targets)
    unigrams = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()

    def recovered(ablated: float) -> float | None:
        gap = ablated - ce["clean"]
        return (ablated - ce["sae"]) / gap if gap > 0.01 else None

    kl = {name: float(np.mean(values)) for name, values in kls.items()}
    return (
        ev
        | naive_token_figures(x[counted], x_hat[counted], f[counted], mean)
        | {
            "ce_loss_without_sae": ce["clean"],
            "ce_loss_with_sae": ce["sae"],
            "ce_loss_with_ablation": ce["zero"],
            "ce_loss_with_mean": ce["mean"],
            "ce_loss_with_unigrams": unigrams,
            "ce_loss_increase": ce["sae"] - ce["clean"],
            "ce_perplexity_ratio": np.exp(ce["sae"] - ce["clean"]),
            "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
            "ce_loss_score_mean": recovered(ce["mean"]),
            "ce_loss_score_unigrams": recovered(unigrams),
            "kl_div_with_sae": kl["sae"],
            "kl_div_with_ablation": kl["zero"],
            "kl_div_score": (kl["zero"] - kl["sae"]) / kl["zero"],
        }
    )


def naive_token_figures(x: np.ndarray, x_hat: np.ndarray, f: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    mse, second = ((x - x_hat) ** 2).sum(1).mean(), (x**2).sum(1).mean()
    return {
        "explained_variance_legacy": (1 - ((x - x_hat) ** 2).sum(1) / ((x - mean) ** 2).sum(1)).mean(),
        "explained_variance_saebench": 1 - mse / (second - (x**2).mean() ** 2),
        "mse": mse,
        "mse_saebench": mse / len(x),
        "cossim": ((x * x_hat).sum(1) / (norms[0] * norms[1])).mean(),
        "l2_norm_in": norms[0].mean(),
        "l2_norm_out": norms[1].mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "relative_reconstruction_bias": (x_hat**2).sum() / (x * x_hat).sum(),
        "l0": (f > 0).sum(1).mean(),
        "l0_nonzero": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "l1_signed": f.sum(1).mean(),
        "dead_fraction": (~(f > 0).any(0)).mean(),
    }


@torch.no_grad()
def full_model_log_p(model: GPTNeoXForCausalLM, tokens: np.ndarray, residual: np.ndarray) -> np.ndarray:
    replacement = torch.from_numpy(residual)[None]
    layer = model.gpt_neox.layers[LAYER]
    handle = layer.register_forward_hook(
        lambda _module, _inputs, out: replacement if torch.is_tensor(out) else (replacement, *out[1:])
    )
    logits = model(torch.from_numpy(tokens).long()[None]).logits[0].double()
    handle.remove()
    return logits.log_softmax(-1).numpy()


def assert_same(
    found: dict[str, float | None], expected: dict[str, float | None], rel: float = 1e-4, least: float = 1e-12
) -> None:
    defined = {name: value for name, value in expected.items() if value is not None}
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(
        defined, rel=rel, abs=least
    )
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("skip_first", [0, 1, 3])
@pytest.mark.parametrize("activation", ["topk", "relu", "gelu", "jumprelu"])
def test_figures_equal_a_plain_recomputation(store, model, tmp_path, activation, skip_first):
    sae = make_sae(activation)
    path = make_run(tmp_path, "one", sae, store, train={"data": {"skip_first": skip_first}})
    evaluations, refused = evaluate_runs(store, tmp_path)
    assert not refused
    assert evaluations == [json.loads((path / "eval.json").read_text())]
    result = evaluations[0]
    assert_same(result["metrics"], naive(store, sae, model, skip_first))
    assert result["n_tokens"] == np.maximum(store.eval.lengths - skip_first, 0).sum()
    assert result["n_predictions"] == np.maximum(store.eval.lengths - 1 - skip_first, 0).sum()
    assert set(result["metrics"]) | set(result["baselines"]) == set(result["definitions"])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "gelu"])
def test_a_layer_norm_is_undone_by_the_statistics_of_x(store, model, tmp_path, activation):
    sae = make_sae(activation, layer_norm="in_out")
    make_run(tmp_path, "one", sae, store)
    assert_same(evaluate_runs(store, tmp_path)[0][0]["metrics"], naive(store, sae, model, 1))


@pytest.mark.slow
def test_baselines_are_scored_as_saes_that_output_them(store, model, tmp_path):
    mean = torch.from_numpy(store.array(f"statistics/{HOOK}/mean")[:]).float()
    constant = {"zero_output": torch.zeros(WIDTH), "mean_output": mean}
    make_run(tmp_path, "one", make_sae(), store)
    baselines = evaluate_runs(store, tmp_path)[0][0]["baselines"]
    for name, value in constant.items():
        sae = make_sae("relu")
        sae.b_enc.data[:] = -1e6
        sae.b_dec.data = value
        with np.errstate(invalid="ignore"):
            expected = naive(store, sae, model, 1)
        result = baselines[name]
        undefined = {"dead_fraction", "l0", "l0_nonzero", "l1", "l1_signed"}
        assert {result[key] for key in undefined} == {None}, "a constant has no latents"
        if name == "zero_output":  # 0 / 0 in the plain recomputation
            assert (result["cossim"], result["relative_reconstruction_bias"]) == (0.0, None)
            undefined |= {"cossim", "relative_reconstruction_bias"}
        kept = expected.keys() - undefined
        assert_same({key: result[key] for key in kept}, {key: expected[key] for key in kept})


@pytest.mark.slow
def test_batches_change_nothing(store, tmp_path, monkeypatch):
    for activation in ("topk", "relu", "gelu"):
        make_run(tmp_path, activation, make_sae(activation), store)
    before = evaluate_runs(store, tmp_path)[0]
    monkeypatch.setattr(batches, "BATCH_TOKENS", 3 * LENGTH)
    monkeypatch.setattr(systems, "BATCH_CODE_ENTRIES", 7 * LATENTS)
    after = evaluate_runs(store, tmp_path, EvalRequest(force=True))[0]
    for one, other in zip(before, after, strict=True):
        assert_same(one["metrics"], other["metrics"], rel=1e-6, least=1e-6)  # scores: differences of cross-entropies


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """The ranges of sequences read so far."""
    seen: list[tuple[int, int]] = []
    read = Split.read

    def counting(self: Split, hook: str, start: int, stop: int) -> np.ndarray:
        seen.append((start, stop))
        return read(self, hook, start, stop)

    monkeypatch.setattr(Split, "read", counting)
    return seen


@pytest.mark.slow
def test_many_saes_read_the_split_once(store, tmp_path, reads):
    for seed in range(4):
        make_run(tmp_path, f"run{seed}", make_sae(seed=seed), store)
    together, _ = evaluate_runs(store, tmp_path)
    assert reads == [(0, 8), (8, 16), (16, 20)]
    alone, _ = evaluate_runs(store, tmp_path, EvalRequest(names=["run2"], force=True))
    assert alone[0]["metrics"] == together[2]["metrics"]


@pytest.mark.slow
def test_what_is_evaluated_is_kept_until_something_differs(store, model, tmp_path, reads, monkeypatch):
    def redone(**options: bool) -> bool:
        reads.clear()
        evaluations, _ = evaluate_runs(store, tmp_path, EvalRequest(**options))
        assert evaluations[0] == json.loads((path / "eval.json").read_text())
        return bool(reads)

    path = make_run(tmp_path, "one", make_sae(), store)
    assert redone()
    assert not redone()
    assert redone(force=True)
    names = ("sae_weights.safetensors", "tcsae.json", "eval.json")
    weights, record, evaluation = ((path / name).read_bytes() for name in names)

    make_run(tmp_path, "one", make_sae(seed=5), store)
    (path / "eval.json").write_bytes(evaluation)
    assert redone(), "other weights"
    (path / "sae_weights.safetensors").write_bytes(weights)
    (path / "tcsae.json").write_bytes(record)
    assert redone(), "the first weights again"

    for damage in (b"", b"[]", evaluation.replace(b'"skip_first": 1', b'"skip_first": 2')):
        (path / "eval.json").write_bytes(damage)
        assert redone(), damage[:20]
    monkeypatch.setattr(metrics, "DEFINITION_VERSION", metrics.DEFINITION_VERSION + 1)
    assert redone(), "other definitions"
    assert not redone()

    other = write_store(tmp_path.parent / f"{tmp_path.name}.zarr", model, {"train": 9, "eval": 9})
    reads.clear()
    assert evaluate_runs(other, tmp_path)[0][0]["store"]["content"] == other.content != store.content
    assert reads, "another store"


def test_a_renamed_run_goes_by_its_new_name(store, tmp_path, reads):
    make_run(tmp_path, "old", make_sae(), store)
    evaluate_runs(store, tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    reads.clear()
    assert [one["name"] for one in evaluate_runs(store, tmp_path)[0]] == ["new"]
    assert not reads


def spoil(path: Path, name: str, value: float) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(path / "sae_weights.safetensors")
    tensors[name].view(-1)[1] = value
    safetensors.torch.save_file(tensors, path / "sae_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, message",
    [
        ("width", f"its SAE reads d_model 24, but {HOOK} in {{store}} has d_model 16"),
        ("steps", "0 optimiser steps"),
        ("nan", "1 values of W_dec in sae_weights.safetensors are NaN or infinite"),
        ("infinite", "1 values of W_enc in sae_weights.safetensors are NaN or infinite"),
        ("hook", "Unknown hook 'blocks.2.hook_resid_post'. Did you mean 'blocks.1.hook_resid_post'?"),
        ("record", "tcsae.json lacks 'hook'"),
        ("weights", "does not hold this SAE's weights"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_the_rest_is_scored(store, tmp_path, kind, message):
    changes = {"steps": {"steps": 0}, "hook": {"hook": "blocks.2.hook_resid_post"}}.get(kind, {})
    bad = make_run(tmp_path, "bad", make_sae(d_model=24 if kind == "width" else WIDTH), store, **changes)
    if kind in ("nan", "infinite"):
        spoil(bad, *{"nan": ("W_dec", np.nan), "infinite": ("W_enc", np.inf)}[kind])
    if kind == "record":
        record = json.loads((bad / "tcsae.json").read_text())
        del record["hook"], record["files"]["tcsae.json"]
        (bad / "tcsae.json").write_text(json.dumps(record))
    if kind == "weights":
        (bad / "sae_weights.safetensors").unlink()
    make_run(tmp_path, "good", make_sae(), store)
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path), "eval"])
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: bad: ")
    assert message.format(store=store.location) in last
    assert "│ good " in done.stdout
    assert "│ bad " not in done.stdout
    assert (tmp_path / "good" / "eval.json").exists()
    assert not (tmp_path / "bad" / "eval.json").exists()


def test_only_a_logged_preset_may_be_untrained(store, tmp_path):
    make_run(tmp_path, "one", make_sae(), store, steps=0, preset="logged-run2")
    evaluations, refused = evaluate_runs(store, tmp_path)
    assert [one["steps"] for one in evaluations] == [0]
    assert not refused


@pytest.mark.slow
def test_without_a_tail_all_but_the_cross_entropies(store, model, tmp_path):
    bare = write_store(tmp_path / "bare.zarr", model, N_SEQUENCES, with_tail=False)
    make_run(tmp_path / "runs", "one", make_sae(), store)
    with_tail = evaluate_runs(store, tmp_path / "runs")[0][0]
    done = CliRunner().invoke(cli, ["--store", bare.location, "--runs", str(tmp_path / "runs"), "eval"])
    assert done.exit_code == 0, done.output
    assert "No tail, so no cross-entropies" in done.stdout
    assert "the hook is no residual stream" in done.stdout
    without = json.loads((tmp_path / "runs" / "one" / "eval.json").read_text())
    assert "the hook is no residual stream" in without["no_tail"]
    ce = {key for key in without["metrics"] if key.startswith(("ce_", "kl_"))}
    assert {without["metrics"][key] for key in ce} == {None}
    assert without["metrics"] == with_tail["metrics"] | dict.fromkeys(ce)
    assert "trained on another store" in done.stderr


def test_a_tail_that_is_put_back_is_used(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.root, copy)
    (copy / "tail").rename(tmp_path / "away")
    make_run(tmp_path / "runs", "one", make_sae(), store)
    with pytest.raises(StoreError, match="config.json is missing: the store is damaged"):
        evaluate_runs(open_store(copy), tmp_path / "runs")
    (tmp_path / "away").rename(copy / "tail")
    assert evaluate_runs(open_store(copy), tmp_path / "runs")[0][0]["metrics"]["ce_loss_score"] is not None


def test_runs_that_are_not_there(store, tmp_path):
    with pytest.raises(RunError, match=r"No runs in .*nothing. Train one: tcsae --runs .*nothing train"):
        evaluate_runs(store, tmp_path / "nothing")
    make_run(tmp_path, "topk-1", make_sae(), store)
    (tmp_path / "going").mkdir()
    (tmp_path / "topk-2.abc.partial").mkdir()
    with pytest.raises(RunError, match=r"Unknown run 'topk1'. Did you mean 'topk-1'\? There is: going, topk-1\."):
        evaluate_runs(store, tmp_path, EvalRequest(names=["topk1"]))
    with pytest.raises(RunError, match="going has no tcsae.json: its training is unfinished"):
        evaluate_runs(store, tmp_path, EvalRequest(names=["going"]))
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path), "eval"])
    assert done.exit_code == 0
    assert "going: skipped, its training is unfinished" in done.stderr


def one_line(store: Store, runs: Path) -> str:
    """What the command says on stderr where it fails: one line."""
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), "eval"])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("n_eval, skip_first", [(0, 1), (20, LENGTH)])
def test_nothing_to_score_on(model, store, tmp_path, n_eval, skip_first):
    empty = write_store(tmp_path / "empty.zarr", model, {"train": 5, "eval": n_eval})
    make_run(tmp_path / "runs", "one", make_sae(), store, train={"data": {"skip_first": skip_first}})
    with pytest.raises(StoreError, match=f"no position from {skip_first} on in {n_eval} sequences. Harvest more"):
        evaluate_runs(empty, tmp_path / "runs")
    assert one_line(empty, tmp_path / "runs").startswith(f"Error: {empty.location}: its eval split has no position")
    assert not (tmp_path / "runs" / "one" / "eval.json").exists()


def test_a_damaged_chunk_is_named(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.root, copy)
    chunk = copy / "eval" / "activations" / HOOK / "c" / "1" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    make_run(tmp_path / "runs", "one", make_sae(), store)
    with pytest.raises(StoreError, match=r"eval/activations/.*damaged"):
        evaluate_runs(open_store(copy), tmp_path / "runs")
    last = one_line(open_store(copy), tmp_path / "runs")
    assert "eval/activations/" in last and "damaged" in last
    assert not (tmp_path / "runs" / "one" / "eval.json").exists()


@pytest.mark.slow
def test_no_language_model_is_needed(store, tmp_path):
    """No transformer_lens, no datasets, and nothing of the rooms that hold or run the language model."""
    make_run(tmp_path, "one", make_sae(), store)
    program = (
        "import sys\n"
        "blocked = ('transformer_lens', 'datasets', 'tcsae.data', 'tcsae.harvest', 'tcsae.train')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "from tcsae.shared.commands.group import cli\n"
        f"cli(['--store', {store.location!r}, '--runs', {str(tmp_path)!r}, 'eval'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "│ zero output" in done.stdout
    assert "│ one " in done.stdout
    assert json.loads((tmp_path / "one" / "eval.json").read_text())["metrics"]["ce_loss_score"] is not None
    blocked = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['datasets'] = None; import datasets"],
        capture_output=True,
        check=False,
    )
    assert blocked.returncode, "the block itself has to work"
