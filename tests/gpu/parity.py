"""What a GPU computes against what the CPU does: losses, weights after some steps, figures of `eval`, activations."""

from pathlib import Path

import figures
import numpy as np
import torch

from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.run import evaluate_runs
from tcsae.harvest.capture import Capture
from tcsae.harvest.language_model import find_model
from tcsae.shared.base.settings import with_settings
from tcsae.train.plan import Run
from tcsae.train.presets import PRESETS, preset
from tcsae.train.run import train_runs
from tcsae.train.settings.temporal_settings import CONTRASTIVE
from tcsae.train.trainer import Trainer

COLUMNS = ("what", "largest difference", "allowed", "same")
LOSSES, WEIGHTS, FIGURES, ACTIVATIONS = 1e-4, 2e-3, 1e-3, 1e-3
"""Relative to the largest value of its kind; activations are of one language model in float32."""
STEPS = 10


def row(what: str, difference: float, allowed: float) -> tuple:
    return what, difference, allowed, "yes" if difference <= allowed else "NO"


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def rows(device: torch.device, size: "figures.Sizes", folder: Path) -> list[tuple]:
    trained = [name for name in PRESETS if not name.startswith("logged-") and not name.endswith("-shuffled")]
    result = [_step(device, size, name) for name in trained]
    result += [_weights(device, size, name) for name in ("topk", "relu-l1", "written-run3")]
    result.append(_evaluation(device, size, folder))
    return [*result, _harvest(device, size)]


def _config(size: "figures.Sizes", name: str):
    width = size.widths[0]
    latents = (f"sae.d_sae={size.latents[0]}", f"sae.k={min(32, size.latents[0] // 8)}")
    read = CONTRASTIVE.get(preset(name, width).temporal.kind, ())
    pairs = [f"temporal.contrast.{key}={value}" for key, value in (("gap", 2), ("distance", 3)) if key in read]
    return with_settings(preset(name, width), [*latents, *pairs, "steps=1000", "data.segment_length=16"])


def _step(device: torch.device, size: "figures.Sizes", name: str) -> tuple:
    losses = []
    for where in (torch.device("cpu"), device):
        (batch,) = figures.batches(size.widths[0], size.parity_tokens, where, 1)
        config = _config(size, name)
        sample = batch.x if config.sae.window == 1 else batch.windows(config.sae.window, 0).x
        trainer = Trainer(config, sample)
        losses.append(trainer.gradients(batch).losses)
    worst = max(abs(losses[1][key] - value) / max(abs(value), 1e-6) for key, value in losses[0].items())
    return row(f"losses of a step, {name}", worst, LOSSES)


def _weights(device: torch.device, size: "figures.Sizes", name: str) -> tuple:
    saes = []
    for where in (torch.device("cpu"), device):
        data = figures.batches(size.widths[0], size.parity_tokens, where, 2)
        trainer = Trainer(_config(size, name), data[0].x)
        for i in range(STEPS):
            trainer.step(data[i % 2])
        trainer.settle()
        saes.append(trainer.finished_sae())
    return row(f"W_dec after {STEPS} steps, {name}", apart(saes[1].W_dec, saes[0].W_dec), WEIGHTS)


def _evaluation(device: torch.device, size: "figures.Sizes", folder: Path) -> tuple:
    store = figures.store(folder, size, size.widths[0])
    config = with_settings(_config(size, "topk"), ["steps=20", "data.n_segments=16", "data.skip_first=0"])
    result = []
    for where in (torch.device("cpu"), device):
        runs = folder / f"parity-{where.type}"
        if not (runs / "topk").exists():
            train_runs(store, runs, [Run("topk", "topk", config)])
        request = EvalRequest(names=("topk",), force=True)
        (evaluation,) = evaluate_runs(store, runs, request, device=where).evaluations
        result.append({key: value for key, value in evaluation["metrics"].items() if value is not None})
    worst = max(abs(result[1][key] - value) / max(abs(value), 1e-3) for key, value in result[0].items())
    return row("figures of eval, topk", worst, FIGURES)


def _harvest(device: torch.device, size: "figures.Sizes") -> tuple:
    tokens = np.random.default_rng(0).integers(0, 4096, (size.sequences, 128)).astype(np.int32)
    lengths = np.random.default_rng(1).integers(3, 129, size.sequences)
    result = []
    for where in ("cpu", device.type):
        capture = Capture(find_model("embedded"), ["blocks.4.hook_resid_post"], 32, where)
        x = capture.run(tokens, lengths)["blocks.4.hook_resid_post"]
        result.append(torch.from_numpy(x[np.arange(128) < lengths[:, None]]))
    equal = float((result[0].half() == result[1].half()).double().mean())
    what, *rest = row("activations of the embedded model", apart(result[1], result[0]), ACTIVATIONS)
    return (f"{what} ({equal:.0%} equal as stored)", *rest)
