"""Which of the processes of one start this one is: torchrun's RANK and WORLD_SIZE, or the same set by any scheduler."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from tcsae.shared.base.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch


class Ranks(NamedTuple):
    """This process's number, from 0, and how many there are; alone: 0 of 1."""

    rank: int
    world: int
    local: int | None
    """Number among those on this machine: which GPU is this one's. None: nothing says."""

    @property
    def parallel(self) -> bool:
        return self.world > 1


WAIT_S = 7 * 24 * 3600.0
"""For the other processes to have done theirs: their SAEs may take longer."""
MEET_S = 600.0
"""For the others to come, and for a sum that all are at work on: who is not there in minutes is dead."""
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""What says which of a machine's processes this is: torchrun's name for it, and Slurm's."""
ALONE = Ranks(0, 1, 0)


def ranks() -> Ranks:
    """From the environment. Raises ConfigError for numbers that cannot be."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    local = next((value for name in LOCAL_RANKS if (value := os.environ.get(name)) is not None), None)
    if given["RANK"] is None and given["WORLD_SIZE"] is None:
        return ALONE
    try:
        here = Ranks(int(given["RANK"] or ""), int(given["WORLD_SIZE"] or ""), None if local is None else int(local))
    except ValueError as error:
        raise ConfigError(
            f"RANK={given['RANK']} with WORLD_SIZE={given['WORLD_SIZE']} and LOCAL_RANK={local}: set the first two to "
            "whole numbers, or neither; the third (or SLURM_LOCALID) to one, or leave it out."
        ) from error
    if not 0 <= here.rank < here.world:
        raise ConfigError(f"RANK={here.rank}: of WORLD_SIZE={here.world}, it must be 0 to {here.world - 1}.")
    return here


def device_of(ranks: Ranks, device: "torch.device") -> "torch.device":
    """This process's own one of the GPUs, where a GPU is chosen; it is made the current one.

    Raises ConfigError if nothing says which, where the machine has several: all would share the first.
    """
    import torch

    if device.type == "cuda" and ranks.parallel:
        n = torch.cuda.device_count()
        if ranks.local is None and n > 1:
            raise ConfigError(
                f"Rank {ranks.rank} of {ranks.world}: neither LOCAL_RANK nor SLURM_LOCALID says which of the {n} GPUs "
                "here is its own. Start with torchrun or srun, set LOCAL_RANK, or let CUDA_VISIBLE_DEVICES show one."
            )
        device = torch.device("cuda", (ranks.local or 0) % n)
        torch.cuda.set_device(device)
        _gpu.append(device)
    return device


_gpu: list["torch.device"] = []
"""This process's, once chosen: a group that is met later, on whatever account, is bound to it."""


def has_rendezvous() -> bool:
    """Whether the processes can meet, as torchrun arranges it."""
    return "MASTER_ADDR" in os.environ


def start_group(ranks: Ranks, device: "torch.device | str" = "cpu") -> None:
    """Meet the other processes, to add up what is on `device`: by nccl on a GPU, by gloo on a CPU.

    The group is bound to the GPU that `device_of` chose. Raises ConfigError if nothing says where to meet, RunError if
    the others are not there within MEET_S.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if not has_rendezvous():
        raise ConfigError(
            "Processes that wait for each other need a rendezvous (MASTER_ADDR, MASTER_PORT). Start them by torchrun: "
            f"torchrun --nproc-per-node {ranks.world} -m tcsae ..."
        )
    # One group for both kinds: a chain may wait on the CPU first and add up gradients on a GPU afterwards.
    on_gpu = torch.device(device).type == "cuda" or torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "cpu:gloo"
    bound, minutes = (_gpu[-1] if _gpu else None), timedelta(seconds=MEET_S)
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=minutes, device_id=bound)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RunError(
            f"Rank {ranks.rank} of {ranks.world} waited {MEET_S / 60:g} minutes at {os.environ['MASTER_ADDR']}:"
            f"{os.environ.get('MASTER_PORT')}, and not all came ({str(error).splitlines()[0]:.120}). Start "
            f"{ranks.world} processes with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE."
        ) from error
    _patient.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_S)))


_patient: list["torch.distributed.ProcessGroup"] = []
"""The group in which processes wait for each other's work."""


def wait_for_all(ranks: Ranks) -> None:
    """Until every process is here, meeting them first if need be; nothing alone."""
    import torch.distributed as dist

    if ranks.parallel:
        start_group(ranks)
        dist.barrier(group=_patient[-1])
