"""Promise: a control differs from its store in what its name says and in nothing else, and is never taken for it."""

import json
import shutil

import numpy as np
import pytest
import torch
import toy_harvest as toy
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tcsae
from tcsae.api import text
from tcsae.api.text import activations as shown
from tcsae.harvest.language_model import load_bridge, load_plain, stored_model
from tcsae.harvest.resolve import HarvestConfig
from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.format import SPLITS, ControlRecipe
from tcsae.shared.store.reader import open_store

HOOK = toy.RESIDUAL
N_TOKENS, MORE_TOKENS = 2000, 2600
KINDS = ("permuted", "random-weights")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    toy.small_steps(monkeypatch, 8)


@pytest.fixture(scope="module")
def trained_lm(tiny_lm, tmp_path_factory):
    """The tiny model, away from where it begins: as it is, its weights are those drawn with seed 0."""
    folder = shutil.copytree(tiny_lm, tmp_path_factory.mktemp("models") / "trained")
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * one + 0.01 for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def call(trained_lm, tiny_corpus):
    """call(location, option, ...): the harvest command on the tiny model and corpus."""

    def run(location, *more, tokens=N_TOKENS):
        ours = ["--model", trained_lm, "--dataset", tiny_corpus, "--hook", HOOK, "--tokens", tokens]
        ours += ["--sequence-length", 32, "--min-length", 1, "--eval-every", 4, "--batch-size", 4]
        return CliRunner().invoke(cli, [str(x) for x in ("--store", location, "harvest", *ours, *more)])

    return run


@pytest.fixture(scope="module")
def locations(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nulls")
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        toy.small_steps(patch, 8)
        for kind in ("plain", *KINDS):
            result[kind] = folder / f"{kind}.zarr"
            done = call(result[kind], *([] if kind == "plain" else ["--control", kind]))
            assert done.exit_code == 0, done.output
            assert ("  control " in done.output) == (kind != "plain")
            assert kind == "plain" or f"  control {kind}, seed 0: " in done.output
    return result


@pytest.fixture(scope="module")
def stores(locations):
    return {kind: open_store(str(location)) for kind, location in locations.items()}


@pytest.mark.slow
def test_a_store_without_a_control_does_not_speak_of_one(locations):
    recipes = {
        kind: json.loads((root / "zarr.json").read_text())["attributes"]["tcsae"]["recipe"]
        for kind, root in locations.items()
    }
    assert "control" not in recipes["plain"]
    for kind in KINDS:
        assert recipes[kind].pop("control") == {"kind": kind, "seed": 0}
        assert recipes[kind] == recipes["plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_lengths_and_splits_are_the_stores(stores, kind):
    plain, control = stores["plain"], stores[kind]
    assert control.manifest.counts == plain.manifest.counts
    for split in SPLITS:
        ours, theirs = control.split(split), plain.split(split)
        for name in ("lengths", "documents", "starts"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert control.content != plain.content


def of_documents(store, split):
    """Document -> its tokens, in order."""
    result, one = {}, store.split(split)
    for i, document in enumerate(one.documents.tolist()):
        result.setdefault(document, []).extend(one.tokens[i, : one.lengths[i]].tolist())
    return result


def test_permuted_documents_have_the_same_tokens_in_another_order(stores):
    n_moved = 0
    for split in SPLITS:
        plain, permuted = (of_documents(stores[kind], split) for kind in ("plain", "permuted"))
        *whole, last = plain  # the last may be cut short where the split is full
        assert len(whole) >= 8
        for document in whole:
            assert sorted(permuted[document]) == sorted(plain[document])
            n_moved += sum(a != b for a, b in zip(permuted[document], plain[document], strict=True))
        assert len(permuted[last]) == len(plain[last])
    assert n_moved > N_TOKENS / 2
    again = [np.random.PCG64([0, 7]).random_raw(20), np.random.PCG64([0, 8]).random_raw(20)]
    assert not np.array_equal(*map(np.argsort, again)), "documents have orders of their own"


def test_the_order_is_what_the_format_says(stores):
    plain, permuted = (of_documents(stores[kind], "train") for kind in ("plain", "permuted"))
    for number in list(plain)[:20]:
        ids = np.array(plain[number])
        order = np.argsort(np.random.PCG64([0, number]).random_raw(len(ids)), kind="stable")
        assert ids[order].tolist() == permuted[number]


def test_permuted_activations_are_of_the_model_on_the_permuted_tokens(stores, trained_lm):
    check_activations(stores["permuted"], AutoModelForCausalLM.from_pretrained(trained_lm, dtype=torch.float32))


def test_random_weights_are_those_before_training(stores, trained_lm):
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(trained_lm), dtype=torch.float32)
    plain, control = stores["plain"], stores["random-weights"]
    assert np.array_equal(control.train.tokens, plain.train.tokens)
    check_activations(control, untrained)
    tail = Tail.load(control.tail_path(HOOK)).model.state_dict()
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    assert torch.equal(tail[name], untrained.state_dict()[name.replace("0", "3", 1)])
    assert control.manifest.tails[HOOK]["max_difference"] < 1e-3


def check_activations(store, model):
    model.eval()
    seen = []
    model.gpt_neox.layers[2].register_forward_hook(lambda module, args, out: seen.append(out))  # noqa: ARG005
    stored = store.train.read(HOOK, 0, 8)
    for i in range(8):
        length = store.train.lengths[i]
        with torch.no_grad():
            model(torch.from_numpy(store.train.tokens[i : i + 1, :length].astype(np.int64)))
        np.testing.assert_allclose(stored[i, :length], seen.pop()[0].numpy(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ("plain", "random-weights"))
def test_the_stores_model_has_the_controls_weights(stores, trained_lm, kind):
    model = stored_model(stores[kind].manifest.recipe, str(trained_lm))
    plain, tokens = load_plain(model), torch.from_numpy(stores[kind].eval.tokens[:1]).long()
    check_activations(stores[kind], plain)
    with torch.no_grad():
        torch.testing.assert_close(load_bridge(model)(tokens), plain(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_text_is_read_by_the_controls_weights(stores, trained_lm, tmp_path, monkeypatch):
    location, read = stores["random-weights"].location, []
    tcsae.train(location, tmp_path, preset="topk", steps=1, set={"sae.d_sae": 32, "sae.k": 4})
    monkeypatch.setattr(
        text, "activations", lambda sae, *rest, **more: read.append(rest[0]) or shown(sae, *rest, **more)
    )
    named = ["--store", location, "--runs", str(tmp_path), "feature", "--text", "the model", "--model", str(trained_lm)]
    done = CliRunner().invoke(cli, named)
    assert done.exit_code == 0, done.output
    assert [one.weights_seed for one in read] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_or_extended_the_bytes_are_the_same(call, trained_lm, tiny_corpus, locations, tmp_path, kind):
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.run import ModelChoice
    from tcsae.shared.store.format import SequenceRecipe

    config = HarvestConfig(
        model=ModelChoice(name=str(trained_lm), batch_size=4),
        corpus=CorpusChoice(name=str(tiny_corpus)),
        sequences=SequenceRecipe(length=32, min_length=1, eval_every=4),
        hooks=(HOOK,),
        n_tokens=N_TOKENS,
        control=ControlRecipe(kind=kind),
    )
    killed = tmp_path / "killed.zarr"
    for key, number in (("journal/sequences", 2), ("/train/activations", 2), ("/tail/", 1)):
        assert toy.harvest_in_child(killed, config, number, key) == 9, key
    harvest(str(killed), config)
    assert toy.files(killed) == toy.files(locations[kind])
    extended, whole = killed, tmp_path / "whole.zarr"
    for location in (extended, whole):
        done = call(location, "--control", kind, tokens=MORE_TOKENS)
        assert done.exit_code == 0, done.output
    assert toy.files(extended) == toy.files(whole) != toy.files(locations[kind])


@pytest.mark.slow
def test_another_seed_is_another_control(stores, call, tmp_path):
    for kind in KINDS:
        done = call(tmp_path / f"{kind}.zarr", "--control", kind, "--seed", 3)
        assert done.exit_code == 0, done.output
        other = open_store(str(tmp_path / f"{kind}.zarr"))
        assert other.manifest.recipe.control == ControlRecipe(kind=kind, seed=3)
        assert other.content != stores[kind].content
    tails = [Tail.load(store.tail_path(HOOK)).model.state_dict() for store in (other, stores["random-weights"])]
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    assert not torch.equal(tails[0][name], tails[1][name])


def test_a_control_is_never_taken_for_another_store(call, locations):
    before = {kind: toy.files(location) for kind, location in locations.items()}
    for there in locations:
        for asked in set(KINDS) - {there}:
            for tokens in (N_TOKENS, MORE_TOKENS):
                done = call(locations[there], "--control", asked, tokens=tokens)
                assert done.exit_code == 1
                assert "was harvested otherwise" in done.output and "control.kind: " in done.output
        if there != "plain":
            done = call(locations[there], tokens=MORE_TOKENS)
            assert done.exit_code == 1 and f"control.kind: {there!r}, not None" in done.output
    assert {kind: toy.files(location) for kind, location in locations.items()} == before


@pytest.mark.slow
def test_the_control_is_shown(call, locations, tmp_path):
    for kind in KINDS:
        shown = CliRunner().invoke(cli, ["--store", str(locations[kind]), "inspect"]).output
        assert f"  control    {kind}, seed 0: " in shown
        planned = call(tmp_path / f"{kind}.zarr", "--control", kind, "--dry-run")
        assert planned.exit_code == 0 and f"  control {kind}, seed 0: " in planned.output
    assert "  control " not in CliRunner().invoke(cli, ["--store", str(locations["plain"]), "inspect"]).output


def test_a_wrong_control_is_refused(call, tmp_path):
    done = call(tmp_path / "a.zarr", "--control", "shuffled")
    assert done.exit_code == 2
    assert "'shuffled' is not one of 'permuted', 'random-weights'" in done.output
    with pytest.raises(ConfigError, match="Unknown control 'shuffled'.*permuted.*random-weights"):
        HarvestConfig(control=ControlRecipe(kind="shuffled"))


@pytest.mark.slow
def test_the_embedded_model_is_warned_about_only_as_it_was_trained(tmp_path, tiny_corpus):
    ours = [
        "harvest",
        "--dataset",
        str(tiny_corpus),
        "--tokens",
        "2000",
        "--sequence-length",
        "32",
        "--eval-every",
        "4",
    ]
    ours += ["--hook", "blocks.1.hook_resid_post"]
    warned = []
    for more in ([], ["--control", "random-weights"]):
        done = CliRunner().invoke(cli, ["--store", str(tmp_path / f"{len(warned)}.zarr"), *ours, *more])
        assert done.exit_code == 0, done.output
        warned.append("the embedded model was trained on part of the eval split" in " ".join(done.output.split()))
    assert warned == [True, False]
