"""Promise: the commands are Python functions with the same settings and the same results, which raise our errors."""

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tcsae
from tcsae.api.keywords import options_of
from tcsae.shared.commands.group import cli
from tcsae.train.command import train as train_command

SMALL = {"sae.d_sae": 48, "sae.k": 4, "data.n_segments": 4, "data.segment_length": 16, "log_every": 1}


@pytest.fixture(scope="module")
def made(tiny_store, tmp_path_factory):
    """Two runs and their evaluation, by functions."""
    runs_path = tmp_path_factory.mktemp("runs") / "runs"
    hook = "blocks.2.hook_resid_post"
    settings = SMALL | {"data.hook": hook}
    runs = tcsae.train(tiny_store, runs_path, preset=["topk", "relu-l1"], set=settings, steps=4)
    return tcsae.open_store(tiny_store), runs, tcsae.evaluate(tiny_store, runs, temporal=False)


@pytest.mark.slow
def test_runs_and_figures_are_those_of_the_commands(made, tmp_path):
    store, runs, evaluation = made
    options = [f"--set={key}={value}" for key, value in SMALL.items()] + ["--set=data.hook=blocks.2.hook_resid_post"]
    place = ["--store", store.location, "--runs", str(tmp_path)]
    done = CliRunner().invoke(
        cli,
        [*place, "train", "--preset=topk", "--preset=relu-l1", "--steps=4", *options, "eval", "--no-temporal"],
    )
    assert done.exit_code == 0, done.output
    for run in runs:
        theirs = json.loads((tmp_path / run.name / "eval.json").read_text())
        assert theirs["weights"] == evaluation[run.name]["weights"]
        assert theirs["metrics"] == evaluation[run.name]["metrics"]


def test_runs_by_place_and_name_and_as_tables(made):
    _, runs, _ = made
    assert runs[runs[0].name] is runs[0]
    assert [run.record["preset"] for run in runs] == ["topk", "relu-l1"]
    assert runs[0].sae.config.d_sae == 48
    assert runs[0].to_pandas().index.tolist() == [1, 2, 3, 4]
    table = runs.to_pandas()
    assert table.index.tolist() == [run.name for run in runs]
    assert table.loc[runs[0].name, "latents"] == 48
    assert table.loc[runs[0].name, "explained_variance"] == runs[0].to_pandas()["explained_variance"].iloc[-1]
    assert runs[0].name in runs._repr_html_() and "48 latents, 4 steps" in repr(runs[0])
    with pytest.raises(tcsae.RunError, match="Unknown run 'tokp'"):
        runs["tokp"]


def test_an_evaluation_as_a_table(made):
    _, runs, evaluation = made
    table = evaluation.to_pandas(intervals=True)
    assert table.index.tolist() == [run.name for run in runs]
    for name, one in evaluation.items():
        assert table.loc[name, "explained_variance"] == one["metrics"]["explained_variance"]
    assert {"ce_loss_score", "l0"} <= set(table)
    assert "explained_variance" in evaluation._repr_html_()
    with pytest.raises(tcsae.RunError, match="Unknown evaluation"):
        evaluation["x"]


@pytest.mark.slow
def test_a_report(made, tmp_path):
    store, runs, _ = made
    report = tcsae.report(store, runs[:1], out=tmp_path / "report")
    assert report.page.is_file() and report.included == (runs[0].name,) and report.is_new
    assert not tcsae.report(store, runs[0], out=tmp_path / "report").is_new
    assert str(report.page) in report._repr_html_()


def test_a_config_in_place_of_presets(made, tmp_path):
    store, _, _ = made
    sae = tcsae.SaeConfig(d_model=16, d_sae=32, k=3)
    runs = tcsae.train(store, tmp_path / "runs", config={"mine": tcsae.TrainConfig(sae=sae, steps=2)})
    assert (runs[0].name, runs[0].sae.config) == ("mine", sae)
    wrong = tcsae.TrainConfig(sae=tcsae.SaeConfig(d_model=17))
    for config, more, message in (
        ({"a": wrong}, {}, "a: sae.d_model=17, but the store's activations are 16 wide"),
        ({"a/b": wrong}, {}, "takes the name of a run"),
        (wrong, {"steps": 3}, "steps and config=TrainConfig"),
        (wrong, {"positions": ["assistant"]}, "positions and config=TrainConfig"),
        ({"a": 3}, {}, "a TOML file, a TrainConfig, or a dictionary"),
    ):
        with pytest.raises(tcsae.ConfigError, match=message):
            tcsae.train(store, tmp_path / "runs", config=config, **more)


@pytest.mark.slow
def test_harvest_makes_and_reuses_a_store(tiny_lm, tiny_corpus, tmp_path):
    settings = {"model": tiny_lm, "dataset": tiny_corpus, "hook": "blocks.1.hook_resid_post", "sequence_length": 32}
    plan = tcsae.harvest(tmp_path / "a.zarr", tokens="1K", dry_run=True, **settings)
    assert plan.tokens["train"] > 0
    store = tcsae.harvest(tmp_path / "a.zarr", tokens=1000, **settings)
    assert isinstance(store, tcsae.Store) and store.hooks == ("blocks.1.hook_resid_post",)
    assert tcsae.harvest(store, tokens="1K", **settings).content == store.content


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: tcsae.train("nowhere.zarr"), tcsae.StoreError, "No activation store at nowhere.zarr"),
        (lambda: tcsae.harvest(modle="x"), tcsae.ConfigError, "Unknown setting 'modle'. Did you mean 'model'"),
        (lambda: tcsae.harvest(codec="zip"), tcsae.ConfigError, "codec='zip': .* is not one of"),
        (lambda: tcsae.harvest(tokens="many"), tcsae.ConfigError, "tokens='many': 'many' is not a count"),
        (lambda: tcsae.harvest(tokens=5000, sequences=50), tcsae.ConfigError, "tokens and sequences are two ways"),
        (lambda: tcsae.harvest(roles="user"), tcsae.ConfigError, "--roles user needs --chat-template"),
        (
            lambda: tcsae.harvest(chat_template="own", tokens_field="ids"),
            tcsae.ConfigError,
            "--chat-template own and --tokens-field ids are two ways to come by tokens. Give one",
        ),
        (lambda: tcsae.evaluate("x.zarr", details=True), tcsae.ConfigError, "Unknown setting 'details'"),
        (lambda: tcsae.report("x.zarr", "no runs"), tcsae.StoreError, "No activation store at x.zarr"),
    ],
)
def test_what_cannot_be_raises_our_errors(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call()


def test_no_run_with_figures_is_an_error_and_some_are_none(made, tmp_path):
    store, runs, _ = made
    with pytest.raises(tcsae.RunError, match="No runs in"):
        tcsae.evaluate(store, tmp_path)
    never = tcsae.train(store, tmp_path / "runs", preset="topk", set=SMALL, steps=0)
    with pytest.raises(tcsae.RunError, match="0 optimiser steps"):
        tcsae.evaluate(store, never)
    (tmp_path / "runs" / "good").symlink_to(runs[0].path)
    evaluation = tcsae.evaluate(store, tmp_path / "runs", temporal=False)
    assert list(evaluation) == ["good"] and "0 optimiser steps" in evaluation.refused[0]


def test_settings_as_python_has_them():
    options = options_of(train_command, {"set": {"sae.groups": (0.5, 0.5), "data.max_norm": None}, "preset": "topk"})
    assert options["settings"] == ("sae.groups=0.5,0.5", "data.max_norm=none")
    assert options["presets"] == ("topk",)
    assert options_of(train_command, {"sweep": {"sae.k": range(2, 4)}})["sweeps"] == ("sae.k=2,3",)
    assert options_of(train_command, {})["device"] == "auto"


@pytest.mark.parametrize("name", ["harvest", "train", "evaluate", "report"])
def test_signatures_name_every_setting(name):
    signature = inspect.signature(getattr(tcsae, name))
    command = cli.get_command(click.Context(cli), {"evaluate": "eval"}.get(name, name))
    taken = {"harvest": "tokens_field", "train": "sweep", "evaluate": "smooth", "report": "max_tokens"}[name]
    assert taken in signature.parameters and "store" in signature.parameters
    assert len(signature.parameters) >= len(command.params) - 4
    assert f"    {taken}: " in vars(sys.modules["tcsae.api.stages"])[name].__doc__


ORDERS = [
    "import tcsae.train.loader",
    "import tcsae",
    "from tcsae.train import loader",
    "from tcsae import train, harvest, evaluate, report",
    "import tcsae.evaluate.report.report",
    "import tcsae.harvest.run",
]


@pytest.mark.slow
def test_packages_and_functions_of_one_name_in_every_order_of_import():
    """All in one process: our modules are dropped in between."""
    program = f"""
import sys
for order in [*zip({ORDERS!r}, {ORDERS!r}[1:]), *zip({ORDERS!r}[::-1], {ORDERS!r}[-2::-1])]:
    for name in [one for one in sys.modules if one.partition(".")[0] == "tcsae"]:
        del sys.modules[name]
    for line in order:
        exec(line)
    import tcsae
    for name in ("harvest", "train", "evaluate", "report"):
        assert callable(getattr(tcsae, name)), (order, name)
    import tcsae.train.presets, tcsae.evaluate.candidates
    assert tcsae.train.presets.PRESETS and tcsae.train is sys.modules["tcsae.train"]
    assert tcsae.harvest.__signature__.parameters
try:
    tcsae.train("no such store.zarr")
except tcsae.StoreError as error:
    assert "No activation store" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert all(getattr(tcsae, name) is not None for name in tcsae.__all__)
    errors = {name for name, one in vars(sys.modules["tcsae.shared.base.errors"]).items() if inspect.isclass(one)}
    assert {name for name in errors if name.endswith("Error") or name == "Stopped"} <= set(tcsae.__all__)
    assert list(itertools.chain(Path(tcsae.__file__).parent.glob("api/*.py")))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tcsae.nothing  # noqa: B018
