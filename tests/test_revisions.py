"""Promise: a revision on the Hub is looked up once a store; a harvest goes on, and a sealed store opens, without it."""

import dataclasses

import pytest

from tcsae.harvest import revisions
from tcsae.harvest.documents import CorpusChoice, find_corpus
from tcsae.harvest.language_model import find_model
from tcsae.harvest.revisions import HubError, UnreachableError
from tcsae.shared.base.errors import DataError, ModelError
from tcsae.shared.store.format import CorpusRecipe, ModelRecipe

OLD, NEW = "0" * 40, "1" * 40


def find(kind: str, name: str, revision: str | None, stored: str | None) -> str:
    """The revision that a model or a dataset of the Hub comes to."""
    if kind == "model":
        recipe = ModelRecipe(name=name, revision=stored) if stored else None
        return find_model(name, revision, recipe).revision
    recipe = CorpusRecipe(name=name, revision=stored) if stored else None
    return find_corpus(CorpusChoice(name=name, revision=revision), recipe).recipe.revision


@pytest.fixture
def hub(monkeypatch):
    """The Hub, whose main branch is at NEW; it takes note of what it is asked."""
    asked = []

    def commit(kind, name, revision):  # noqa: ARG001
        asked.append(revision)
        return {None: NEW, "main": NEW, "refs/convert/parquet": NEW}.get(revision, revision)

    monkeypatch.setattr(revisions, "hub_commit", commit)
    return asked


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_stores_commit_stands_where_no_other_is_asked_for(hub, kind, capfd):
    assert find(kind, "own/er", None, OLD) == OLD
    assert f"own/er: the store's revision is used, {OLD}" in " ".join(capfd.readouterr().err.split())
    assert find(kind, "own/er", OLD, OLD) == OLD
    assert hub == []
    assert find(kind, "own/er", "main", OLD) == NEW
    assert find(kind, "own/er", None, None) == NEW
    assert find(kind, "own/er", None, "sha256:00") == NEW, "a folder of that name"
    assert hub == ["main", None, None]


def test_an_alias_is_looked_up_once(hub):
    assert find_corpus(CorpusChoice(name="openwebtext")).recipe.revision == NEW
    assert hub == ["refs/convert/parquet"]
    stored = CorpusRecipe(name="Skylion007/openwebtext", revision=OLD)
    assert find_corpus(CorpusChoice(name="openwebtext"), stored).recipe.revision == OLD
    assert len(hub) == 1


@pytest.mark.parametrize("kind, error", [("model", ModelError), ("dataset", DataError)])
def test_offline_a_branch_is_what_it_was(monkeypatch, kind, error, capfd):
    def unreachable(*_):
        raise UnreachableError("could not be looked up on the Hugging Face Hub (no route)")

    monkeypatch.setattr(revisions, "hub_commit", unreachable)
    assert find(kind, "own/er", "main", OLD) == OLD
    assert "could not be looked up" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(error, match="could not be looked up"):
        find(kind, "own/er", None, None)

    def refused(*_):
        raise HubError("has no revision 'mian' on the Hugging Face Hub")

    monkeypatch.setattr(revisions, "hub_commit", refused)
    with pytest.raises(error, match="has no revision 'mian'"):
        find(kind, "own/er", "mian", OLD)


@pytest.mark.slow
def test_a_sealed_store_of_the_hub_opens_offline(tiny_config, tiny_lm, tiny_corpus, tmp_path, monkeypatch):
    """The same command, after the Hub was there for the first one."""
    import datasets

    from tcsae.harvest.language_model import LanguageModel
    from tcsae.harvest.run import harvest

    load = datasets.load_dataset
    options = {"split": "train", "streaming": True, "data_files": {"train": str(tiny_corpus)}}
    config = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(tiny_config.model, name="own/model"),
        corpus=CorpusChoice(name="own/data"),
        hooks=("blocks.1.hook_resid_post",),
    )
    with monkeypatch.context() as online:
        online.setattr(revisions, "hub_commit", lambda *_: OLD)
        online.setattr(datasets, "load_dataset", lambda *_, **__: load("json", **options))
        online.setattr(
            "tcsae.harvest.run.find_model", lambda *_: LanguageModel("own/model", str(tiny_lm), f"sha256:{OLD}")
        )
        first = harvest(str(tmp_path / "a.zarr"), config)
    monkeypatch.setattr("tcsae.harvest.run.find_model", lambda *_: LanguageModel("own/model", "gone", f"sha256:{OLD}"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub is asked"))
    monkeypatch.setattr(revisions, "hub_commit", lambda *_: pytest.fail("the Hub is asked"))
    assert harvest(str(tmp_path / "a.zarr"), config).manifest.content == first.manifest.content
