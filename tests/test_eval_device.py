"""Promise: `eval` finds the same on another device: no tensor is forgotten on the CPU, and no file knows the device."""

import inspect

import numpy as np
import pretend
import pytest
import torch
import toy_eval as toy
from click.testing import CliRunner

import tcsae.evaluate.run as run_module
from tcsae.evaluate.batches import batches
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.measures.cross_entropy import sequence_losses, splice
from tcsae.evaluate.measures.temporal_run import TemporalObserver
from tcsae.evaluate.run import evaluate_runs
from tcsae.shared.commands.group import cli

FAR = torch.device(pretend.NAME)
KINDS = ("topk", "relu", "gelu", "batchtopk")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy.write_store(tmp_path_factory.mktemp("device") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


def numbers(found, path=()):
    """All numbers of an evaluation by where they stand, but times and digests."""
    if isinstance(found, dict):
        return {key: value for name, one in found.items() for key, value in numbers(one, (*path, name)).items()}
    if isinstance(found, list):
        return {key: value for i, one in enumerate(found) for key, value in numbers(one, (*path, i)).items()}
    kept = isinstance(found, int | float) and not isinstance(found, bool) and "seconds" not in path
    return {path: found} if kept else {}


@pytest.fixture(scope="module")
def both(store, tmp_path_factory) -> list[dict]:
    """Evaluations on the CPU and on the pretended device, whose tail is a stand-in (transformers makes CPU tensors)."""
    result = []
    for device in (torch.device("cpu"), FAR):
        runs = tmp_path_factory.mktemp(device.type)
        for i, kind in enumerate(KINDS):
            toy.make_run(runs, kind, toy.make_sae(kind, seed=i), store)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "_tail", lambda *_: (None, "left out here"))
            # The pretended device takes nothing apart in inference mode.
            patch.setattr(run_module, "measure", torch.no_grad()(inspect.unwrap(run_module.measure)))
            patch.setattr(TemporalObserver, "add_up", torch.no_grad()(inspect.unwrap(TemporalObserver.add_up)))
            request = EvalRequest(baselines=True, smooth=("ema=0.3",))
            evaluations = evaluate_runs(store, runs, request, device=device).evaluations
        result.append({one["name"]: one for one in evaluations})
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *(f"{kind}+ema=0.3" for kind in KINDS)])
def test_each_figure_is_the_same_on_another_device(both, name):
    near, far = (numbers(one[name]) for one in both)
    assert near.keys() == far.keys()
    assert len(near) > 500, "temporal measures are among them"
    for key, value in near.items():
        assert far[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


class ToyTail:
    """Two matrices in place of a tail."""

    vocabulary, slice_tokens = toy.VOCABULARY, 7

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(toy.WIDTH, toy.WIDTH, generator=generator).to(device)
        self.out = torch.randn(toy.WIDTH, toy.VOCABULARY, generator=generator).to(device)
        self.device = device

    def hidden(self, x):
        return torch.tanh(x.to(self.device) @ self.weight)

    def unembed(self, hidden, out):
        return torch.mm(hidden, self.out, out=out)


def test_losses_through_a_tail_are_the_same_on_another_device(store):
    result = []
    for device in (torch.device("cpu"), FAR):
        (batch, *_) = batches(store.eval, toy.HOOK, toy.FROM_1)
        x = batch.x.to(device)
        spliced = splice(
            x, batch.counted, 0.5 * x.flatten(0, 1)[torch.from_numpy(np.flatnonzero(batch.counted)).to(device)]
        )
        unchecked = getattr(sequence_losses, "__wrapped__", sequence_losses)
        losses = unchecked(ToyTail(device), x, [spliced], batch.tokens, batch.counted, batch.has_next)
        result.append([one.cpu() for pair in losses for one in pair])
    torch.testing.assert_close(result[1], result[0], atol=1e-4, rtol=1e-3)
    assert result[0][2].sum() != result[0][0].sum()


@pytest.mark.parametrize("command", ["eval", "report"])
def test_a_device_that_is_not_here_is_one_line(store, tmp_path, command):
    toy.make_run(tmp_path, "topk", toy.make_sae(), store)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(
        cli, ["--store", str(store.location), "--runs", str(tmp_path), command, "--device", "cuda"]
    )
    assert done.exit_code == 1
    assert "The device cuda is not here; there is: cpu." in done.output
