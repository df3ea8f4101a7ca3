"""Which of several processes this one is: torchrun's RANK and WORLD_SIZE, or the same set by any scheduler."""

import os
from typing import NamedTuple

from tcsae.shared.errors import ConfigError


class Ranks(NamedTuple):
    """This process's number, from 0, and how many there are; alone: 0 of 1."""

    rank: int
    world: int
    local: int
    """Number among those on this machine: which GPU is ours."""

    @property
    def several(self) -> bool:
        return self.world > 1


ALONE = Ranks(0, 1, 0)


def ranks() -> Ranks:
    """From the environment. Raises ConfigError for numbers that cannot be."""
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if told["RANK"] is None and told["WORLD_SIZE"] is None:
        return ALONE
    try:
        found = Ranks(int(told["RANK"] or ""), int(told["WORLD_SIZE"] or ""), int(told["LOCAL_RANK"] or 0))
    except ValueError as error:
        raise ConfigError(
            f"RANK={told['RANK']} with WORLD_SIZE={told['WORLD_SIZE']}: set both to whole numbers, or neither."
        ) from error
    if not 0 <= found.rank < found.world:
        raise ConfigError(f"RANK={found.rank}: of WORLD_SIZE={found.world}, it must be 0 to {found.world - 1}.")
    return found
