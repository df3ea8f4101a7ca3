"""Promise: before the model runs, the plan says what will be on disk and what it takes; without room nothing begins."""

import dataclasses
from types import SimpleNamespace

import pytest
import toy_harvest as toy
from click.testing import CliRunner

from tcsae.harvest.cost import Probe
from tcsae.harvest.run import harvest, plan_harvest
from tcsae.shared.base.errors import StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.codecs import CODECS
from tcsae.shared.store.reader import open_store


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    toy.small_steps(monkeypatch, 8)


@pytest.mark.slow
@pytest.mark.parametrize("codec", list(CODECS))
def test_the_plan_is_what_is_then_on_disk(tiny_config, tmp_path, codec):
    config = dataclasses.replace(tiny_config, codec=codec)
    location = tmp_path / "store.zarr"
    plan = plan_harvest(str(location), config)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    store = harvest(str(location), config)
    for split in ("train", "eval"):
        assert plan.sequences[split] == store.split(split).n_sequences
        assert plan.tokens[split] == store.split(split).n_tokens == store.split(split).lengths.sum()
    parts = store.n_bytes()
    metadata = sum(file.stat().st_size for file in location.glob("*/activations/*/zarr.json"))
    on_disk = sum(n for name, n in parts.items() if name.startswith("activations ")) - metadata
    if codec == "compact":  # an estimate, for models and shards that are not toys
        assert on_disk / 4 < plan.activations[codec] < on_disk * 4
    else:
        assert plan.activations[codec] == on_disk
    tails = sum(n for name, n in parts.items() if name == "tail")
    assert plan.needed - plan.activations[codec] == pytest.approx(tails, rel=0.2)
    assert plan.left == sum(plan.tokens.values())


@pytest.mark.slow
def test_an_error_of_compact_costs_bits(tiny_config, tmp_path):
    plans = [
        plan_harvest(str(tmp_path / str(error)), dataclasses.replace(tiny_config, codec="compact", codec_error=error))
        for error in (1e-1, 1e-2, 1e-3)
    ]
    sizes = [plan.activations["compact"] for plan in plans]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


@pytest.mark.slow
def test_what_is_on_disk_is_not_planned_again(tiny_config, tmp_path):
    location = tmp_path / "store.zarr"
    whole = plan_harvest(str(location), tiny_config)
    assert toy.harvest_in_child(location, tiny_config, 5, "journal/train-") == 9
    before = {file: file.read_bytes() for file in location.rglob("*") if file.is_file()}
    rest = plan_harvest(str(location), tiny_config)
    after = {file: file.read_bytes() for file in location.rglob("*") if file.is_file() and file.name != "harvest.lock"}
    assert {file: data for file, data in before.items() if file.suffix != ".partial"}.items() >= after.items()
    assert plan_harvest(str(location), tiny_config, fresh=True).left == whole.left, "as if it were not there"
    assert [file.name for file in tmp_path.iterdir()] == ["store.zarr"]
    lengths = 5 * 8 * 32
    assert 0 < whole.left - rest.left <= lengths
    assert rest.needed < whole.needed and rest.activations == whole.activations


@pytest.mark.parametrize(
    "model, write, read, passes",
    [
        (1.0, 0.0, 0.0, 2),  # the first pass makes the store, the second is free
        (1.0, 0.5, 0.5, 4),  # 3 passes: 3 without a store, 1.5 + 1.5 with one
        (1.0, 0.1, 0.9, 12),
        (1.0, 0.0, 1.0, None),
    ],
)
def test_break_even(model, write, read, passes):
    probe = Probe(model, write, read)
    assert probe.break_even == passes
    if passes:
        assert passes * model > model + write + passes * read
        assert (passes - 1) * model <= model + write + (passes - 1) * read + 1e-9


@pytest.mark.slow
def test_without_room_nothing_begins(tiny_config, tmp_path, monkeypatch):
    location = tmp_path / "store.zarr"
    monkeypatch.setattr("tcsae.harvest.cost.disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(StoreError, match=r"needs [\d.]+KB more and its disk has 5KB.*--codec.*--force"):
        harvest(str(location), tiny_config)
    assert toy.records(location) == {"sequences", "plan"}
    assert harvest(str(location), tiny_config, force=True).manifest.state == "sealed"


@pytest.mark.slow
def test_a_dry_run_of_another_harvest_is_refused_as_that_is(tiny_config, tmp_path):
    location = tmp_path / "store.zarr"
    assert toy.harvest_in_child(location, tiny_config, 1, "journal/sequences") == 9
    with pytest.raises(StoreError, match=r"was harvested otherwise \(n_tokens: 3000, not 4000\). Give another --store"):
        plan_harvest(str(location), dataclasses.replace(tiny_config, n_tokens=4000))
    with pytest.raises(StoreError, match="is extended by --tokens, not by hooks. Give another --store"):
        plan_harvest(str(location), dataclasses.replace(tiny_config, hooks=(toy.RESIDUAL,)))


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_leaves_the_way_free(tiny_lm, tiny_corpus, tmp_path):
    options = [
        "--store",
        str(tmp_path / "store.zarr"),
        "harvest",
        "--model",
        str(tiny_lm),
        "--dataset",
        str(tiny_corpus),
    ]
    options += ["--sequences", "80", "--sequence-length", "32", "--hook", toy.RESIDUAL, "--eval-every", "4"]
    planned = CliRunner().invoke(cli, [*options, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    for words in ("sequences", "float16", "(chosen)", "about", "the disk has", "per token: the model", "tokens to go"):
        assert words in planned.stdout
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(cli, options)
    assert done.exit_code == 0, done.output
    store = open_store(tmp_path / "store.zarr")
    assert store.train.n_sequences + store.eval.n_sequences == 80
    both = CliRunner().invoke(cli, [*options, "--tokens", "3K"])
    assert both.exit_code == 2 and "--tokens or --sequences, not both" in both.stderr
