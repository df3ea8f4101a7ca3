"""Promise: `eval` in several processes prints what one process prints."""

import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from click.testing import CliRunner

from tcsae.shared.cli import cli

spec = importlib.util.spec_from_file_location("toy_eval", Path(__file__).parent / "toy_eval.py")
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_eval"] = toy
spec.loader.exec_module(toy)


def test_two_processes_write_the_figures_of_one(tmp_path):
    store = toy.write_store(tmp_path / "a.zarr", toy.make_model(), toy.N_SEQUENCES)
    for i in range(3):
        toy.make_run(tmp_path / "alone", f"run{i}", toy.make_sae(seed=i), store)
    shutil.copytree(tmp_path / "alone", tmp_path / "dealt")
    done = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path / "alone"), "eval"])
    assert done.exit_code == 0, done.output
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
                said = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path / "dealt"), "eval"])
                (tmp_path / f"out{rank}").write_text(said.stdout)
                code = said.exit_code
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert (tmp_path / "out1").read_text() == ""
    assert "run0" in (tmp_path / "out0").read_text()
    assert "run2" in (tmp_path / "out0").read_text()
    for i in range(3):
        ours, theirs = (
            json.loads((tmp_path / name / f"run{i}" / "eval.json").read_text()) for name in ("dealt", "alone")
        )
        assert ours["metrics"] == theirs["metrics"]
        assert ours["temporal"] == theirs["temporal"]
