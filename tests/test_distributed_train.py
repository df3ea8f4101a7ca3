"""Promise: several processes train what one would: one run together to the same weights, a sweep each as if alone."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from toy_ranks import spawn

import tcsae
from tcsae.shared.base.distributed import ALONE, Ranks, start_group
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.train.checks import check_parallel
from tcsae.train.loader import SegmentLoader
from tcsae.train.log import metrics_line
from tcsae.train.losses import auxk
from tcsae.train.plan import Run
from tcsae.train.presets import PRESETS, preset
from tcsae.train.run import train_parallel, train_runs
from tcsae.train.trainer import Trainer

D, LENGTH = 16, 12
SETTINGS = (
    "sae.d_sae=64",
    "sae.k=4",
    "steps=20",
    "data.n_segments=12",
    "data.segment_length=5",
    "optimizer.lr=0.001",
    "log_every=5",
    "dead.after_tokens=60",
)
KINDS = {
    "topk": (),
    "batchtopk": (),
    "relu-l1": (),
    "jumprelu": ("sparsity.bandwidth=0.5",),
    "written-run3": ("temporal.window=3",),
    "temporal-topk": (),
    "temporal-matryoshka": (),
    "topk-difference": ("temporal.weight=0.5", "temporal.kind=difference", "temporal.pairs=all"),
    "topk-gated": ("temporal.weight=0.5", "temporal.kind=gated"),
    "topk-shuffled": ("temporal.weight=0.5", "temporal.kind=difference", "temporal.order=segment"),
    "written-run3-shuffled": ("temporal.kind=relative", "temporal.order=segment"),
    "temporal-topk-shuffled": ("temporal.order=segment",),
    "topk-relative": ("temporal.weight=0.5", "temporal.kind=relative"),
    "relu-l1-relative": ("temporal.weight=0.5", "temporal.kind=relative"),
    "written-run3-contrastive": ("temporal.kind=contrastive",),
    "topk-budget": ("temporal.budget=0.3", "temporal.kind=relative"),
    "written-run3-budget": ("temporal.budget=0.3",),
    "topk-position": ("temporal.position_penalty=0.3",),
    "written-run3-position": ("temporal.position_penalty=0.3",),
    "local-contrast-batch": ("temporal.contrast.gap=1",),
    "temporal-topk-centred": (),
    "temporal-topk-positions": ("temporal.contrast.gap=2", "temporal.contrast.per_segment=2"),
    "temporal-topk-positions-shuffled": ("temporal.contrast.gap=2", "temporal.contrast.per_segment=2"),
    "persistent": (),
    "direction": ("temporal.contrast.gap=2", "temporal.contrast.rank=5"),
    "topic": ("temporal.contrast.distance=6", "data.segment_length=4"),
    "t-sae": ("data.segment_length=2", "data.n_segments=24", "dead.after_share=0.05", "sparsity.threshold=average"),
    # One pair a segment: with more, two may share a partner, and a BatchTopK's ties are cut otherwise.
    "t-sae-past-shuffled": ("temporal.contrast.per_segment=1",),
    "temporal-matryoshka-outliers": ("data.max_norm=1.8", "data.n_segments=4"),
}


@pytest.fixture(scope="module")
def location(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as store:
        for split, n in (("train", 200), ("eval", 8)):
            x = rng.normal(size=(n, LENGTH, D)).cumsum(1).astype("f4")
            lengths, tokens = rng.integers(3, LENGTH + 1, n), np.arange(n * LENGTH).reshape(n, LENGTH)
            store.append(split, {"h": x}, lengths=lengths, tokens=tokens)
    return str(path)


def make_run(kind: str, *more: str) -> Run:
    base = max((name for name in PRESETS if kind.startswith(name)), key=len)
    return Run(kind, base, with_settings(preset(base, D), [*SETTINGS, *KINDS[kind], *more]))


def steps(location: str, run: Run, ours: Ranks | None) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights, counters, losses and logged figures of 20 steps in float64."""
    store = tcsae.open_store(location)
    loader = SegmentLoader(store, run.config.data, ranks=ours or ALONE, text=run.config.temporal.reads_text)
    torch.set_default_dtype(torch.float64)
    trainer = Trainer(run.config, loader.sample(1000).double(), LENGTH)
    told = []
    for batch, _ in zip(loader, range(20), strict=False):
        result = trainer.step(batch._replace(x=batch.x.double()))
        told.append(metrics_line(trainer, result))
    actual = {name: one.detach().clone() for name, one in trainer.sae.named_parameters()}
    actual |= {
        "since": trainer.tokens_since_fired,
        "progress": torch.tensor(list(asdict(trainer.progress).values())[:3]),
    }
    return actual, told


@pytest.fixture(scope="module")
def done(location, tmp_path_factory):
    """What each of `world` processes finds with every kind: {kind: a result for each rank}."""
    known = {}

    def find(world: int):
        folder = tmp_path_factory.mktemp("done")

        def do(ours: Ranks) -> None:
            torch.set_num_threads(1)
            auxk.AUX_TOKENS = 16  # of some 50: which tokens it looks at has to go by the whole batch
            if ours.parallel:
                start_group(ours)
            result = {kind: steps(location, make_run(kind), ours if ours.parallel else None) for kind in KINDS}
            torch.save(result, folder / f"{ours.rank}.pt")

        if world not in known:
            spawn(world, do)
            result = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
            known[world] = {kind: [one[kind] for one in result] for kind in KINDS}
        return known[world]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_in_float64_are_those_of_one_process(done, kind, world):
    ((weights, lines),) = done(1)[kind]
    for result, ours in done(world)[kind]:
        for one, other in zip(ours, lines, strict=True):
            assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
        for name in weights:
            torch.testing.assert_close(result[name], weights[name], rtol=1e-9, atol=1e-11)
    assert ("aux" in lines[-1]) == (not kind.startswith("written"))
    assert any(line.get("aux") for line in lines) or not kind.startswith("topk")


@pytest.mark.slow
def test_one_run_is_written_once_resumed_and_refused_by_another_number(location, tmp_path):
    store, run = tcsae.open_store(location), make_run("topk", "guard.checkpoint_steps=5")
    dies = run._replace(config=with_settings(run.config, []))

    def whole(ours: Ranks) -> None:
        train_parallel(store, tmp_path / "whole", [run], ours)

    def interrupted(ours: Ranks) -> None:
        real = Trainer.step

        def step(self, batch):
            if self.progress.n_steps == 13:
                raise KeyboardInterrupt
            return real(self, batch)

        Trainer.step = step
        with pytest.raises(KeyboardInterrupt):
            train_parallel(store, tmp_path / "killed", [dies], ours)

    spawn(2, whole)
    spawn(2, interrupted)
    with pytest.raises(RunError, match=r"was begun by 2 process\(es\), this start has 1"):
        train_runs(store, tmp_path / "killed", [run])
    spawn(2, lambda ours: train_parallel(store, tmp_path / "killed", [run], ours))
    weights = [(tmp_path / name / "topk" / "sae_weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    (record,) = train_runs(store, tmp_path / "killed", [run])  # finished: anybody may use it
    assert record["steps"] == 20
    lines = [json.loads(line) for line in (tmp_path / "whole" / "topk" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_sweep_is_dealt_out_and_each_is_as_alone(location, tmp_path):
    store = tcsae.open_store(location)
    runs = [
        make_run("topk")._replace(name=f"s{i}", config=with_settings(make_run("topk").config, [f"init_seed={i}"]))
        for i in range(3)
    ]

    def do(ours: Ranks) -> None:
        records = train_parallel(store, tmp_path / "dealt", runs, ours)
        assert [record["name"] for record in records] == (["s0", "s1", "s2"] if ours.rank == 0 else [])

    spawn(2, do)
    train_runs(store, tmp_path / "alone", runs)
    for run in runs:
        file = f"{run.name}/sae_weights.safetensors"
        assert (tmp_path / "dealt" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_sweep_without_a_rendezvous(location, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        settings = [f"--set={one}" for one in SETTINGS if not one.startswith("steps=")]
        options = ["train", "--steps", "3", "--sweep", "init_seed=0,1", *settings]
        done = CliRunner().invoke(cli, ["--store", location, "--runs", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
        assert f"init_seed{rank}" in done.output
    assert len(list(tmp_path.glob("*/tcsae.json"))) == 2


@pytest.mark.parametrize(
    ("settings", "world", "device", "line"),
    [
        (("data.n_segments=12",), 13, "cpu", "data.n_segments=12 is less than one for each of 13 processes. Raise it"),
        (("temporal.weight=1", "temporal.order=batch"), 2, "cpu", "temporal.order='batch' pairs tokens of the whole"),
        ((), 2, "mps", "One run in several processes is not for mps. Give --device cpu, or train in one process."),
        # What reads neighbours is shuffled whatever the term's weight.
        (("sae.window=3", "temporal.order=batch"), 2, "cpu", "temporal.order='batch' pairs tokens of the whole"),
        (("sae.predictor=decay", "temporal.order=batch"), 2, "cpu", "temporal.order='batch' pairs tokens of the whole"),
    ],
)
def test_what_several_processes_cannot_train_is_refused(settings, world, device, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        check_parallel(make_run("topk", *settings).config, world, device)


def test_an_order_that_nothing_reads_is_no_hindrance():
    check_parallel(make_run("topk", "temporal.order=batch").config, 2)


def test_one_run_needs_a_rendezvous(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="need a rendezvous .* Start them by torchrun"):
        start_group(Ranks(0, 2, 0))


@pytest.mark.slow
def test_the_real_torchrun(location, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tcsae"]
    place = ["--store", location, "--runs", str(tmp_path)]
    settings = [f"--set={one}" for one in SETTINGS if "steps" not in one]
    for stage in (["train", "--preset", "temporal-topk", "--steps", "10", *settings], ["eval"]):
        done = subprocess.run([*command, *place, *stage], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/eval.json")
    assert path.with_name("tcsae.json").exists()
    assert done.stdout.count("All figures, intervals") == 1  # rank 0 alone prints
