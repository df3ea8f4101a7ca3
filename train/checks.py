"""What cannot be trained is refused here, before anything is allocated: too much for the memory, or what several
processes (tcsae.train.collectives) cannot train as one.
"""

import os
from collections.abc import Sequence

import torch

from tcsae.shared.base.console import size
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.sae.layout import SaeConfig
from tcsae.shared.store.reader import Store
from tcsae.train.config import TrainConfig
from tcsae.train.settings.temporal_settings import CONTRASTIVE

FLOAT_BYTES = 4


def memory_bytes(configs: Sequence[TrainConfig]) -> int:
    """Bytes of runs that share a pass: weights, gradients and two moments of each; of the largest, the pre-activations
    of a batch and what a step makes of them, and a contrastive term's scores of all pairs; the batch.
    """
    weights = sum(_n_weights(config.sae) for config in configs)
    tokens = [config.data.n_segments * config.data.segment_length for config in configs]
    codes = max(
        (n // config.sae.window * config.sae.d_sae for n, config in zip(tokens, configs, strict=True)), default=0
    )
    batch = max((n * config.sae.d_model for n, config in zip(tokens, configs, strict=True)), default=0)
    pairs = max((_n_pairs(config) ** 2 for config in configs), default=0)
    attention = 12 * codes if any(config.sae.attends for config in configs) else 0
    return FLOAT_BYTES * (4 * weights + 4 * codes + 6 * batch + 6 * pairs + attention)


def _n_weights(sae: SaeConfig) -> int:
    if not sae.attends:
        return 2 * sae.d_sae * sae.d_in + 3 * sae.d_sae
    return sae.d_sae * sae.d_model + sae.n_layers * 2 * (sae.d_sae**2 // sae.bottleneck + sae.d_sae**2)


def _n_pairs(config: TrainConfig) -> int:
    """Pairs of a batch that a contrastive term compares with each other."""
    temporal, data = config.temporal, config.data
    if not temporal.active or temporal.kind not in CONTRASTIVE:
        return 0
    apart = temporal.contrast.gap if "gap" in CONTRASTIVE[temporal.kind] else 1
    fitting = -(-data.segment_length // apart)
    return data.n_segments * min(fitting, temporal.pairs_per_segment or fitting)


def check_memory(store: Store, configs: Sequence[TrainConfig], device: torch.device) -> None:
    """Raises ConfigError, naming the setting to lower, for runs that take more memory than there is."""
    if not configs or not (there := _memory(device)):
        return
    needed = max(memory_bytes([one for one in configs if one.data == config.data]) for config in configs)
    if needed <= there:
        return
    largest = max(configs, key=lambda config: memory_bytes([config]))
    data, sae = largest.data, largest.sae
    raise ConfigError(
        f"sae.d_sae={sae.d_sae} on batches of data.n_segments={data.n_segments} times data.segment_length="
        f"{data.segment_length} tokens of width {sae.d_model}, {len(configs)} run(s), takes some {size(needed)} of "
        f"memory; {device.type} has {size(there)} ({store.location}). Lower one of them, or train fewer at once."
    )


def _memory(device: torch.device) -> int:
    """All memory of the device in bytes, 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_compile(configs: Sequence[TrainConfig], world: int) -> None:
    """Raises ConfigError for what --compile cannot make one graph."""
    for config in configs:
        what, why = "", ""
        if config.sae.predictor != "none":
            what, why = f"sae.predictor={config.sae.predictor!r}", "its passes over sequences follow their lengths"
        elif config.temporal.budget:
            what, why = f"temporal.budget={config.temporal.budget:g}", "it takes gradients in the middle of a step"
        elif world > 1:
            what, why = f"{world} processes", "they meet in the middle of a step"
        if what:
            raise ConfigError(f"--compile with {what}: {why}, which is no single graph. Leave --compile away.")


def check_parallel(config: TrainConfig, world: int, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError for what several processes cannot train together."""
    if torch.device(device).type == "mps":
        raise ConfigError("One run in several processes is not for mps. Give --device cpu, or train in one process.")
    reads_order = config.temporal.active or config.sae.reads_neighbours
    if reads_order and config.temporal.order in ("batch", "document"):
        raise ConfigError(
            f"temporal.order={config.temporal.order!r} pairs tokens of the whole batch, and {world} processes have a "
            "part of it each. Train in one process."
        )
    if config.data.n_segments < world:
        raise ConfigError(
            f"data.n_segments={config.data.n_segments} is less than one for each of {world} processes. Raise it, or "
            "start fewer."
        )
