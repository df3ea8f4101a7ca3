"""Promise: training does the same on another device: no tensor is forgotten on the CPU, and files know no device."""

import json

import numpy as np
import pretend
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from toy_pairs import pair_settings

import tcsae
import tcsae.train.run as run_module
from tcsae.shared.base.device import available_devices, choose_device, sum_dtype
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_sae
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch, Text
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.log import metrics_line
from tcsae.train.plan import Run
from tcsae.train.presets import PRESETS, preset
from tcsae.train.run import train_runs
from tcsae.train.trainer import Trainer

FAR = torch.device(pretend.NAME)

WIDTH, LENGTH = 8, 6
SMALL = ("sae.d_sae=64", "sae.k=3", "data.segment_length=6", "steps=100", "log_every=1", "dead.aux_k=8")
VARIANTS = {
    "topk": ("data.seed=0",),
    "topk, local": ("temporal.kind=local", "temporal.weight=0.1"),
    "topk, direction": ("temporal.kind=direction", "temporal.weight=0.1"),
    "topk, shuffled": ("temporal.kind=contrastive", "temporal.weight=0.1", "temporal.order=segment"),
    "topk, centred": ("temporal.kind=contrastive", "temporal.weight=0.1", "temporal.contrast.centred=true"),
    "batchtopk, t-sae": ("temporal.kind=t-sae", "temporal.weight=0.1", "sparsity.threshold=average"),
    "topk, other": ("sae.groups=0.25,0.75", "group_weights=1,1", "temporal.weight=0.1", "temporal.position_penalty=1"),
    "batchtopk": ("temporal.kind=gated", "temporal.weight=0.1", "temporal.pairs=all", "init.b_dec=median"),
    "relu-l1": ("sae.layer_norm=in_out", "init.input_scale=none", "temporal.kind=relative", "temporal.budget=0.1"),
    "relu-l1, other": ("temporal.kind=contrastive", "temporal.weight=0.1", "temporal.position_penalty=0.1"),
    "relu-l1, sparse": ("init_seed=3",),
    "written-run4": ("temporal.budget=0.1", "sae.groups=0.5,0.5", "group_weights=1,1"),
}  # fmt: skip
CASES = [(name, ()) for name in PRESETS if not name.startswith("logged-") and not name.endswith("-shuffled")] + [
    *VARIANTS.items()
]


def on(device: torch.device, name: str, settings: tuple[str, ...]) -> tuple[Trainer, Batch]:
    """A trainer in the middle of a run, with dead latents, and its batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, WIDTH, generator=generator) + 0.5
    base = name.partition(",")[0]
    pairs = pair_settings(base, settings, gap=2, distance=3)
    config = with_settings(preset(base, WIDTH), [*SMALL, *pairs, *settings])
    text = Text(np.arange(48), np.arange(48) % 12)
    batch = Batch(x.to(device), np.full(8, 6), np.zeros(8, np.int64), np.arange(8) // 2, text=text)
    window = config.sae.window
    sample = batch.x if window == 1 else batch.windows(window, 0).x
    trainer = Trainer(config, sample, n_positions=LENGTH)
    with torch.no_grad():
        if name == "relu-l1, sparse":
            trainer.sae.b_enc.sub_(3.0)
        trainer.tokens_since_fired[::5] = 10**9
    trainer.progress.n_steps, trainer.progress.n_tokens = 10, 480
    return trainer, batch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_step_is_the_same_on_another_device(name, settings):
    result = []
    for device in (torch.device("cpu"), FAR):
        trainer, batch = on(device, name, settings)
        losses = dict(trainer.gradients(batch).losses)
        gradients = [parameter.grad.cpu().clone() for parameter in trainer.parameters]
        lines = [metrics_line(trainer, trainer.step(batch)) for _ in range(3)]
        sae = trainer.finished_sae()
        assert {type(tensor) for tensor in sae.tensors().values()} == {torch.Tensor}
        result.append((losses, gradients, lines))
        assert {parameter.device.type for parameter in trainer.sae.parameters()} == {device.type}
    (losses, gradients, lines), (far_losses, far_gradients, far_lines) = result
    assert far_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(far_gradients, gradients)
    for line, far in zip(lines, far_lines, strict=True):
        assert far == pytest.approx(line, rel=1e-3)
    if "aux" in losses:
        assert losses["aux"] > 0


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    result = {}
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(12, WIDTH))
    x = ((rng.random((80, LENGTH, 12)) < 0.2) @ directions).astype(np.float32)
    x[5, 2], lengths = 300.0, rng.integers(3, LENGTH + 1, 80)
    for codec in ("float16", "bfloat16", "int8", "compact"):
        path = tmp_path_factory.mktemp(codec) / "a.zarr"
        with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=LENGTH, codec=codec) as creation:
            creation.append("train", {"h": x}, lengths=lengths)
            creation.append("eval", {"h": x[:10]})
        result[codec] = tcsae.open_store(path)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "compact"])
def test_batches_are_decoded_on_the_device(stores, codec):
    config = DataConfig(n_segments=7, segment_length=4, buffer_sequences=16, max_norm=20.0)
    near, far = SegmentLoader(stores[codec], config), SegmentLoader(stores[codec], config, device=FAR)
    assert far.sample(100).device.type == FAR.type
    n_left_out = 0
    for _, here, there in zip(range(40), near, far, strict=False):
        assert there.x.device.type == FAR.type
        torch.testing.assert_close(there.x.cpu(), here.x)
        assert there.documents.tolist() == here.documents.tolist()
        assert there.lengths.tolist() == here.lengths.tolist()
        n_left_out += here.n_left_out
    assert n_left_out, "the outlier was never left out"


def runs_of(names: tuple[str, ...]) -> list[Run]:
    settings = (*SMALL, "steps=12", "data.n_segments=10", "data.skip_first=0", "guard.checkpoint_steps=5")
    return [Run(name, name, with_settings(preset(name, WIDTH), settings)) for name in names]


@pytest.mark.slow
def test_runs_on_a_device_leave_files_that_know_none(stores, tmp_path):
    runs = runs_of(("batchtopk", "temporal-matryoshka"))
    records = train_runs(stores["int8"], tmp_path, runs, device=FAR)
    assert {record["device"] for record in records} == {FAR.type}
    for run in runs:
        sae = load_sae(tmp_path / run.name)
        assert {type(tensor) for tensor in sae.tensors().values()} == {torch.Tensor}
        assert json.loads((tmp_path / run.name / "cfg.json").read_text())["device"] == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("way", [("cpu", FAR.type), (FAR.type, "cpu")])
def test_a_run_goes_on_on_another_device_and_says_so(stores, tmp_path, monkeypatch, capsys, way):
    runs = runs_of(("topk", "relu-l1"))
    for run in runs:
        train_runs(stores["float16"], tmp_path / "whole", [run])
    real = run_module.Member.step

    def interrupted(self, batch, number):
        if number == 7 and self.run.name == "topk":
            raise KeyboardInterrupt
        real(self, batch, number)

    monkeypatch.setattr(run_module.Member, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_runs(stores["float16"], tmp_path / "parts", runs, device=way[0])
    monkeypatch.setattr(run_module.Member, "step", real)
    records = train_runs(stores["float16"], tmp_path / "parts", runs, device=way[1])
    assert f"topk: device {way[0]} before, {way[1]} now: rounding will differ." in capsys.readouterr().err
    assert [record["device"] for record in records] == [way[1]] * 2
    for run in runs:
        one, other = (
            safetensors.torch.load_file(tmp_path / part / run.name / "sae_weights.safetensors")
            for part in ("whole", "parts")
        )
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-3, rtol=1e-3)


def test_choosing_a_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == available_devices()[0]
    assert [sum_dtype(torch.device(name)) for name in ("cpu", "mps")] == [torch.float64, torch.float32]
    with pytest.raises(ConfigError, match=r"Unknown device 'cdua'. Did you mean 'cuda'\?"):
        choose_device("cdua")


@pytest.mark.skipif(len(available_devices()) > 1, reason="there is a GPU")
def test_a_device_that_is_not_here_is_one_line(stores, tmp_path):
    store = str(stores["float16"].location)
    done = CliRunner().invoke(cli, ["--store", store, "--runs", str(tmp_path), "train", "--device", "cuda"])
    assert done.exit_code == 1
    assert "The device cuda is not here; there is: cpu. Give one of these (--device NAME)." in done.output


def test_the_pretended_device_notices_what_a_gpu_would():
    far, near = torch.ones(3, device=FAR), torch.ones(3)
    for mix in (
        lambda: far + near,
        lambda: near.mul_(far),
        lambda: near[torch.arange(2, device=FAR)],
        lambda: far.index_add_(0, torch.arange(3), far.clone()),
        lambda: torch.mul(near, near, out=far),
        lambda: torch.nn.functional.linear(far, torch.ones(2, 3)),
    ):
        with pytest.raises(pretend.MixedDevicesError):
            mix()
    with pytest.raises(RuntimeError, match="numpy"):
        far.numpy()
    assert (far + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0, 2.0]
    assert type(far.cpu()) is torch.Tensor
    assert near.copy_(far).tolist() == [1.0, 1.0, 1.0]
