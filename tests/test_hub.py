"""Promise: runs and stores go to the Hub and come back whole; what is refused, or offline, is one line."""

import json
import shutil

import pytest
from click.testing import CliRunner
from toy_hub import ToyHub

from tcsae.shared.base.files import file_digest
from tcsae.shared.base.settings import to_dict
from tcsae.shared.commands.group import cli
from tcsae.shared.hub import push as pushing
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults
from tcsae.train.config import TrainConfig
from tcsae.train.plan import read_config_file


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = ToyHub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_toy")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def place(tiny_store, tmp_path_factory):
    """A store, and two runs with random weights; the first is evaluated."""
    place = tmp_path_factory.mktemp("hub") / "place"
    shutil.copytree(tiny_store, place / "a.zarr")
    store = open_store(place / "a.zarr")
    config = SaeConfig(d_model=16, d_sae=24, activation="topk", k=3)
    for name in ("topk-a", "odd|name_b"):
        path = place / "runs" / name
        path.mkdir(parents=True)
        record = {
            "name": name,
            "preset": "topk",
            "train": to_dict(TrainConfig(sae=config)),
            "hook": store.hook(),
            "store": {"content": store.content},
            "steps": 12_345,
            "tokens": 678_900,
            "left_out": {"skip_first_per_epoch": 77, "max_norm": 0},
        }
        save_sae(SparseAutoencoder(config), path, record, {"model_name": "tiny", "hook_name": store.hook()})
    evaluation = {
        "metrics": {"explained_variance": 0.87654, "l0": 3.0, "ce_loss_score": None},
        "intervals": {"explained_variance": [0.86, 0.89], "l0": None},
        "n_tokens": 4321,
        "n_documents": 40,
        "interval_rule": "95%, of resamplings",
    }
    (place / "runs/topk-a/eval.json").write_text(json.dumps(evaluation))
    return place


def call(place, *arguments: str, store: str = "a.zarr", runs: str = "runs"):
    return CliRunner().invoke(cli, ["--store", str(place / store), "--runs", str(place / runs), *arguments])


def pushed(hub, place, *arguments: str):
    done = call(place, "push", "topk-a", "odd|name_b", "--to", "me/saes", *arguments)
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    return hub.repos["models/me/saes"]


def test_pushed_runs_come_back_byte_for_byte(hub, place, tmp_path):
    files = pushed(hub, place, "--license", "mit")
    names = {"cfg.json", "sae_weights.safetensors", "tcsae.json", "train.toml"}
    expected = {f"{run}/{name}" for run in ("topk-a", "odd|name_b") for name in names}
    assert files.keys() == expected | {"README.md", "topk-a/eval.json"}
    done = call(tmp_path, "pull", "--from", "me/saes", "--run", "topk-a")
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["topk-a"]
    for name in ("cfg.json", "sae_weights.safetensors", "tcsae.json", "eval.json"):
        assert (tmp_path / "runs/topk-a" / name).read_bytes() == (place / "runs/topk-a" / name).read_bytes()
    again = call(tmp_path, "pull", "--from", "me/saes")
    assert again.exit_code == 0, again.output
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_card_says_what_a_reader_asks(hub, place):
    card = pushed(hub, place, "--license", "mit")["README.md"].decode()
    store = open_store(place / "a.zarr")
    assert card.startswith("---\nlibrary_name: saelens\n")
    assert "license: mit" in card
    assert "| explained variance (centred, pooled R2) | 0.8765 | 0.86 to 0.89 |" in card
    assert "4,321 tokens of 40 held-out documents; intervals: 95%, of resamplings" in card
    assert "CE score" not in card, "what was not measured is not shown"
    assert f"`{store.content[:12]}`" in card
    assert store.hook().replace("_", "\\_") in card
    assert "odd\\|name\\_b" in card, "a name cannot break the table"
    assert "Licence of the data: not stated here" in card
    assert "skip_first_per_epoch 77" in card
    assert f"tcsae harvest --model {store.manifest.recipe.model.name}" in card
    assert "--sequence-length 32 --eval-every 4 --batch-size 4 --hook blocks.2.hook_resid_post" in card
    assert "tcsae train --config topk-a/train.toml" in card


def test_the_settings_beside_a_run_are_those_it_was_trained_with(hub, place, tmp_path):
    file = tmp_path / "train.toml"
    file.write_bytes(pushed(hub, place)["topk-a/train.toml"])
    from tcsae.train.plan import Request, plan_runs

    values = read_config_file(file)
    assert values["preset"] == "topk"
    (run,) = plan_runs(open_store(place / "a.zarr"), Request(config_file=file))
    record = json.loads((place / "runs/topk-a/tcsae.json").read_text())
    assert to_dict(run.config) == record["train"]


def test_the_licence_of_a_data_set_of_the_hub_is_looked_up(hub, place, monkeypatch):
    from dataclasses import replace

    hub.repos["datasets/some/text"] = {}
    hub.cards["datasets/some/text"] = {"license": "cc-by-sa-4.0"}
    recipe = open_store(place / "a.zarr").manifest.recipe
    other = replace(recipe, corpus=replace(recipe.corpus, name="some/text", revision="abc123", config="20B"))
    monkeypatch.setattr(pushing, "_recipe", lambda runs, location: other)  # noqa: ARG005
    card = pushed(hub, place)["README.md"].decode()
    assert "some/text, 20B, split train, at abc123. Licence of the data: cc-by-sa-4.0" in card
    assert "--dataset some/text --dataset-revision abc123 --dataset-config 20B" in card
    assert "Licence of the data: my own" in pushed(hub, place, "--data-license", "my own")["README.md"].decode()


@pytest.mark.slow
def test_a_store_is_pushed_in_pieces_goes_on_after_a_stop_and_comes_back_whole(hub, place, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "COMMIT_FILES", 5)
    push = ("push", "--store", "--to", "me/activations")
    stops = iter([False, False, True])
    from tcsae.shared.base.signals import StopRequest

    real = StopRequest.check

    def check(self, state):
        if next(stops, False):
            self.number = 2
        real(self, state)

    monkeypatch.setattr(StopRequest, "check", check)
    stopped = call(place, *push)
    assert stopped.exit_code == 130
    assert "what me/activations holds by now stays there" in stopped.output
    files = hub.repos["datasets/me/activations"]
    assert files and "zarr.json" not in files, "the manifest comes last"
    before, n_before = dict(files), hub.n_uploads
    done = call(place, *push)
    assert done.exit_code == 0, done.output
    store = open_store(place / "a.zarr")
    assert files.keys() == {*store.objects.listed(), "README.md"}
    n_large = sum(not key.endswith((".json", ".md", ".toml")) for key in store.objects.listed())
    assert n_before > 0
    assert hub.n_uploads <= n_large, "what was there was not sent again"
    assert all(files[key] == data for key, data in before.items())
    pulled = call(tmp_path, "pull", "--store", "--from", "me/activations", store="b.zarr")
    assert pulled.exit_code == 0, pulled.output
    copy = open_store(tmp_path / "b.zarr")
    assert copy.content == store.content
    assert not list(find_faults(copy.location, [].append))
    n_requests = len(hub.requests)
    assert call(place, *push).exit_code == 0
    assert not any("/blob/" in one for one in hub.requests[n_requests:])


@pytest.mark.slow
def test_a_damaged_or_other_store_on_the_hub_is_refused(hub, place, tmp_path):
    push = ("push", "--store", "--to", "me/activations")
    assert call(place, *push).exit_code == 0
    files = hub.repos["datasets/me/activations"]
    key = next(key for key in files if key.startswith("train/activations") and "/c/" in key)
    files[key] = files[key][:-1] + b"x"
    done = call(tmp_path, "pull", "--store", "--from", "me/activations", store="b.zarr")
    assert done.exit_code == 1
    assert "is damaged" in done.output
    root = json.loads(files["zarr.json"])
    root["attributes"]["tcsae"]["content"] = "another"
    files["zarr.json"] = json.dumps(root).encode()
    assert "holds another store (another). Give another --to" in call(place, *push).output
    hub.repos["datasets/me/notes"] = {"thesis.txt": b"years of work"}
    assert (
        "holds thesis.txt, which is none of this store's" in call(place, "push", "--store", "--to", "me/notes").output
    )


@pytest.mark.parametrize(
    ("refuse", "arguments", "message"),
    [
        (
            ("create", 403),
            ("push", "topk-a", "--to", "you/saes"),
            "does not let you write to you/saes. With a token",
        ),
        (("commit", 500), ("push", "topk-a", "--to", "me/saes"), "me/saes: the Hub answers .*what is there stays"),
        (None, ("pull", "--from", "me/nothing"), "The model me/nothing is not on the Hub, or not yours to see"),
        (None, ("pull", "--store", "--from", "me/nothing"), "The dataset me/nothing is not on the Hub"),
        (None, ("pull", "--from", "me/empty"), "me/empty has no folder with cfg.json and sae_weights.safetensors"),
        (None, ("push", "topk-a", "--to", "saes"), "--to 'saes' has no owner. Give OWNER/NAME"),
        (None, ("push", "topk-a", "--to", "me/a b"), "--to 'me/a b': give OWNER/NAME, in letters"),
        (None, ("push", "--to", "me/saes"), "push: name runs, .*or give --store"),
        (None, ("push", "topk-c", "--to", "me/saes"), "Unknown run 'topk-c'. Did you mean 'topk-a'"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, place, refuse, arguments, message, monkeypatch):
    import re

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)  # noqa: ARG005
    hub.repos["models/me/empty"] = {"notes.json": b"{}"}
    hub.refuse = refuse
    done = call(place, *arguments, store="none.zarr" if "pull" in arguments else "a.zarr")
    assert done.exit_code == 1, done.output
    assert re.search(message, done.output), done.output
    assert sum(line.startswith("Error: ") for line in done.output.replace("\r", "\n").splitlines()) == 1
    assert "Traceback" not in done.output


def test_offline_the_cache_serves_and_a_push_says_so(hub, place, tmp_path, monkeypatch):
    pushed(hub, place)
    assert call(tmp_path, "pull", "--from", "me/saes").exit_code == 0
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    n_requests = len(hub.requests)
    done = call(tmp_path, "pull", "--from", "me/saes")
    assert done.exit_code == 0, done.output
    weights = "topk-a/sae_weights.safetensors"
    assert file_digest(tmp_path / "runs" / weights) == file_digest(place / "runs" / weights)
    refused = call(place, "push", "topk-a", "--to", "me/saes")
    assert refused.exit_code == 1
    assert "the Hub is switched off (HF_HUB_OFFLINE). Unset it" in refused.output
    assert "not in the Hub's local cache" in call(tmp_path, "pull", "--from", "me/other").output
    assert len(hub.requests) == n_requests


def test_a_pulled_run_that_was_changed_or_is_in_the_way_is_refused(hub, place, tmp_path):
    files = pushed(hub, place)
    (tmp_path / "runs/topk-a").mkdir(parents=True)
    (tmp_path / "runs/topk-a/cfg.json").write_text("{}")
    assert "is there already, and another run" in call(tmp_path, "pull", "--from", "me/saes", "--run", "topk-a").output
    files["odd|name_b/sae_weights.safetensors"] = files["topk-a/sae_weights.safetensors"][:-4] + b"1234"
    done = call(tmp_path, "pull", "--from", "me/saes", "--run", "odd|name_b")
    assert done.exit_code == 1
    assert "is not the file that its tcsae.json names" in done.output
    assert not (tmp_path / "runs/odd|name_b").exists()
