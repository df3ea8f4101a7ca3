"""Promise: where the guard is read a step late, runs end, are brought back and are saved as if it were read at once.

On the pretended device of tests/pretend.py, against the same runs on the CPU, where it is read at once.
"""

import json
import re
from pathlib import Path

import numpy as np
import pretend
import pytest
import safetensors.torch
import torch

import tcsae
import tcsae.train.run as run_module
from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch
from tcsae.train.guard import UnstableError
from tcsae.train.plan import Run
from tcsae.train.presets import preset
from tcsae.train.run import train_runs
from tcsae.train.trainer import Trainer

FAR = torch.device(pretend.NAME)
WIDTH, LENGTH, STEPS = 8, 6, 18
SETTINGS = (
    "sae.d_sae=32",
    "sae.k=3",
    "data.segment_length=6",
    "data.n_segments=8",
    "data.skip_first=0",
    f"steps={STEPS}",
    "log_every=7",
    "guard.checkpoint_steps=5",
    "guard.explode=20",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("late") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH, codec="float32") as creation:
        for split, n in (("train", 80), ("eval", 4)):
            creation.append(split, {"h": rng.normal(size=(n, LENGTH, WIDTH)).astype("f4") + 1})
    return tcsae.open_store(path)


SPOILT = {
    "not a number": lambda x: x * float("nan"),
    "infinite": lambda x: x * float("inf"),
    "exploding": lambda x: x * 100,
}


def train(store: Store, path: Path, device: torch.device, action: str, numbers: set[int], how: str, monkeypatch):
    """The record, the log's events, and all checkpoints' weights of a run whose batches `numbers` are spoilt."""
    run = Run("topk", "topk", with_settings(preset("topk", WIDTH), [*SETTINGS, f"guard.action={action}"]))
    real_step, real_save, saved = run_module.Member.step, run_module.save_checkpoint, []

    def step(self, batch, number):
        real_step(self, batch._replace(x=SPOILT[how](batch.x)) if number in numbers else batch, number)

    def save(path, trainer, about):
        saved.append({name: tensor.cpu().clone() for name, tensor in trainer.sae.state_dict().items()})
        real_save(path, trainer, about)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Member, "step", step)
        patch.setattr(run_module, "save_checkpoint", save)
        (record,) = train_runs(store, path, [run], device=device)
    lines = [json.loads(line) for line in (path / "topk" / "metrics.jsonl").read_text().splitlines()]
    return record, lines, saved, safetensors.torch.load_file(path / "topk" / "sae_weights.safetensors")


def events(lines: list[dict]) -> list[tuple]:
    """Without the figures, which round otherwise."""
    return [
        (line["event"], line["step"], re.sub(r"[\d.e+]+", "", line["why"].replace("inf", "nan")))
        for line in lines
        if "event" in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "numbers", "how"),
    [
        ("end", {9}, "exploding"),
        ("end", {STEPS - 1}, "not a number"),  # no step comes after it
        ("restore", {9}, "exploding"),
        ("restore", {4, 14}, "infinite"),  # the steps before a checkpoint
        ("restore", {8, 12, 13}, "not a number"),  # one after the other; the third time it ends
        ("restore", {STEPS - 1}, "not a number"),
    ],
)
def test_a_run_ends_or_is_brought_back_as_on_a_cpu(store, tmp_path, monkeypatch, how, action, numbers):
    near = train(store, tmp_path / "near", torch.device("cpu"), action, numbers, how, monkeypatch)
    far = train(store, tmp_path / "far", FAR, action, numbers, how, monkeypatch)
    assert events(far[1]) == events(near[1])
    assert [line["step"] for line in far[1]] == [line["step"] for line in near[1]]
    assert (far[0]["steps"], far[0]["tokens"], far[0]["restored"]) == (
        near[0]["steps"], near[0]["tokens"], near[0]["restored"]
    )  # fmt: skip
    assert bool(far[0]["ended"]) == bool(near[0]["ended"])
    assert len(far[2]) == len(near[2])
    for one, other in zip([*far[2], far[3]], [*near[2], near[3]], strict=True):
        for name, tensor in one.items():
            assert tensor.isfinite().all(), name
            torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=1e-3)


def batch_of(x: torch.Tensor) -> Batch:
    return Batch(x.to(FAR), np.full(8, 6), np.zeros(8, np.int64), np.arange(8))


@pytest.mark.parametrize("how", SPOILT)
def test_from_a_bad_step_on_nothing_moves_to_the_last_bit(how):
    config = with_settings(preset("jumprelu", WIDTH), SETTINGS)
    torch.manual_seed(0)
    x = torch.randn(48, WIDTH) + 1
    trainer = Trainer(config, x.to(FAR), n_positions=LENGTH)
    for _ in range(3):
        trainer.step(batch_of(x))
    trainer.settle()
    before = [tensor.cpu().clone() for tensor in state(trainer)]
    bad = batch_of(SPOILT[how](x))
    trainer.step(bad)
    counted = trainer.progress.n_steps
    with pytest.raises(UnstableError, match=r"step 3: loss") as raised:
        trainer.step(batch_of(x))
    assert raised.value.batch is bad
    assert (counted, trainer.progress.n_steps) == (4, 3), "the counters are those before it"
    assert all(torch.equal(one, other.cpu()) for one, other in zip(before, state(trainer), strict=True))
    trainer.restart()
    trainer.step(batch_of(x))
    trainer.settle()
    assert not torch.equal(before[0], trainer.parameters[0].cpu()), "after a restart it trains on"


def state(trainer: Trainer) -> list[torch.Tensor]:
    moments = [trainer.optimizer.state[one][name] for one in trainer.parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*(one.detach() for one in trainer.parameters), *moments]
