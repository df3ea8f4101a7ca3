"""Which of several processes this one is: torchrun's RANK and WORLD_SIZE, or the same set by any scheduler."""

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
    """Number among those on this machine: which GPU is ours."""

    @property
    def several(self) -> bool:
        return self.world > 1


WAIT_S = 7 * 24 * 3600.0
"""For the other processes: their SAEs may take longer."""
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


def device_of(ours: Ranks, device: "torch.device") -> "torch.device":
    """This process's own one of the GPUs, where a GPU is chosen; it is made the current one."""
    import torch

    if device.type == "cuda" and ours.several:
        device = torch.device("cuda", ours.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def has_rendezvous() -> bool:
    """Whether the processes can meet, as torchrun arranges it."""
    return "MASTER_ADDR" in os.environ


def start_group(ours: Ranks, device: "torch.device | str" = "cpu") -> None:
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
            f"torchrun --nproc-per-node {ours.world} -m tcsae train ..."
        )
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "cpu:gloo"
    dist.init_process_group(backend, rank=ours.rank, world_size=ours.world, timeout=timedelta(seconds=WAIT_S))


def wait_for_all(ours: Ranks) -> None:
    """Until every process is here, meeting them first if need be; nothing alone."""
    import torch.distributed as dist

    if ours.several:
        start_group(ours)
        dist.barrier()
