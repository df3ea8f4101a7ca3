"""Promise: what is asked for becomes runs with telling names; what cannot be is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tcsae
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import to_settings, with_settings
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import open_store
from tcsae.train.plan import Request, plan_runs
from tcsae.train.presets import DEFAULT, PRESETS, preset
from tcsae.train.run import train_runs

STORE = open_store(Path(__file__).parent / "golden" / "store-v1.zarr")


def names(request: Request) -> list[str]:
    return [run.name for run in plan_runs(STORE, request)]


def test_names_say_what_was_set():
    assert names(Request()) == [DEFAULT]
    settings = ["sae.k=8", "steps=3", "data.seed=0", "guard.keep=2", "data.hook=none"]
    assert names(Request(["topk", "written-run3"], settings)) == ["topk-k8", "written-run3-k8"]
    assert names(Request(["topk"], ["data.seed=4"], init_from="old")) == ["topk-seed4-from-old"]


@pytest.mark.slow
def test_hooks_get_names_of_their_own(tmp_path):
    first, other, odd = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "tower:7 pooled"
    with tcsae.create_store(tmp_path / "a.zarr", hooks={first: 4, other: 6, odd: 5}, sequence_length=3) as creation:
        for split in ("train", "eval"):
            creation.append(split, {hook: np.ones((2, 3, width)) for hook, width in ((first, 4), (other, 6), (odd, 5))})
    store = tcsae.open_store(tmp_path / "a.zarr")
    runs = plan_runs(store, Request(["topk"], ["sae.k=2"], [f"data.hook={first},{other},{odd}"]))
    assert [run.name for run in runs] == ["topk-k2", "topk-k2-1.hook_mlp_out", "topk-k2-tower_7_pooled"]
    assert [run.config.sae.d_model for run in runs] == [4, 6, 5]
    assert [run.name for run in plan_runs(store, Request(["topk"], ["data.hook=none"]))] == ["topk"]
    settings = ("sae.d_sae=8", "steps=2", "data.n_segments=2", "data.segment_length=3", "data.skip_first=0")
    small = [run._replace(config=with_settings(run.config, settings)) for run in runs]
    records = train_runs(store, tmp_path / "runs", small)
    assert [record["hook"] for record in records] == [first, other, odd]


def test_sweeps_make_a_grid_over_presets():
    runs = plan_runs(STORE, Request(["topk", "batchtopk"], ["steps=5"], ["sae.k=4,8", "init_seed=0,1"]))
    assert [run.name for run in runs[:4]] == [
        "topk-k4-init_seed0", "topk-k4-init_seed1", "topk-k8-init_seed0", "topk-k8-init_seed1"
    ]  # fmt: skip
    assert [run.preset for run in runs] == ["topk"] * 4 + ["batchtopk"] * 4
    assert [(run.config.sae.k, run.config.init_seed) for run in runs[4:]] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert {run.config.data for run in runs} == {runs[0].config.data}


def test_a_toml_file_sets_anything(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "temporal-matryoshka"\nsteps = 77\ngroup_weights = [0.5, 0.5]\n'
        "[sae]\nd_sae = 100\ngroups = [0.1, 0.9]\n[temporal]\nweight = 0.25\n[optimizer]\nunit_decoder = false\n"
    )
    (run,) = plan_runs(STORE, Request(config_file=file, settings=["sae.k=7"]))
    assert (run.name, run.preset) == ("mine-k7", "temporal-matryoshka")
    config = run.config
    assert (config.steps, config.sae.d_sae, config.sae.k, config.temporal.weight) == (77, 100, 7, 0.25)
    assert (config.sae.groups, config.group_weights, config.optimizer.unit_decoder) == ((0.1, 0.9), (0.5, 0.5), False)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(["topkk"]), r"Unknown preset 'topkk'. Did you mean 'topk'\?"),
        (Request([], ["sae.kk=3"]), r"Unknown setting 'sae.kk'. Did you mean 'sae.k'\?"),
        (Request([], ["k=3"]), r"Unknown setting 'k'. Did you mean 'sae.k'\?"),
        (Request([], ["lr=1e-3"]), r"Unknown setting 'lr'. Did you mean 'optimizer.lr'\?"),
        (Request([], ["weight=1"]), r"Unknown setting 'weight'. Did you mean 'temporal.weight'\?"),
        (Request([], [], ["sae.k"]), "--sweep 'sae.k' has no values. Write key=v1,v2"),
        (Request([], [], ["sae.k=4,many"]), "sae.k: 'many' is not a count"),
    ],
)
def test_what_cannot_be(request_, message):
    with pytest.raises(ConfigError, match=message):
        plan_runs(STORE, request_)


def test_config_files_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*none.toml \(No such file or directory\)"):
        plan_runs(STORE, Request(config_file=tmp_path / "none.toml"))
    file = tmp_path / "a.toml"
    file.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"a.toml is no TOML: Invalid value"):
        plan_runs(STORE, Request(config_file=file))
    file.write_text("preset = 'topk'")
    with pytest.raises(ConfigError, match="names a preset and so does --preset. Keep one"):
        plan_runs(STORE, Request(["relu-l1"], config_file=file))
    file.write_text("[sae]\nwidth = 3")
    with pytest.raises(ConfigError, match="Unknown setting 'sae.width'"):
        plan_runs(STORE, Request(config_file=file))


def test_the_papers_presets_and_controls_are_listed_apart():
    printed = CliRunner().invoke(cli, ["presets"]).output.splitlines()
    middle, end = (printed.index(line) for line in printed if line.startswith(("The paper's", "Controls")))
    ours, papers, controls = printed[1:middle], printed[middle + 1 : end], printed[end + 1].split(", ")
    assert printed[0] == "Presets:" and len(ours) + len(papers) + len(controls) == len(PRESETS)
    assert all(line.split()[0].startswith(("logged-", "written-")) for line in papers)
    assert not any(line.split()[0].startswith(("logged-", "written-")) for line in ours)
    assert {f"{name.strip()}-shuffled" for name in controls} <= PRESETS.keys()
    (default,) = (line for line in printed if line.endswith("(default)"))
    assert default in ours and default.split()[0] == DEFAULT
    assert f"Default: {DEFAULT}." in CliRunner().invoke(cli, ["train", "--help"], terminal_width=200).output


@pytest.mark.parametrize("name", PRESETS)
def test_presets_lists_every_setting_as_set_takes_it(name):
    assert name.removesuffix("-shuffled") in CliRunner().invoke(cli, ["presets"]).output
    config = preset(name, 64)
    assert with_settings(preset(DEFAULT, 64), to_settings(config)) == config
    printed = CliRunner().invoke(cli, ["presets", "--name", name]).output.splitlines()
    assert with_settings(preset(DEFAULT, 64), printed) == config
