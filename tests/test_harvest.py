"""Promise: a store holds the model's activations on the corpus, or one line says what is in the way."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
import toy_harvest as toy
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tcsae.harvest.capture as capture_module
from tcsae.harvest import command
from tcsae.harvest.documents import CorpusChoice
from tcsae.harvest.resolve import DTYPES
from tcsae.harvest.run import HarvestConfig, harvest, remove_store
from tcsae.shared.base.device import DEVICES, available_devices
from tcsae.shared.base.errors import ConfigError, DataError, ModelError, StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.codecs import CODECS
from tcsae.shared.store.format import CONTROLS, SPLITS
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.writer import open_writer

RESIDUAL, MLP, HEADS = toy.RESIDUAL, toy.MLP, toy.HEADS


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """8 sequences a shard and 16 documents a commit: many places to be killed at."""
    toy.small_steps(monkeypatch, 8)


@pytest.fixture(scope="module")
def store(tiny_store):
    return open_store(tiny_store)


# What is stored


@pytest.mark.slow
def test_contents_equal_one_plain_pass_per_sequence(store, tiny_lm):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    layers = model.gpt_neox.layers
    layers[2].register_forward_hook(lambda module, args, out: seen.__setitem__(RESIDUAL, out))  # noqa: ARG005
    layers[4].mlp.register_forward_hook(lambda module, args, out: seen.__setitem__(MLP, out))  # noqa: ARG005
    # What the heads put together, before the output projection.
    layers[1].attention.dense.register_forward_pre_hook(lambda module, args: seen.__setitem__(HEADS, args[0]))  # noqa: ARG005
    for name in SPLITS:
        split = store.split(name)
        stored = {hook: split.read(hook, 0, split.n_sequences) for hook in store.hooks}
        for i, length in enumerate(split.lengths):
            with torch.no_grad():
                model(torch.from_numpy(split.tokens[i, :length].astype(np.int64))[None])
            for hook in store.hooks:
                expected = seen[hook][0].reshape(length, -1).numpy()
                np.testing.assert_allclose(stored[hook][i, :length], expected, rtol=2e-3, atol=1e-3)
                assert not stored[hook][i, length:].any(), "padding is zero"


def test_sequences_are_the_documents_in_order(store, tiny_lm, tiny_corpus):
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert len(set(store.train.documents) & set(store.eval.documents)) == 0
    for name in SPLITS:
        split = store.split(name)
        assert split.n_sequences == len(split.lengths) and split.n_tokens == split.lengths.sum()
        places = list(zip(split.documents.tolist(), split.starts.tolist(), strict=True))
        assert places == sorted(places)
        for i, (document, start) in enumerate(places):
            text = texts[document]
            assert (int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0) == (name == "eval")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert split.tokens[i, : split.lengths[i]].tolist() == ids[start : start + 32]
            assert (split.tokens[i, split.lengths[i] :] == 0).all()
            assert start % 32 == 0 and (start == 0 or places[i - 1] == (document, start - 32))
    assert store.manifest.counts["documents_empty"] >= 3
    assert store.train.lengths.min() < 32 == store.train.lengths.max()


def test_statistics_are_those_of_the_train_split(store):
    valid = np.arange(32) < store.train.lengths[:, None]
    for hook in store.hooks:
        x = store.train.read(hook, 0, store.train.n_sequences)[valid].astype(np.float64)
        np.testing.assert_allclose(store.array(f"statistics/{hook}/mean")[:], x.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(store.array(f"statistics/{hook}/variance")[:], x.var(0), rtol=1e-3, atol=1e-4)
        assert store.array(f"statistics/{hook}/norm_histogram")[:].sum() == len(x)


def test_the_tail_goes_on_where_the_store_ends(store, tiny_lm):
    assert store.manifest.tails[RESIDUAL]["layers"] == 3
    assert "not a residual stream" in store.manifest.tails[MLP]["none"]
    with pytest.raises(StoreError, match="not a residual stream"):
        store.tail_path(HEADS)
    tokens = torch.from_numpy(store.eval.tokens[:3].astype(np.int64))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()(tokens).logits
        logits = Tail.load(store.tail_path(RESIDUAL)).logits(torch.from_numpy(store.eval.read(RESIDUAL, 0, 3)))
    for row, length in enumerate(store.eval.lengths[:3]):
        assert (logits[row, :length] - expected[row, :length]).abs().max() < 0.05


def test_the_store_knows_its_recipe_and_its_tokenizer(store, tiny_corpus):
    recipe = store.manifest.recipe
    assert recipe.model.name == "tiny" and recipe.model.revision.startswith("sha256:")
    assert recipe.corpus.name == tiny_corpus.name
    assert [hook.canonical for hook in recipe.hooks] == ["blocks.2.hook_out", "blocks.4.mlp.hook_out", HEADS_CANONICAL]
    assert set(recipe.libraries) >= {"torch", "transformers", "transformer-lens", "datasets", "zarr", "python"}
    text = AutoTokenizer.from_pretrained(store.tokenizer_path).decode(store.train.tokens[0][:5])
    assert text and json.loads(tiny_corpus.read_text().splitlines()[store.train.documents[0]])["text"].startswith(text)
    assert str(tiny_corpus.parent) not in (store.root / "zarr.json").read_text()


HEADS_CANONICAL = "blocks.1.attn.o.hook_in"


# Started again (test_killed.py has the deaths, test_extend.py what grows)


@pytest.fixture(scope="module")
def short(tiny_config):
    return toy.one_hook(tiny_config)


@pytest.fixture(scope="module")
def uninterrupted(short, tmp_path_factory):
    location = tmp_path_factory.mktemp("whole") / "store.zarr"
    with pytest.MonkeyPatch.context() as patch:
        toy.small_steps(patch, 8)
        harvest(str(location), short)
    return location


@pytest.mark.slow
def test_a_sealed_store_is_used_as_it_is(short, uninterrupted, monkeypatch, capfd):
    monkeypatch.setattr("tcsae.harvest.capture.load_bridge", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("tcsae.harvest.documents.Corpus._rows", lambda *_: pytest.fail("the corpus was read"))
    before = toy.files(uninterrupted)
    assert harvest(str(uninterrupted), short).manifest.state == "sealed"
    assert "holds this harvest already" in capfd.readouterr().err
    assert toy.files(uninterrupted) == before
    assert toy.traces(uninterrupted) == []


@pytest.mark.slow
def test_fresh_starts_anew_and_deletes_activation_stores_only(short, uninterrupted, tmp_path):
    location = tmp_path / "store.zarr"
    shutil.copytree(uninterrupted, location)
    (location / "extra").write_text("of the old store")
    (tmp_path / f"store.zarr.{'0123' * 8}.deleted").mkdir()  # of a deletion that was killed
    harvest(str(location), short, fresh=True)
    assert toy.files(location) == toy.files(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for fresh in (True, False):
        with pytest.raises(StoreError, match="is not an activation store"):
            harvest(str(tmp_path / "thesis"), short, fresh=fresh)
    (tmp_path / "thesis" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreError, match="a Zarr group of another kind"):
        harvest(str(tmp_path / "thesis"), short, fresh=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize(
    "name",
    [
        "store.zarr.backup.deleted",
        f"other.zarr.{'0123' * 8}.deleted",
        f"store.zarr.{'0123' * 8}.deleted.old",
        "deleted",
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_what_another_made_beside_the_store_stays(short, tmp_path, name, fresh):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / f"store.zarr.{'a' * 32}.deleted").symlink_to(tmp_path / name)
    with pytest.raises(DataError):
        harvest(
            str(tmp_path / "store.zarr"), dataclasses.replace(short, corpus=CorpusChoice(name="no/such")), fresh=fresh
        )
    assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_second_harvester_is_refused(short, uninterrupted, tmp_path):
    location = tmp_path / "store.zarr"
    assert toy.harvest_in_child(location, short, 20) == 9
    recipe = open_store(uninterrupted).manifest.recipe
    with open_writer(str(location), recipe):
        for fresh in (False, True):
            with pytest.raises(StoreError, match="Another process harvests into"):
                harvest(str(location), short, fresh=fresh)
    harvest(str(location), short)
    assert toy.files(location) == toy.files(uninterrupted)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_tokens": 2999}, "n_tokens: 3000, not 2999"),
        ({"codec": "float32"}, "codec: 'float16', not 'float32'"),
        ({"hooks": (MLP,)}, f"holds {RESIDUAL}, not {MLP}. A store is extended by --tokens, not by hooks"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(short, uninterrupted, change, words):
    before = toy.files(uninterrupted)
    with pytest.raises(StoreError, match=words):
        harvest(str(uninterrupted), dataclasses.replace(short, **change))
    assert toy.files(uninterrupted) == before


# What goes wrong


@pytest.mark.slow
def test_not_a_number_stops_the_harvest_and_names_the_place(short, store, tiny_lm, tmp_path):
    """A model whose embedding of one token is NaN: the first sequence with that token is named."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_lm, folder)
    weights = load_file(folder / "model.safetensors")
    counts = np.bincount(store.train.tokens.ravel(), minlength=300)
    token = int(np.flatnonzero(counts == counts[counts > 0].min())[0])  # a rare one
    first = int(np.argmax((store.train.tokens == token).any(axis=1)))
    weights["gpt_neox.embed_in.weight"][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = dataclasses.replace(short, model=dataclasses.replace(short.model, name=str(folder)))
    for _ in range(2):  # and again at a second start: nothing of the bad shard was stored
        with pytest.raises(DataError, match=f"{RESIDUAL} is NaN or infinite at train sequence {first}, "):
            harvest(str(tmp_path / "store.zarr"), config)


@pytest.mark.slow
def test_too_little_text_is_said_and_harvested(short, tmp_path, capfd):
    config = dataclasses.replace(short, n_tokens=50_000)
    location = str(tmp_path / "store.zarr")
    with pytest.raises(DataError, match=r"at its end with [\d,]+ of 50,000 tokens.*--exact"):
        harvest(location, config, exact=True)
    assert not list((tmp_path / "store.zarr").rglob("activations")), "refused before any activation was computed"
    counts = harvest(location, config).manifest.counts
    said = capfd.readouterr().err
    n_tokens = counts["train"]["tokens"] + counts["eval"]["tokens"]
    assert f"tiny.jsonl (160 documents) is at its end with {n_tokens:,} of 50,000 tokens" in " ".join(said.split())
    assert counts["corpus_exhausted"] and counts["documents_read"] == 160 and counts["documents_skipped"] == 0


def test_a_corpus_without_train_text_leaves_nothing_behind(short, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    config = dataclasses.replace(short, corpus=CorpusChoice(name=str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"a.jsonl \(2 documents\) has no text for the train split"):
        harvest(str(tmp_path / "store.zarr"), config)
    assert not (tmp_path / "store.zarr").exists()


@pytest.mark.parametrize(
    "part, name, error",
    [
        ("model", "embeded", ModelError),
        ("corpus", "nosuch/dataset", DataError),
        ("hooks", "blocks.7.hook_resid_post", ModelError),
        ("length", 65, ModelError),
        ("field", "body", DataError),
    ],
)
def test_wrong_names_leave_nothing_behind(short, tmp_path, part, name, error):
    changed = {
        "model": lambda: {"model": dataclasses.replace(short.model, name=name)},
        "corpus": lambda: {"corpus": CorpusChoice(name=name)},
        "hooks": lambda: {"hooks": (name,)},
        "length": lambda: {"sequences": dataclasses.replace(short.sequences, length=name)},
        "field": lambda: {"corpus": dataclasses.replace(short.corpus, field=name)},
    }[part]()
    with pytest.raises(error):
        harvest(str(tmp_path / "store.zarr"), dataclasses.replace(short, **changed))
    assert not (tmp_path / "store.zarr").exists()


def test_settings_that_cannot_be_are_refused(short):
    with pytest.raises(ConfigError, match="give at least one, and each once"):
        dataclasses.replace(short, hooks=(RESIDUAL, RESIDUAL))
    for name, value in (("batch_size", 0), ("dtype", "float8"), ("device", "tpu")):
        with pytest.raises(ConfigError, match=str(value)):
            dataclasses.replace(short.model, **{name: value})
    with pytest.raises(ConfigError, match="--batch-size 1000000: at most 32768 sequences of 32"):
        dataclasses.replace(short, model=dataclasses.replace(short.model, batch_size=1_000_000))
    with pytest.raises(ConfigError, match="--seed -1: 0 for the corpus's own order"):
        dataclasses.replace(short, corpus=dataclasses.replace(short.corpus, seed=-1))
    with pytest.raises(ConfigError, match="--sequences 9: at least ten"):
        dataclasses.replace(short, n_sequences=9)
    with pytest.raises(ConfigError, match="Unknown codec"):
        HarvestConfig(codec="float8")
    remove_store("no/such/store.zarr")
    choices = {
        option.name: list(option.type.choices) for option in command.harvest.params if hasattr(option.type, "choices")
    }
    expected = {"codec": CODECS, "lm_dtype": DTYPES, "device": DEVICES, "control": CONTROLS}
    assert choices == {name: list(values) for name, values in expected.items()}


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--batch-size", "1M", None),  # a count of sequences, not of thousands
        ("--batch-size", "99999999999999999999", r"at most 32768 sequences of 32 in one .* would take [\d.e+]+PB"),
        (
            "--sequence-length",
            "99999999999999999999",
            r"at most 1048576 positions; at a width .* would take [\d.e+]+PB",
        ),
        ("--tokens", "99999999999999999999", r"at most 1000000000000; their ids alone would take [\d.e+]+PB"),
        ("--sequences", "9999999999999999999", r"at most 1000000000000; their ids alone would take [\d.e+]+PB"),
        ("--min-length", "99999999999999999999", "from 1 to the sequence length, 32"),
        ("--seed", "99999999999999999999", "0 for the corpus's own order, or up to 9223372036854775807"),
    ],
)
def test_settings_beyond_any_memory_are_refused_with_what_they_would_take(
    tiny_lm, tiny_corpus, tmp_path, option, value, words
):
    given = {"--model": str(tiny_lm), "--dataset": str(tiny_corpus), "--sequence-length": "32", option: value}
    arguments = [part for pair in given.items() for part in pair]
    done = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), "harvest", *arguments])
    assert done.exit_code == (1 if words else 2), done.output
    assert re.search(words or "Error: Invalid value", done.stderr), done.stderr
    assert not (tmp_path / "a.zarr").exists()


# Code that comes with a model


@pytest.fixture
def model_with_code(tiny_lm, tmp_path):
    """A model folder whose config, and tokenizer, are Python code beside the weights; run, it leaves a file."""
    folder = tmp_path / "coded"
    shutil.copytree(tiny_lm, folder)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(
        "from pathlib import Path\nfrom transformers import GPTNeoXConfig, GPTNeoXForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Coded(GPTNeoXConfig):\n    model_type = 'coded'\n"
        "class CodedLM(GPTNeoXForCausalLM):\n    config_class = Coded\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "coded", "auto_map": {"AutoConfig": "code.Coded", "AutoModelForCausalLM": "code.CodedLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, ran


@pytest.mark.slow
def test_code_of_a_model_does_not_run_unless_it_is_trusted(short, model_with_code, tmp_path, monkeypatch):
    folder, ran = model_with_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = dataclasses.replace(short, model=dataclasses.replace(short.model, name=str(folder)))
    with pytest.raises(ModelError, match="no config that can be read .* run it: --trust-remote-code"):
        harvest(str(tmp_path / "store.zarr"), config)
    assert not ran.exists() and not (tmp_path / "store.zarr").exists()
    trusted = dataclasses.replace(config, model=dataclasses.replace(config.model, trust_remote_code=True))
    with contextlib.suppress(ModelError):  # TransformerLens knows no such architecture
        harvest(str(tmp_path / "store.zarr"), trusted)
    assert ran.exists()
    assert not list((tmp_path / "store.zarr").rglob("*.py"))


def test_without_a_bos_token_none_is_prepended(short, tiny_lm, tmp_path):
    folder = tmp_path / "no-bos"
    shutil.copytree(tiny_lm, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            result = json.loads((folder / name).read_text())
            result.pop("bos_token", None)
            (folder / name).write_text(json.dumps(result))
    model = dataclasses.replace(short.model, name=str(folder))
    config = dataclasses.replace(short, model=model, sequences=dataclasses.replace(short.sequences, prepend_bos=True))
    with pytest.raises(ModelError, match="The tokenizer of no-bos has no BOS token. Leave --prepend-bos out"):
        harvest(str(tmp_path / "store.zarr"), config)
    assert not (tmp_path / "store.zarr").exists()


def test_one_place_under_two_names_is_refused(short, tmp_path):
    with pytest.raises(ConfigError, match=f"{RESIDUAL} and blocks.2.hook_out are the same place, blocks.2.hook"):
        harvest(str(tmp_path / "store.zarr"), dataclasses.replace(short, hooks=(RESIDUAL, "blocks.2.hook_out")))
    assert not (tmp_path / "store.zarr").exists()


def test_a_place_that_cannot_be_written_is_named(short, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place, words in ((tmp_path / "file" / "store.zarr", "Not a directory"), ("/proc/store.zarr", "No such file")):
        with pytest.raises(StoreError, match=rf"store.zarr cannot be written \({words}.*\). Give another --store"):
            harvest(str(place), short)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_cpu_is_refused_with_the_reason(short, tmp_path, dtype):
    config = dataclasses.replace(short, model=dataclasses.replace(short.model, dtype=dtype, device="cpu"))
    with pytest.raises(ConfigError, match=f"--lm-dtype {dtype} on a CPU: .* about 100 times as long"):
        harvest(str(tmp_path / "store.zarr"), config)
    assert not (tmp_path / "store.zarr").exists()


@pytest.mark.skipif(len(available_devices()) > 1, reason="there is a GPU")
def test_a_device_that_is_not_here_is_named(short, uninterrupted, tmp_path, monkeypatch):
    config = dataclasses.replace(short, model=dataclasses.replace(short.model, device="cuda"))
    with pytest.raises(ConfigError, match="The device cuda is not here; there is: cpu. Give one of these"):
        harvest(str(tmp_path / "store.zarr"), config)
    with pytest.raises(StoreError, match="model.device: 'cpu', not 'cuda'"):
        harvest(str(uninterrupted), config)
    # auto is the device of the store that is there: a sealed one made elsewhere is used here.
    monkeypatch.setattr("tcsae.shared.base.device.available_devices", lambda: ["cuda", "cpu"])
    assert harvest(str(uninterrupted), short).manifest.recipe.model.device == "cpu"


@pytest.mark.slow
def test_half_precision_is_stored_and_its_tail_verified_in_float32(short, uninterrupted, tmp_path, monkeypatch):
    """What a GPU does in bfloat16, here on the CPU, past the front door."""
    monkeypatch.setattr("tcsae.harvest.resolve.check_dtype", lambda *_: None)
    loads, load_plain = [], capture_module.load_plain
    monkeypatch.setattr(capture_module, "load_plain", lambda *given: loads.append(given) or load_plain(*given))
    config = dataclasses.replace(short, model=dataclasses.replace(short.model, dtype="bfloat16"))
    half, full = harvest(str(tmp_path / "store.zarr"), config), open_store(uninterrupted)
    assert half.manifest.recipe.model.dtype == "bfloat16"
    a, b = (store.train.read(RESIDUAL, 0, 20) for store in (half, full))
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max()
    assert half.manifest.tails[RESIDUAL]["layers"] == full.manifest.tails[RESIDUAL]["layers"]
    assert half.manifest.tails[RESIDUAL]["max_difference"] < 1e-3
    rounded, exact = (Tail.load(store.tail_path(RESIDUAL)).model.state_dict() for store in (half, full))
    for name, tensor in exact.items():  # the weights as they ran
        assert rounded[name].dtype == tensor.dtype
        assert torch.equal(rounded[name], tensor.bfloat16().float() if tensor.is_floating_point() else tensor)
    assert len(loads) == 1, "the model is loaded once"


@pytest.mark.slow
def test_the_command_harvests_prints_a_summary_and_one_line_of_what_is_wrong(tiny_lm, tiny_corpus, tmp_path):
    store = ["--store", str(tmp_path / "store.zarr"), "harvest"]
    options = ["--model", str(tiny_lm), "--dataset", str(tiny_corpus), "--tokens", "2K", "--sequence-length", "32"]
    options += ["--hook", RESIDUAL, "--hook", MLP, "--prepend-bos", "--eval-every", "4"]
    done = CliRunner().invoke(cli, [*store, *options])
    assert done.exit_code == 0, done.output
    for words in ("sequences", "bytes a token", RESIDUAL, "tail", "not a residual stream", "documents read; "):
        assert words in done.stdout
    result = open_store(tmp_path / "store.zarr")
    assert (result.train.tokens[:, 0] == 0).all(), "BOS"
    assert (result.train.starts % 31 == 0).all()
    wrong = CliRunner().invoke(cli, [*store, *options, "--tokens", "1K"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("Error: ") and wrong.stderr.count("\n") == 1
    assert "n_tokens: 2000, not 1000" in wrong.stderr and "--fresh" in wrong.stderr


@pytest.mark.slow
def test_another_split_rule_warns_about_the_embedded_model(tiny_corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tcsae.harvest.run.write_sequences", lambda *_: pytest.fail("far enough"))
    for every, warned in ((4, True), (20, False)):
        config = HarvestConfig(corpus=CorpusChoice(name=str(tiny_corpus)))
        config = dataclasses.replace(config, sequences=dataclasses.replace(config.sequences, eval_every=every))
        with pytest.raises(pytest.fail.Exception):
            harvest(str(tmp_path / f"{every}.zarr"), config)
        assert ("trained on part of the eval split" in " ".join(capfd.readouterr().err.split())) == warned
