"""Seconds of one training step, ours and the peers', on the same arrays, on one core.

    peers/bin/python tests/bench/peers_step.py            # the environment: see peers.py beside this file

Each contestant does its library's own full step: forward, backward, clipping, optimiser, schedule, counters. TopK and
BatchTopK are held against one encoder matmul and torch.topk, ReLU with L1 against the five bare matmuls of a dense
step. First with malloc as it is, then with `mallopt` for everybody: it speeds the peers up more than us.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from alternate import alternate, one_core, report, tune_malloc
from peers import Shape, dictionary_settings, saelens_trainer, sparsify_step, versions
from torch import Tensor
from torch.nn import functional as F

N = 4096
BASES = {"topk": "encoder matmul + topk", "batchtopk": "encoder matmul + topk", "relu": "five matmuls"}


def activations(d_model: int, n_batches: int = 4) -> list[Tensor]:
    """Sparse mixtures of 2048 directions with some noise: an SAE has something to learn."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(2048, d_model), dim=1)
    result = []
    for _ in range(n_batches):
        weights = torch.zeros(N, 2048).scatter_(1, torch.randint(0, 2048, (N, 24)), 2 * torch.rand(N, 24))
        result.append(weights @ directions + 0.02 * torch.randn(N, d_model))
    return result


def counted(step: Callable[[], object]) -> Callable[[], int]:
    def run() -> int:
        step()
        return N

    return run


def bare(shape: Shape, x: Tensor) -> dict[str, Callable[[], object]]:
    """The yardsticks, with buffers made once."""
    W_enc = torch.randn(shape.d_sae, shape.d_model) / shape.d_model**0.5
    W_dec, b_enc = W_enc.clone(), torch.zeros(shape.d_sae)
    code, grad, out = torch.empty(N, shape.d_sae), torch.empty(N, shape.d_sae), torch.empty(N, shape.d_model)
    grad_enc, grad_dec = torch.empty_like(W_enc), torch.empty_like(W_dec)

    def matmul_and_topk() -> object:
        torch.addmm(b_enc, x, W_enc.T, out=code)
        return code.topk(shape.k, dim=-1, sorted=False)

    def five_matmuls() -> None:
        torch.mm(x, W_enc.T, out=code)
        torch.mm(code, W_dec, out=out)
        torch.mm(code.T, out, out=grad_dec)
        torch.mm(out, W_dec.T, out=grad)
        torch.mm(grad.T, x, out=grad_enc)

    return {"encoder matmul + topk": matmul_and_topk, "five matmuls": five_matmuls}


def ours(activation: str, shape: Shape, batches: list[Tensor]) -> Callable[[], object]:
    """Trainer.step of our preset."""
    import numpy as np

    from tcsae.shared.base.settings import with_settings
    from tcsae.train.batch import Batch
    from tcsae.train.presets import preset
    from tcsae.train.trainer import Trainer

    name = {"relu": "relu-l1"}.get(activation, activation)
    settings = [f"sae.d_sae={shape.d_sae}", f"sae.k={shape.k}", "steps=100000"]
    trainer = Trainer(with_settings(preset(name, shape.d_model), settings), batches[0])
    lengths = np.full(N // 16, 16)
    stream = cycle([Batch(x, lengths, np.ones_like(lengths), np.arange(N // 16)) for x in batches])
    return lambda: trainer.step(next(stream))


def saelens(activation: str, shape: Shape, batches: list[Tensor], **sae: Any) -> Callable[[], object]:
    data: Iterator[Tensor] = cycle(batches)
    settings = {"total_training_samples": 10**9, "train_batch_size_samples": N, "lr_end": 3e-5}
    trainer = saelens_trainer(activation, shape, data, sae=sae, **settings)

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(next(data))
        trainer.n_training_steps += 1

    return step


def dictionary_learning(activation: str, shape: Shape, batches: list[Tensor]) -> Callable[[], object]:
    settings = dictionary_settings(activation, shape, steps=100_000)
    trainer, data = settings.pop("trainer")(**settings), enumerate(cycle(batches))
    return lambda: trainer.update(*next(data))


def contestants(activation: str, shape: Shape) -> dict[str, Callable[[], int]]:
    """The yardstick, ours, and each peer that has this activation."""
    batches = activations(shape.d_model)
    base = BASES[activation]
    steps = {
        base: bare(shape, batches[0])[base],
        "tcsae": ours(activation, shape, batches),
        "SAELens": saelens(activation, shape, batches),
        "dictionary_learning": dictionary_learning(activation, shape, batches),
    }
    if activation == "topk":
        # Its rescale_acts_by_decoder_norm, on by default, does not run on sparse activations on a CPU.
        sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        steps["SAELens, sparse activations"] = saelens(activation, shape, batches, **sparse)
        for optimizer in ("signum", "adam"):
            step, data = sparsify_step(shape, optimizer), cycle(batches)
            steps[f"sparsify, {optimizer}"] = lambda step=step, data=data: step(next(data))
    return {name: counted(step) for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activations", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--d-sae", type=int, default=4096)
    asked = parser.parse_args()
    one_core()
    shape = Shape(512, asked.d_sae, 32)
    figures: dict[str, Any] = {}
    for malloc in ("plain", "tuned"):
        if malloc == "tuned":
            tune_malloc()
        for activation in asked.activations:
            print(f"\n{activation}, d_model {shape.d_model}, d_sae {shape.d_sae}, k {shape.k}, malloc {malloc}")
            times = alternate(contestants(activation, shape), asked.rounds)
            times.show("token", BASES[activation])
            figures[f"{activation}, {malloc}"] = times.figures(BASES[activation])
    report("peers_step", batch=N, shape=shape._asdict(), rounds=asked.rounds, versions=versions(), figures=figures)


if __name__ == "__main__":
    main()
