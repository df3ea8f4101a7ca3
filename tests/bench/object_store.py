"""Training and the bare loader from an S3 server on loopback, near and 20 ms away, against the local disk.

    python tests/bench/object_store.py [--rounds 5] [--latency 0.02] [--d-model 512]

The server (moto behind a proxy, which waits or does not) is a process of its own, on the other core if it can. The
bars: training TopK 512 -> 4096 from afar at 0.95 of its local speed, the bare loader from afar at 0.8 of that nearby.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from alternate import alternate, one_core, report
from loader import BATCH_TOKENS, synthetic_store

from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.copy import copy_store
from tcsae.shared.store.reader import Store, open_store
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer


def serve(connection: Connection, core: int, latency_s: float) -> None:
    """A child: moto behind two proxies that differ in their latency alone."""
    os.sched_setaffinity(0, {core})
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from toy_s3 import proxied, s3_server

    with s3_server() as (address, direct, faults), proxied(direct) as (near, _):
        faults.latency_s = latency_s
        connection.send((address, near))
        connection.recv()


def loading(store: Store, config: DataConfig):
    stream = iter(SegmentLoader(store, config))
    return lambda: len(next(stream).x)


def training(store: Store, config: DataConfig):
    loader = SegmentLoader(store, config)
    run = with_settings(preset("topk", store.d_model(loader.hook)), ["sae.d_sae=4096", "sae.k=32", "steps=1000000"])
    trainer = Trainer(run, loader.sample(8192), store.sequence_length)
    stream = iter(loader)

    def step() -> int:
        batch = next(stream)
        trainer.step(batch)
        return len(batch.x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--warm-up", type=float, default=20.0, metavar="SECONDS")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, cores[0], arguments.latency))
    server.start()
    far, near = ours.recv()
    one_core()
    config = DataConfig(n_segments=BATCH_TOKENS // 16, segment_length=16, skip_first=0)
    with tempfile.TemporaryDirectory() as folder:
        local = synthetic_store(Path(folder), arguments.d_model)
        os.environ["AWS_ENDPOINT_URL"] = near
        copy_store(local.location, "s3://bucket/a.zarr", lambda n: None)  # noqa: ARG005
        close = open_store("s3://bucket/a.zarr")
        os.environ["AWS_ENDPOINT_URL"] = far
        away = open_store("s3://bucket/a.zarr")
        contestants = {
            "train, local": training(local, config),
            "train, away": training(away, config),
            "load, near": loading(close, config),
            "load, away": loading(away, config),
        }
        for run in contestants.values():
            start = time.perf_counter()
            while time.perf_counter() - start < arguments.warm_up:  # it finds how many reads it takes
                run()
        times = alternate(contestants, arguments.rounds, least_s=5.0)
        times.show("token", base="load, near")
        train, load = times.ratio("train, local", "train, away"), times.ratio("load, near", "load, away")
        print(f"training from afar: {train} of the local speed; bar 0.95: {train.verdict(0.95)}")
        print(f"loader from afar: {load} of the server nearby; bar 0.8: {load.verdict(0.8)}")
        report("object_store", times, base="load, near", latency_s=arguments.latency, d_model=arguments.d_model)
    ours.send("end")
    server.join()


if __name__ == "__main__":
    main()
