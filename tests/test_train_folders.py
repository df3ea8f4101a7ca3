"""Promise: a run's folder has one writer, leftovers go, what is given beats a default, and a term that can act does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tcsae
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.commands.group import cli
from tcsae.train.checks import check_memory
from tcsae.train.command import train
from tcsae.train.log import RunLog
from tcsae.train.plan import Request, Run, plan_runs
from tcsae.train.presets import preset
from tcsae.train.record import writable_folder
from tcsae.train.run import train_runs

WIDTH, LENGTH = 8, 6
SMALL = ("sae.d_sae=32", "sae.k=3", "steps=3", "data.segment_length=6")


def make_store(path: Path, length: int = LENGTH, documents: int = 20) -> tcsae.Store:
    x = np.random.default_rng(0).normal(size=(40, length, WIDTH)).astype(np.float32)
    with tcsae.create_store(path, hooks={"h": WIDTH}, sequence_length=length) as creation:
        creation.append("train", {"h": x}, documents=np.sort(np.arange(40) % documents))
        creation.append("eval", {"h": x[:10]}, documents=100 + np.arange(10))
    return tcsae.open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tcsae.Store:
    return make_store(tmp_path_factory.mktemp("store") / "a.zarr")


def run_of(name: str = "topk", *settings: str) -> Run:
    return Run(name, name, with_settings(preset(name, WIDTH), [*SMALL, *settings]))


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_is_named(store, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from tcsae.train.record import writable_folder\n"
        f"with writable_folder(Path({str(tmp_path / 'topk')!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"another process trains this run \(process {other.pid} on"):
            train_runs(store, tmp_path, [run_of()])
        with pytest.raises(RunError, match="another process trains this run"):
            train_runs(store, tmp_path, [run_of()], fresh=True)
    finally:
        other.kill()
        other.wait()
    (record,) = train_runs(store, tmp_path, [run_of()])  # the kernel frees a dead process's lock
    assert record["finished"]
    assert not (tmp_path / "topk" / "train.lock").exists()


def test_a_finished_run_is_reused_while_its_folder_is_locked(store, tmp_path):
    train_runs(store, tmp_path, [run_of()])
    with writable_folder(tmp_path / "topk"):
        (record,) = train_runs(store, tmp_path, [run_of()])
    assert record["finished"]


def test_what_a_killed_writer_left_goes(store, tmp_path):
    folder = tmp_path / "topk"
    folder.mkdir()
    (folder / "sae_weights.safetensors.1234.partial").write_bytes(b"half")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    train_runs(store, tmp_path, [run_of("topk", "log_every=1")])
    assert not list(folder.glob("*.partial"))
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_log_that_lost_its_end_is_not_filled_with_zeros(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    log = RunLog(tmp_path / "metrics.jsonl", 500)
    log.write({"step": 2})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


OPTIONS = {"data.seed": 1, "steps": 7}


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("kind", ["settings", "sweeps"])
def test_an_option_is_no_default_that_beats_a_setting(store, key, kind):
    config = lambda request: plan_runs(store, request)[0].config  # noqa: E731
    value = lambda made: with_key(made, key)  # noqa: E731
    assert value(config(Request(["topk"], **{kind: [f"{key}=5"]}))) == 5
    assert value(config(Request(["topk"], options={key: None}, **{kind: [f"{key}=5"]}))) == 5
    assert value(config(Request(["topk"], options={key: OPTIONS[key]}))) == OPTIONS[key]
    with pytest.raises(ConfigError, match=f"{key}=5 are the same setting. Give it once"):
        plan_runs(store, Request(["topk"], options={key: OPTIONS[key]}, **{kind: [f"{key}=5"]}))


def with_key(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_every_option_that_is_a_setting_is_tested():
    """An option of `train` whose name ends a setting's is one of OPTIONS above."""
    names = {parameter.name for parameter in train.params}
    assert {key.rpartition(".")[2] for key in OPTIONS} <= names
    assert names & {"lr", "k", "d_sae", "window", "hook"} == set()


def test_an_option_beats_a_file(store, tmp_path):
    (tmp_path / "a.toml").write_text("preset = 'topk'\nsteps = 3\n[data]\nseed = 4\n")
    (run,) = plan_runs(store, Request(config_file=tmp_path / "a.toml", options={"steps": 9, "data.seed": None}))
    assert (run.config.steps, run.config.data.seed) == (9, 4)


@pytest.mark.parametrize("name", ["../topk", "/tmp/topk", "a/b", "..", ".", "a\\b"])
def test_init_from_takes_a_name_alone(store, name):
    with pytest.raises(ConfigError, match="takes the name of a run below --runs, not a path"):
        plan_runs(store, Request(["topk"], init_from=name))


@pytest.mark.parametrize(
    ("kind", "length", "skip_first", "message"),
    [
        ("difference", 3, 1, "takes 3 consecutive positions; the longest segment of .* has 2"),
        ("relative", 2, 0, "takes 3 consecutive positions; the longest segment of .* has 2"),
        ("gated", 3, 1, "takes 3 consecutive positions"),
        ("contrastive", 2, 1, "takes 2 consecutive positions; the longest segment of .* has 1"),
    ],
)
def test_a_term_that_no_batch_can_move_is_refused(tmp_path, kind, length, skip_first, message):
    short = make_store(tmp_path / "a.zarr", length=length)
    run = run_of("topk", f"temporal.kind={kind}", "temporal.weight=1", f"data.skip_first={skip_first}")
    with pytest.raises(ConfigError, match=message):
        train_runs(short, tmp_path / "runs", [run])


def test_contrast_takes_two_documents(tmp_path):
    one = make_store(tmp_path / "a.zarr", documents=1)
    with pytest.raises(ConfigError, match="contrasts documents; .* has one alone"):
        train_runs(one, tmp_path / "runs", [run_of("temporal-topk")])


@pytest.mark.parametrize(
    "setting",
    ["sae.d_sae=5G", "data.n_segments=10G", "init_seed=99999999999999999999999", "data.seed=99999999999999999999999",
     "steps=99999999999999999999999", "sae.d_sae=99999999999999999999999", "sae.d_model=7", "temporal.weight=inf",
     "optimizer.lr=inf", "guard.explode=nan"],
)  # fmt: skip
def test_settings_beyond_any_machine_are_one_line_and_leave_nothing(store, tmp_path, setting):
    arguments = ["--store", store.location, "--runs", str(tmp_path / "runs"), "train", "--preset", "topk"]
    done = CliRunner().invoke(cli, [*arguments, "--set", setting])
    assert (done.exit_code, len(done.output.strip().splitlines())) == (1, 1), done.output
    assert done.output.startswith("Error: ") and setting.partition("=")[0] in done.output
    assert not (tmp_path / "runs").exists()


def test_memory_is_named_before_it_is_taken(store):
    import torch

    config = with_settings(preset("topk", WIDTH), ["sae.d_sae=1G"])
    with pytest.raises(ConfigError, match=r"sae.d_sae=1000000000 on batches .* takes some .*B of memory; cpu has"):
        check_memory(store, [config], torch.device("cpu"))
    check_memory(store, [with_settings(preset("topk", WIDTH), [])], torch.device("cpu"))


def test_segments_left_out_by_norm(tmp_path):
    x = np.ones((40, LENGTH, WIDTH), np.float32)
    x[::3, 2] = 500.0
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"h": WIDTH}, sequence_length=LENGTH) as creation:
        creation.append("train", {"h": x})
        creation.append("eval", {"h": x[:4]})
    batches = tcsae.iterate_segments(
        tcsae.open_store(tmp_path / "a.zarr"), n_segments=9, segment_length=3, max_norm=9.0
    )
    counts = set()
    for _, (values, valid) in zip(range(12), batches, strict=False):
        assert len(values) == len(valid)
        assert values[valid].max() == 1.0
        counts.add(int(valid.sum()))
    assert len(counts) > 1
