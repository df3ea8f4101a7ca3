"""One SAE trained by several processes, each on its part of every batch; their sums are those of one process.

Every process reads the same order of data and takes its share of each batch's segments, so it knows the whole batch's
lengths and documents without asking. Losses are means over the whole batch, for which each adds up its own tokens'
share (tcsae.train.adder); gradients are added up before they are clipped. The weights therefore stay the same in every
process, bit for bit, and rank 0 writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tcsae.shared.base.distributed import ALONE, Ranks
from tcsae.shared.base.errors import ConfigError
from tcsae.train.adder import Adder, adder_of
from tcsae.train.config import TrainConfig


@dataclass(frozen=True)
class Peers:
    """The processes that train one SAE together; alone by default."""

    ranks: Ranks = ALONE

    @property
    def writes(self) -> bool:
        """Whether this one writes checkpoints, metrics and the SAE."""
        return self.ranks.rank == 0

    @property
    def adder(self) -> Adder:
        return adder_of(self.ranks)

    def wait(self) -> None:
        """Until all are here."""
        if self.ranks.several:
            dist.barrier()


NO_PEERS = Peers()


def check_parallel(config: TrainConfig, world: int, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError for what several processes cannot train together."""
    if torch.device(device).type == "mps":
        raise ConfigError("One run in several processes is not for mps. Give --device cpu, or train in one process.")
    if config.optimizer.gradients == "autograd":
        raise ConfigError(
            f"optimizer.gradients='autograd' is for one process, this start has {world}. Leave it at 'written', or "
            "train in one process."
        )
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
