"""One rank of a harvest into an object store, which dies as by kill -9 at its n-th PUT of a chunk. No test itself: a
program that reads (location, config, n) as a pickle from its stdin.
"""

import itertools
import os
import pickle
import sys

from tcsae.harvest import work_stealing as several
from tcsae.harvest.run import harvest
from tcsae.shared.store import writer
from tcsae.shared.store.format import Layout
from tcsae.shared.store.places import remote


def main() -> None:
    location, config, die_at = pickle.load(sys.stdin.buffer)
    put, numbers = remote.RemoteObjects._put, itertools.count(1)

    def mortal(self, key: str, data: bytes) -> None:
        if "/activations/" in key and "/c/" in key and next(numbers) == die_at:
            os._exit(9)
        put(self, key, data)

    remote.RemoteObjects._put = mortal
    writer.layout_for = lambda recipe: Layout(sequences_per_chunk=2, chunks_per_shard=2)  # noqa: ARG005
    several.POLL_S = 0.05
    harvest(location, config)


if __name__ == "__main__":
    main()
