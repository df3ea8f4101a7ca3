"""Which of the processes of one start this one is: torchrun's RANK and WORLD_SIZE, or the same set by any scheduler."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from tcsae.shared.base.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Ranks(NamedTuple):
    """This process's number, from 0, and how many there are; alone: 0 of 1."""

    rank: int
    world: int
    local: int
    """Number among those on this machine: which GPU is this one's."""

    @property
    def parallel(self) -> bool:
        return self.world > 1


WAIT_S = 7 * 24 * 3600.0
"""For the other processes: their SAEs may take longer."""
ALONE = Ranks(0, 1, 0)


def ranks() -> Ranks:
    """From the environment. Raises ConfigError for numbers that cannot be."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if given["RANK"] is None and given["WORLD_SIZE"] is None:
        return ALONE
    try:
        here = Ranks(int(given["RANK"] or ""), int(given["WORLD_SIZE"] or ""), int(given["LOCAL_RANK"] or 0))
    except ValueError as error:
        raise ConfigError(
            f"RANK={given['RANK']} with WORLD_SIZE={given['WORLD_SIZE']}: set both to whole numbers, or neither."
        ) from error
    if not 0 <= here.rank < here.world:
        raise ConfigError(f"RANK={here.rank}: of WORLD_SIZE={here.world}, it must be 0 to {here.world - 1}.")
    return here


def device_of(ranks: Ranks, device: "torch.device") -> "torch.device":
    """This process's own one of the GPUs, where a GPU is chosen; it is made the current one."""
    import torch

    if device.type == "cuda" and ranks.parallel:
        device = torch.device("cuda", ranks.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def has_rendezvous() -> bool:
    """Whether the processes can meet, as torchrun arranges it."""
    return "MASTER_ADDR" in os.environ


def start_group(ranks: Ranks, device: "torch.device | str" = "cpu") -> None:
    """Meet the other processes, to add up what is on `device`: by nccl on a GPU, by gloo on a CPU.

    Raises ConfigError if nothing says where to meet.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if not has_rendezvous():
        raise ConfigError(
            "One run in several processes takes a rendezvous (MASTER_ADDR, MASTER_PORT). Start it with torchrun: "
            f"torchrun --nproc-per-node {ranks.world} -m tcsae train ..."
        )
    # One group for both kinds: a chain may wait on the CPU first and add up gradients on a GPU afterwards.
    on_gpu = torch.device(device).type == "cuda" or torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "cpu:gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=WAIT_S))


def wait_for_all(ranks: Ranks) -> None:
    """Until every process is here, meeting them first if need be; nothing alone."""
    import torch.distributed as dist

    if ranks.parallel:
        start_group(ranks)
        dist.barrier()
