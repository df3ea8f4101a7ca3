"""Promise: training learns, keeps decoder norms, repeats itself bit for bit, and leaves a folder that says all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from toy_pairs import pair_settings

import tcsae
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_sae
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.batch import Batch
from tcsae.train.config import TrainConfig
from tcsae.train.dry_run import estimate
from tcsae.train.plan import Request, plan_runs, run_name
from tcsae.train.presets import PRESETS, preset
from tcsae.train.run import train_runs
from tcsae.train.start.first_weights import geometric_median, initial_sae
from tcsae.train.trainer import Trainer

HOOK, LENGTH, WIDTH = "blocks.0.hook_resid_post", 12, 16


def planted(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sequences of sparse mixtures of 24 directions, on an offset, in units far from 1."""
    directions = np.random.default_rng(1).normal(size=(24, WIDTH))
    code = rng.random((n, LENGTH, 24)) * (rng.random((n, LENGTH, 24)) < 0.12)
    return (20 * code @ directions + 5).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = str(tmp_path_factory.mktemp("train") / "a.zarr")
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        n_tokens=1,
    )
    writer = open_writer(path, recipe, Layout(sequences_per_chunk=64))
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH + 1, 400).astype(np.int32)
    tokens = np.arange(400 * LENGTH, dtype=np.int32).reshape(400, LENGTH)
    rows = Rows(tokens, lengths, np.arange(400), np.zeros(400, np.int32))
    writer.commit({"train": rows, "eval": rows}, {})
    writer.finish_sequences({s: {"sequences": 400, "tokens": int(lengths.sum()), "documents": 400} for s in SPLITS})
    for shard in writer.missing_shards():
        writer.write_shard(shard, {HOOK: planted(rng, shard.stop - shard.start)})
    writer.seal({}, [], {})
    return open_store(path)


SMALL = ("sae.d_sae=32", "sae.k=4", "steps=60", "data.n_segments=32", "data.segment_length=6", "log_every=20")


def batch_of(x: torch.Tensor) -> Batch:
    return Batch(x, np.array([len(x)]), np.zeros(1, np.int64), np.zeros(1, np.int64))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path / "sae_weights.safetensors")


@pytest.mark.slow
def test_a_run_is_a_folder_that_says_everything(store, tmp_path):
    (record,) = train_runs(store, tmp_path, plan_runs(store, Request(["topk"], SMALL)))
    path = tmp_path / record["name"]
    assert {file.name for file in path.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "tcsae.json", "metrics.jsonl"
    }  # fmt: skip
    assert record["store"]["content"] == store.content
    assert (record["hook"], record["steps"], record["preset"]) == (HOOK, 60, "topk")
    assert record["left_out"] == {
        "skip_first_per_epoch": store.train.n_sequences,
        "short_per_epoch": 0,
        "max_norm": 0,
    }
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["tokens"] == record["tokens"]
    assert lines[-1]["explained_variance"] > lines[0]["explained_variance"]
    assert lines[-1]["l0"] <= 4
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(path).items()}
    assert shapes == {"W_enc": (WIDTH, 32), "b_enc": (32,), "W_dec": (32, WIDTH), "b_dec": (WIDTH,)}
    assert all(tensor.dtype == torch.float32 for tensor in weights(path).values())
    config = json.loads((path / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", WIDTH, 32, 4)
    assert config["metadata"]["hook_name"] == HOOK


@pytest.mark.slow
def test_it_learns_and_reads_unscaled_activations(store, tmp_path):
    (record,) = train_runs(
        store, tmp_path, plan_runs(store, Request(["topk"], [*SMALL, "steps=400", "optimizer.lr=0.01"]))
    )
    sae = load_sae(tmp_path / record["name"])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    lengths = store.eval.lengths
    x = torch.from_numpy(store.eval.read(HOOK, 0, 400)).float()[torch.arange(LENGTH) < torch.tensor(lengths)[:, None]]
    with torch.no_grad():
        error, dense = sae(x) - x, sae.encode(x)
        code = sae.encode_sparse(x)
        torch.testing.assert_close(code.dense(), dense)
        torch.testing.assert_close(sae.decode_sparse(code), sae.decode(dense))
    assert 1 - error.square().sum() / (x - x.mean(0)).square().sum() > 0.8
    assert ((dense > 0).sum(1) <= 4).all()


@pytest.mark.parametrize("activation", ["topk", "relu", "gelu", "batchtopk", "jumprelu"])
def test_folding_the_input_scale_changes_no_reconstruction(activation):
    torch.manual_seed(0)
    config = TrainConfig(sae=SaeConfig(d_model=6, d_sae=10, k=3, activation=activation))
    sae = initial_sae(config, torch.randn(50, 6))
    sae.b_enc.data.normal_()
    if activation in ("batchtopk", "jumprelu"):
        sae.threshold.data.uniform_(0.1, 0.5)
    x = torch.randn(9, 6) * 7
    expected = sae(x * 0.2) / 0.2
    sae.fold_scale(0.2)
    torch.testing.assert_close(sae(x), expected)


@pytest.mark.slow
def test_same_seeds_same_weights_and_another_seed_others(store, tmp_path):
    for name in ("a", "b"):
        train_runs(store, tmp_path / name, plan_runs(store, Request(["topk"], SMALL)))
    train_runs(store, tmp_path / "a", plan_runs(store, Request(["topk"], [*SMALL, "init_seed=1"])))
    train_runs(store, tmp_path / "a", plan_runs(store, Request(["topk"], [*SMALL, "data.seed=1"])))
    name = run_name("topk", SMALL)
    first, again = weights(tmp_path / "a" / name), weights(tmp_path / "b" / name)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for suffix in ("-init_seed1", "-seed1"):
        assert not torch.equal(first["W_dec"], weights(tmp_path / "a" / (name + suffix))["W_dec"])


@pytest.mark.slow
def test_runs_of_one_pass_equal_themselves_alone(store, tmp_path):
    both = plan_runs(
        store, Request(["topk", "written-run3"], ("steps=30", "data.n_segments=16", "data.segment_length=8"))
    )
    train_runs(store, tmp_path / "both", both)
    for run in both:
        train_runs(store, tmp_path / "alone", [run])
        one, other = weights(tmp_path / "both" / run.name), weights(tmp_path / "alone" / run.name)
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_finished_runs_are_reused_and_other_settings_refused(store, tmp_path, capsys):
    runs = plan_runs(store, Request(["topk"], SMALL))
    train_runs(store, tmp_path, runs)
    before = (tmp_path / runs[0].name / "tcsae.json").stat().st_mtime_ns
    train_runs(store, tmp_path, runs)
    assert (tmp_path / runs[0].name / "tcsae.json").stat().st_mtime_ns == before
    assert "trained already, reused" in capsys.readouterr().err
    record = json.loads((tmp_path / runs[0].name / "tcsae.json").read_text())
    del record["train"]["data"]["min_sequence_length"]  # as of a version that did not have the setting
    record["train"]["optimizer"]["gradients"] = "written"  # and that had one which is gone
    del record["files"]["tcsae.json"]
    (tmp_path / runs[0].name / "tcsae.json").write_text(json.dumps(record))
    train_runs(store, tmp_path, runs)
    assert "trained already, reused" in capsys.readouterr().err
    longer = [run._replace(config=with_settings(run.config, ["steps=61"])) for run in runs]
    with pytest.raises(RunError, match=r"trained otherwise \(train.steps: 60, not 61\). Use --fresh"):
        train_runs(store, tmp_path, longer)
    train_runs(store, tmp_path, longer, fresh=True)
    with pytest.raises(RunError, match="Two runs would be named"):
        train_runs(store, tmp_path, [*runs, *runs])


def test_loss_that_is_not_finite_stops_before_any_weight_moves():
    config = with_settings(preset("topk", WIDTH), SMALL)
    sample = torch.randn(100, WIDTH)
    trainer = Trainer(config, sample)
    before = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    sample[3, 1] = float("inf")
    with pytest.raises(
        RunError, match=r"step 0: loss (nan|inf).*No weight was touched; lower optimizer.lr.*data.max_norm=10"
    ):
        trainer.step(batch_of(sample))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.sae.state_dict().items())


def test_a_sample_of_zeros_is_refused_with_a_cure_that_trains(tmp_path):
    zeros = torch.zeros(50, WIDTH)
    with pytest.raises(ConfigError, match=r"the store's first hook.* Set data.hook to another, or init.input_scale=no"):
        Trainer(with_settings(preset("topk", WIDTH), SMALL), zeros)
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"h": WIDTH}, sequence_length=LENGTH, codec="float32") as store:
        for split, first in (("train", 0), ("eval", 100)):
            store.append(split, {"h": np.zeros((9, LENGTH, WIDTH), "f4")}, documents=first + np.arange(9))
    options = ["--store", str(tmp_path / "a.zarr"), "--runs", str(tmp_path), "train", "--preset", "topk"]
    options += [f"--set={one}" for one in (*SMALL, "data.hook=h")]
    done = CliRunner().invoke(cli, options)
    assert (done.exit_code, done.output.splitlines()[-1]) == (
        1,
        "Error: All activations of the sample are zero, or too small to square (data.hook=h): init.input_scale='unit' "
        "has nothing to scale. Set data.hook to another, or init.input_scale=none.",
    )
    done = CliRunner().invoke(cli, [*options, "--set=init.input_scale=none"])
    assert done.exit_code == 0, done.output


def test_exploding_loss_stops_too():
    trainer = Trainer(with_settings(preset("topk", WIDTH), SMALL), torch.randn(100, WIDTH))
    for _ in range(3):
        trainer.step(batch_of(torch.randn(50, WIDTH)))
    with pytest.raises(RunError, match=r"100 times that is allowed \(guard.explode\)"):
        trainer.step(batch_of(50 * torch.randn(50, WIDTH)))


def test_decoder_keeps_unit_rows_and_gets_no_parallel_gradient():
    config = with_settings(preset("topk", WIDTH), SMALL)
    trainer = Trainer(config, torch.randn(100, WIDTH))
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(32))
    before = trainer.sae.W_dec.detach().clone()
    trainer.step(batch_of(torch.randn(40, WIDTH)))
    torch.testing.assert_close((trainer.sae.W_dec.grad * before).sum(1), torch.zeros(32), atol=1e-6, rtol=0)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(32))


def test_paper_presets_are_the_paper_s():
    config = preset("written-run3", 512)
    assert (config.sparsity.l1, config.temporal.weight, config.temporal.window) == (0.1, 0.01, 3)
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.decay) == (3e-4, 1000, "cosine")
    assert (config.data.n_segments, config.data.segment_length, config.data.buffer_sequences) == (32, 128, 2048)
    assert (config.sae.activation, config.sae.d_sae, config.init.input_scale) == ("gelu", 512, "none")
    assert config.optimizer.learning_rate(998, config.steps) < 3e-4 == config.optimizer.learning_rate(999, config.steps)
    without_steps = {name for name in PRESETS if preset(name, 8).steps == 0}
    assert without_steps == {name for name in PRESETS if name.startswith(("logged-", "untrained-"))}


def test_each_run_of_the_paper_adds_to_the_one_before_what_it_says():
    """Sections 5, 6: no temporal term in run 0, Xavier and clipping from run 2 on, decay and lambda_2 = .01 in 3."""
    added = {
        ("0", "1"): {"temporal"},
        ("1", "2"): {"init", "optimizer", "guard"},
        ("2", "3"): {"temporal", "optimizer"},
        ("3", "4"): {"sae"},
    }
    for (before, after), parts in added.items():
        one, other = (preset(f"written-run{run}", WIDTH) for run in (before, after))
        names = [field.name for field in dataclasses.fields(one)]
        assert {name for name in names if getattr(one, name) != getattr(other, name)} == parts
    plain, phased = preset("written-run0", WIDTH), preset("written-two-phase", WIDTH)
    assert (plain.init.weights, plain.optimizer.decay, plain.temporal.weight) == ("uniform", "none", 0)
    assert phased.temporal.warmup * phased.steps == phased.optimizer.warmup_steps


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("-shuffled")])
def test_every_preset_trains_or_stays_as_it_was(store, tmp_path, name):
    settings = ["data.n_segments=8", "data.segment_length=6", "sae.d_sae=40", "sae.k=4", "log_every=5"]
    settings += pair_settings(name, gap=2, distance=4, around=1)
    steps = preset(name, WIDTH).steps and 10
    runs = plan_runs(store, Request([name], [*settings, f"steps={steps}"]))
    (one,) = estimate(store, tmp_path, runs).passes[0].runs
    assert one.step_s > 0 or not steps, "--dry-run times its steps"
    (record,) = train_runs(store, tmp_path, runs)
    sae = load_sae(tmp_path / record["name"])
    x = torch.randn(2, 7, sae.config.d_in)  # two sequences, or windows
    with torch.no_grad():
        assert sae(x).isfinite().all()
        torch.testing.assert_close(sae.encode_sparse(x).dense(), sae.encode(x).flatten(0, 1))
    lines = [json.loads(line) for line in (tmp_path / record["name"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ([5, 10] if steps else [])
    assert record["ended"] == ""
    if name == "logged-run0":
        assert not sae(x).any()


@pytest.mark.slow
def test_batchtopk_infers_with_the_average_l0_it_was_trained_for(store, tmp_path):
    (record,) = train_runs(store, tmp_path, plan_runs(store, Request(["batchtopk"], SMALL)))
    sae = load_sae(tmp_path / record["name"])
    valid = torch.arange(LENGTH) < torch.tensor(store.eval.lengths)[:, None]
    x = torch.from_numpy(store.eval.read(HOOK, 0, 400)).float()[valid]
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.15)
    config = json.loads((tmp_path / record["name"] / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert weights(tmp_path / record["name"])["threshold"].shape == (32,)


def test_geometric_median_resists_outliers():
    x = torch.randn(200, 4)
    x[:20] += 1000
    assert geometric_median(x).norm() < 1
    assert x.mean(0).norm() > 50


def test_a_batch_of_nothing_but_outliers_is_counted_and_skipped(store, tmp_path):
    settings = (*SMALL, "steps=30", "data.n_segments=1", "data.max_norm=1.1", "log_every=1")
    (record,) = train_runs(store, tmp_path, plan_runs(store, Request(["topk"], settings)))
    lines = [json.loads(line) for line in (tmp_path / record["name"] / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line.get("event") == "skipped"]
    assert 0 < len(skipped) < 30
    assert skipped[0]["why"] == f"Batch {skipped[0]['step'] - 1}: data.max_norm=1.1 leaves no token of it."
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert record["steps"] == 30
    assert record["left_out"]["max_norm"] > 0
