"""One SAE trained by several processes, each on its part of every batch; their sums are those of one process.

Every process reads the same order of data and takes its share of each batch's segments, so it knows the whole batch's
lengths and documents without asking. Gradients are summed before they are clipped (tcsae.train.collectives), so the
weights stay the same in every process, bit for bit, and rank 0 writes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tcsae.shared.base.distributed import Ranks
from tcsae.shared.base.errors import ConfigError
from tcsae.train.config import TrainConfig


def check_parallel(config: TrainConfig, world: int, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError for what several processes cannot train together."""
    if torch.device(device).type == "mps":
        raise ConfigError("One run in several processes is not for mps. Give --device cpu, or train in one process.")
    if config.temporal.active and config.temporal.order == "batch":
        raise ConfigError(
            f"temporal.order='batch' pairs tokens of the whole batch, and {world} processes have a part of it each. "
            "Train in one process."
        )
    if config.data.n_segments < world:
        raise ConfigError(
            f"data.n_segments={config.data.n_segments} is less than one for each of {world} processes. Raise it, or "
            "start fewer."
        )


def deal(items: Sequence[Any], ours: Ranks) -> list[Any]:
    """This rank's share."""
    return list(items[ours.rank :: ours.world])
