"""Steps of trainers as they are and compiled, as far as a machine without a GPU can stand for one: static shapes, and
AOTAutograd's graphs run as they are. Prints JSON. No test itself; test_compile.py runs it.
"""

import json
import sys

import numpy as np
import torch
from torch._dynamo.utils import counters

import tcsae.shared.base.device as device_module
import tcsae.train.trainer as trainer_module
from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch
from tcsae.train.presets import preset

WIDTH, LENGTH = 8, 6


def batch(n_segments: int, seed: int) -> Batch:
    x = torch.randn(LENGTH * n_segments, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.5
    lengths, documents = np.full(n_segments, LENGTH), np.arange(n_segments) // 2
    return Batch(x, lengths, np.zeros(n_segments, np.int64), documents)


def trainer(name: str, settings: list[str], backend: str) -> trainer_module.Trainer:
    device_module._backend[-1] = backend
    small = ["sae.d_sae=64", "sae.k=3", f"data.segment_length={LENGTH}", "steps=100", *settings]
    config = with_settings(preset(name, WIDTH), small)
    first = batch(8, 0)
    sample = first.x if config.sae.window == 1 else first.windows(config.sae.window, 0).x
    return trainer_module.Trainer(config, sample, n_positions=LENGTH)


def largest_difference(name: str, settings: list[str]) -> float:
    """Of the weights, after steps on batches of several lengths."""
    plain, graph = (trainer(name, settings, backend) for backend in ("", "aot_eager"))
    for seed, n_segments in enumerate((8, 7, 5)):
        for one in (plain, graph):
            one.step(batch(n_segments, seed))
    pairs = zip(plain.parameters, graph.parameters, strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def breaks_where_values_decide() -> bool:
    device_module._backend[-1] = "aot_eager"
    try:
        device_module.compiled(lambda x: x if x.sum() > 0 else -x)(torch.ones(3))
    except torch._dynamo.exc.Unsupported:
        return True
    return False


def main() -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("tcsae.") and hasattr(module, "static_shapes"):
            module.static_shapes = lambda _: True
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    largest = {name: largest_difference(name, settings) for name, settings in json.loads(sys.argv[1]).items()}
    n_breaks, n_graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    print(
        json.dumps({"largest": largest, "breaks": n_breaks, "graphs": n_graphs, "broken": breaks_where_values_decide()})
    )


if __name__ == "__main__":
    main()
