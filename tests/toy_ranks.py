"""Processes of one test, which meet as torchrun's do."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import dill
import multiprocess
import torch

from tcsae.shared.base.distributed import Ranks

ROOT = Path(__file__).parents[1]
PRELOADED = ["tcsae.train.run", "tcsae.train.presets", "torch.distributed.nn.functional", "beartype", "pytest"]


def fork(world: int, do: Callable[[Ranks], object]) -> None:
    """Fork ranks of one thread that each `do(ranks)`, and wait for them: all have to end well.

    They have what the test patched, but cannot run a backward pass where this process has run one: see `spawn`.
    """
    port, pids = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(rank, world, port, do))
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * world


def spawn(world: int, do: Callable[[Ranks], object]) -> None:
    """As `fork`, from a process that has run nothing: autograd's threads survive no fork."""
    context = multiprocess.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, pickled = free_port(), dill.dumps(do)
    ranks = [context.Process(target=run_pickled, args=(rank, world, port, pickled)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def run_pickled(rank: int, world: int, port: int, pickled: bytes) -> None:
    sys.path.insert(0, str(ROOT))  # pickled functions are of modules `tests.test_...`
    os._exit(run_rank(rank, world, port, lambda ranks: dill.loads(pickled)(ranks)))


def run_rank(rank: int, world: int, port: int, do: Callable[[Ranks], object]) -> int:
    """The exit code of one rank."""
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        torch.set_num_threads(1)
        do(Ranks(rank, world, rank))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
