"""Promise: several processes train what one would: one run together to the same weights, a sweep each as if alone."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tcsae
from tcsae.shared.cli import cli
from tcsae.shared.config import with_settings
from tcsae.shared.errors import ConfigError, RunError
from tcsae.shared.ranks import Ranks, start_group
from tcsae.train.buffers import Workspace
from tcsae.train.loader import SegmentLoader
from tcsae.train.peers import Peers, check_parallel
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs
from tcsae.train.several import train_together
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
    "written-run3": ("temporal.window=3",),
    "topk-difference": ("temporal.weight=0.5", "temporal.kind=difference"),
}


@pytest.fixture(scope="module")
def location(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as store:
        for split, n in (("train", 200), ("eval", 8)):
            x = rng.normal(size=(n, LENGTH, D)).cumsum(1).astype("f4")
            store.append(split, {"h": x}, lengths=rng.integers(3, LENGTH + 1, n))
    return str(path)


def make_run(kind: str, *more: str) -> Run:
    base = kind.removesuffix("-difference")
    return Run(kind, base, with_settings(preset(base, D), [*SETTINGS, *KINDS[kind], *more]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(world: int, do) -> None:
    """Fork `world` ranks that each `do(ranks)` within a group."""
    port, pids = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
                do(Ranks(rank, world, rank))
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * world


def steps(location: str, run: Run, ours: Ranks | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, counters and losses of 20 steps in float64."""
    store = tcsae.open_store(location)
    peers = Peers(ours) if ours else Peers()
    loader = SegmentLoader(store, run.config.data, ours=peers.ranks)
    torch.set_default_dtype(torch.float64)
    trainer = peers.trainer(run.config, loader.sample(1000).double(), Workspace(), LENGTH)
    losses = []
    for batch, _ in zip(loader, range(20), strict=False):
        result = trainer.step(batch._replace(x=batch.x.double()))
        losses += [result.loss, result.l0, result.grad_norm]
    found = {name: one.detach().clone() for name, one in trainer.sae.named_parameters()}
    found |= {"since": trainer.tokens_since_fired, "n": torch.tensor([trainer.progress.n_tokens])}
    return found, losses


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_in_float64_are_those_of_one_process(location, tmp_path, kind, world):
    # dead.aux_weight: AuxK looks at a sample of tokens, each rank at its own
    run = make_run(kind, "dead.aux_weight=0")

    def do(ours: Ranks) -> None:
        torch.set_num_threads(1)
        start_group(ours)
        torch.save(steps(location, run, ours), tmp_path / f"{ours.rank}.pt")

    together(world, do)
    together(1, lambda _: torch.save(steps(location, run, None), tmp_path / "alone.pt"))
    alone, losses = torch.load(tmp_path / "alone.pt")
    for rank in range(world):
        found, ours = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_allclose(ours, losses, rtol=1e-9)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_one_run_is_written_once_resumed_and_refused_by_another_number(location, tmp_path):
    store, run = tcsae.open_store(location), make_run("topk", "guard.checkpoint_steps=5")
    dies = run._replace(config=with_settings(run.config, []))

    def whole(ours: Ranks) -> None:
        train_together(store, tmp_path / "whole", [run], ours)

    def interrupted(ours: Ranks) -> None:
        real = Trainer.step

        def step(self, batch):
            if self.progress.n_steps == 13:
                raise KeyboardInterrupt
            return real(self, batch)

        Trainer.step = step
        with pytest.raises(KeyboardInterrupt):
            train_together(store, tmp_path / "killed", [dies], ours)

    together(2, whole)
    together(2, interrupted)
    with pytest.raises(RunError, match=r"was begun by 2 process\(es\), this start has 1"):
        train_runs(store, tmp_path / "killed", [run])
    together(2, lambda ours: train_together(store, tmp_path / "killed", [run], ours))
    weights = [(tmp_path / name / "topk" / "sae_weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    (record,) = train_runs(store, tmp_path / "killed", [run])  # finished: anybody may use it
    assert record["steps"] == 20
    lines = [json.loads(line) for line in (tmp_path / "whole" / "topk" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]


def test_a_sweep_is_dealt_out_and_each_is_as_alone(location, tmp_path):
    store = tcsae.open_store(location)
    runs = [
        make_run("topk")._replace(name=f"s{i}", config=with_settings(make_run("topk").config, [f"init_seed={i}"]))
        for i in range(3)
    ]

    def do(ours: Ranks) -> None:
        records = train_together(store, tmp_path / "dealt", runs, ours)
        assert [record["name"] for record in records] == (["s0", "s1", "s2"] if ours.rank == 0 else [])

    together(2, do)
    train_runs(store, tmp_path / "alone", runs)
    for run in runs:
        file = f"{run.name}/sae_weights.safetensors"
        assert (tmp_path / "dealt" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_sweep_without_a_rendezvous(location, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        options = ["train", "--steps", "3", "--sweep", "init_seed=0,1", *(f"--set={one}" for one in SETTINGS)]
        done = CliRunner().invoke(cli, ["--store", location, "--runs", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
        assert f"init_seed{rank}" in done.output
    assert len(list(tmp_path.glob("*/tcsae.json"))) == 2


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(ConfigError, match="temporal.kind='contrastive' cannot be taken apart by parts of a batch"):
        check_parallel(make_run("topk", "temporal.weight=1", "temporal.kind=contrastive").config, 2)
    with pytest.raises(ConfigError, match="data.n_segments=12 cannot"):
        check_parallel(make_run("topk").config, 13)


def test_one_run_needs_a_rendezvous(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="takes a rendezvous .* Start it with torchrun"):
        start_group(Ranks(0, 2, 0))


@pytest.mark.slow
def test_the_real_torchrun(location, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tcsae"]
    options = ["train", "--steps", "10", *(f"--set={one}" for one in SETTINGS if "steps" not in one)]
    done = subprocess.run(
        [*command, "--store", location, "--runs", str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/tcsae.json"))) == 1
