"""Promise: each process has a GPU of its own or is refused, and who waits for others that do not come says so."""

import re
import socket

import pytest
import torch

import tcsae.shared.base.distributed as distributed
from tcsae.shared.base.distributed import Ranks, device_of, ranks, start_group
from tcsae.shared.base.errors import ConfigError, RunError


@pytest.mark.parametrize(
    ("environment", "local"),
    [
        ({"LOCAL_RANK": "2"}, 2),
        ({"SLURM_LOCALID": "3"}, 3),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1),  # torchrun inside a Slurm task
        ({}, None),
    ],
)
def test_the_number_on_a_machine_is_torchrun_s_or_slurm_s(monkeypatch, environment, local):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", **environment}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(5, 8, local)


def test_a_number_that_is_none_is_one_line(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "first"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=first: .* \(or SLURM_LOCALID\) to one"):
        ranks()


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, as far as counting goes."""

    def machine(n: int) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(distributed, "_gpu", [])
        return current

    return machine


@pytest.mark.parametrize(("local", "n", "index"), [(0, 4, 0), (3, 4, 3), (5, 4, 1), (None, 1, 0), (1, 1, 0)])
def test_each_process_has_its_own_gpu(gpus, local, n, index):
    current = gpus(n)
    device = device_of(Ranks(6, 8, local), torch.device("cuda"))
    assert device == current[-1] == distributed._gpu[-1] == torch.device("cuda", index)


def test_never_the_first_gpu_for_all(gpus):
    gpus(4)
    with pytest.raises(ConfigError, match=r"neither LOCAL_RANK nor SLURM_LOCALID .* of the 4 GPUs"):
        device_of(Ranks(1, 8, None), torch.device("cuda"))
    assert device_of(Ranks(1, 8, None), torch.device("cpu")) == torch.device("cpu")


def test_who_waits_in_vain_says_so_after_minutes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(distributed, "MEET_S", 0.6)
    line = f"Rank 1 of 2 waited 0.01 minutes at 127.0.0.1:{port}, and not all came ("
    with pytest.raises(RunError, match=re.escape(line)):
        start_group(Ranks(1, 2, 1))
