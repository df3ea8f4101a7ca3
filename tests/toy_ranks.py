"""Several processes of one test, which meet as torchrun's do."""

import os
import socket
import traceback
from collections.abc import Callable

import torch

from tcsae.shared.base.distributed import Ranks


def fork(world: int, do: Callable[[Ranks], object]) -> None:
    """Fork ranks of one thread that each `do(ranks)`, and wait for them: all have to end well."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
                torch.set_num_threads(1)
                do(Ranks(rank, world, rank))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * world
