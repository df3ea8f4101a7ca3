"""Promise: activations are the model's own at the named hooks; a model or hook that cannot be had is named."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tcsae.harvest.capture import Capture
from tcsae.harvest.language_model import find_model
from tcsae.shared.base.errors import ConfigError, ModelError
from tcsae.shared.store.format import HookRecipe

LENGTHS = np.array([20, 3, 11, 1, 20, 7], np.int32)
LAYERS = {"neox": "gpt_neox.layers", "gpt2": "transformer.h"}


@pytest.fixture(scope="module")
def folders(tiny_lm, make_lm, tmp_path_factory):
    """A GPT-NeoX (attention and MLP in parallel, rotary) and a GPT-2 (sequential, learned positions)."""
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=6, n_head=2, n_positions=64, initializer_range=0.3)
    return {"neox": tiny_lm, "gpt2": make_lm(tmp_path_factory.mktemp("models") / "gpt2", config)}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(1, 300, (len(LENGTHS), 20)).astype(np.int32)


def naive(folder, family, tokens, lengths):
    """Block outputs, MLP outputs and block inputs of the plain Hugging Face model, one unpadded sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}

    def keep(name):
        def hook(module, args, output):  # noqa: ARG001
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    for i, layer in enumerate(model.get_submodule(LAYERS[family])):
        layer.register_forward_hook(keep(f"blocks.{i}.hook_resid_post"))
        layer.mlp.register_forward_hook(keep(f"blocks.{i}.hook_mlp_out"))
        layer.register_forward_pre_hook(
            lambda module, args, i=i: seen.__setitem__(f"blocks.{i}.hook_resid_pre", args[0].detach())  # noqa: ARG005
        )
    rows = []
    for row, n in zip(tokens, lengths, strict=True):
        with torch.no_grad():
            model(torch.tensor(row[:n][None].astype(np.int64)))
        rows.append({name: value[0].numpy() for name, value in seen.items()})
    return rows


@pytest.mark.parametrize("family", ["neox", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_activations_are_the_plain_models(folders, tokens, family, batch_size):
    # The deepest is a block's input: under stop_at_layer=5 it would never fire.
    hooks = ("blocks.5.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.0.hook_resid_post")
    capture = Capture(find_model(str(folders[family])), hooks, batch_size)
    result = capture.run(tokens, LENGTHS)
    assert set(result) == set(hooks)
    for i, expected in enumerate(naive(folders[family], family, tokens, LENGTHS)):
        for name in hooks:
            assert result[name].dtype == np.float32
            np.testing.assert_allclose(result[name][i, : LENGTHS[i]], expected[name], rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(values).all() for values in result.values()), "padding may be anything finite"


def test_names_are_resolved_and_heads_flattened(folders, tokens):
    names = ("blocks.4.hook_resid_post", "blocks.1.attn.hook_z", "ln_final.hook_out", "hook_embed")
    capture = Capture(find_model(str(folders["neox"])), names, 32)
    assert capture.hooks[0] == HookRecipe(requested=names[0], canonical="blocks.4.hook_out", d_model=16)
    assert [hook.d_model for hook in capture.hooks] == [16, 16, 16, 16]
    assert capture.run(tokens, LENGTHS)["blocks.1.attn.hook_z"].shape == (len(LENGTHS), 20, 16)


INSIDE = "blocks.2.attn.hook_q"
"""Inside a module of GPT-NeoX (one matrix makes queries, keys and values), so that the bridge has to run."""


@pytest.mark.parametrize(
    "hooks, attention",
    [
        (("blocks.2.hook_resid_post", "blocks.1.mlp.hook_out", "blocks.3.hook_resid_pre"), "sdpa"),
        (("blocks.1.attn.hook_z", "blocks.2.hook_attn_out", "ln_final.hook_out"), "sdpa"),
        (("blocks.2.hook_resid_post", INSIDE), "eager"),
    ],
)
def test_the_plain_model_runs_where_it_catches_what_the_bridge_does(folders, tokens, monkeypatch, hooks, attention):
    capture = Capture(find_model(str(folders["neox"])), hooks, 4)
    assert capture.attention == attention
    assert hasattr(capture._forward.model, "hook_dict") == (attention == "eager"), "the bridge"
    monkeypatch.setattr("tcsae.harvest.capture.module_places", lambda *_: None)
    bridged = Capture(find_model(str(folders["neox"])), hooks, 4)
    assert bridged.attention == "eager" and bridged.hooks == capture.hooks
    expected, result = bridged.run(tokens, LENGTHS), capture.run(tokens, LENGTHS)
    for hook in hooks:
        np.testing.assert_allclose(result[hook], expected[hook], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "place",
    [("gpt_neox.layers.3", "hook_out"), ("gpt_neox.layers.2.mlp.act", "hook_in"), ("no.such.module", "hook_out")],
)
def test_another_place_than_the_bridge_names_is_not_taken(folders, tokens, monkeypatch, place):
    """The guess from names is compared with the bridge: where it is wrong, the bridge runs."""
    hook = "blocks.2.hook_resid_post"
    monkeypatch.setattr("tcsae.harvest.capture.module_places", lambda *_: {hook: place})
    capture = Capture(find_model(str(folders["neox"])), [hook], 32)
    assert capture.attention == "eager"
    expected = naive(folders["neox"], "neox", tokens[:1], [20])[0][hook]
    np.testing.assert_allclose(capture.run(tokens[:1], np.array([20]))[hook][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hooks", [("blocks.2.hook_resid_post",), (INSIDE, "blocks.2.hook_resid_post")])
def test_the_forward_pass_ends_with_the_deepest_hook(folders, tokens, hooks):
    capture = Capture(find_model(str(folders["neox"])), hooks, 32)
    ran = []
    model = capture._forward.model
    for i, block in enumerate(model.blocks if hasattr(model, "blocks") else model.gpt_neox.layers):
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))  # noqa: ARG005
    capture.run(tokens, LENGTHS)
    assert ran == [0, 1, 2]


def test_the_whole_pass_gives_logits_and_the_same_activations(folders, tokens):
    capture = Capture(find_model(str(folders["gpt2"])), ["blocks.3.hook_resid_post"], 32)
    activations, logits = capture.run_whole(tokens)
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"], dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(tokens).long()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    full = capture.run(tokens, np.full(len(tokens), 20))
    np.testing.assert_allclose(activations["blocks.3.hook_resid_post"], full["blocks.3.hook_resid_post"], atol=1e-5)


@pytest.mark.parametrize(
    "hook, words",
    [
        ("blocks.4.hook_resid_pots", "Did you mean 'blocks.4.hook_resid_post'.*blocks 0 to 5.*blocks.4.hook_mlp_out"),
        ("blocks.9.hook_resid_post", r"Unknown hook 'blocks.9.hook_resid_post'.*blocks 0 to 5"),
        ("blocks.0.attn.hook_pattern", r"is not one vector a position: its shape is \(2, 2, 5\)|its shape is"),
        ("blocks.0.hook_attn_in", "never fires"),
        ("blocks.0.attn.hook_result", "never fires"),
    ],
)
def test_a_hook_that_cannot_be_had_is_named(folders, hook, words):
    with pytest.raises(ModelError, match=words) as caught:
        Capture(find_model(str(folders["neox"])), [hook], 32)
    assert hook in str(caught.value)
    assert len(str(caught.value)) < 500, "one block's names, not three hundred"


def test_a_hook_that_falls_silent_or_fires_twice_stops_the_harvest(folders, tokens, monkeypatch):
    hooks = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    capture = Capture(find_model(str(folders["neox"])), hooks, 32)
    forward = capture._forward._call

    def twice(ids, logits):
        capture._forward.record("blocks.1.hook_resid_post", torch.zeros(1, 1, 16))
        return forward(ids, logits)

    monkeypatch.setattr(capture._forward, "_call", twice)
    with pytest.raises(ModelError, match="blocks.1.hook_resid_post of tiny fires more than once"):
        capture.run(tokens, LENGTHS)
    monkeypatch.setattr(capture._forward, "_call", lambda ids, logits: None)  # noqa: ARG005
    with pytest.raises(ModelError, match="blocks.1.hook_resid_post, blocks.3.hook_resid_post of tiny did not fire"):
        capture.run(tokens, LENGTHS)


@pytest.mark.parametrize(
    "name, words",
    [
        ("embeded", "Unknown model 'embeded'. Did you mean 'embedded'?.*local folder.*Hub id.*offline mode"),
        (
            "EleutherAI/pythia-70m-nope",
            "^The model EleutherAI/.*-nope is no .* could not be looked up on the Hugging",
        ),
        ("no/such/folder", "can be no name on the Hugging Face Hub"),
    ],
)
def test_an_unknown_model_is_one_line_with_what_there_is(name, words):
    with pytest.raises(ModelError, match=words) as caught:
        find_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_model_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="without config.json"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="is a local folder and has no revision 'main'"):
        find_model(str(folders["neox"]), "main")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="no config that can be read"):
        find_model(str(tmp_path)).check_length(8)
    shutil.copy(folders["neox"] / "config.json", tmp_path)
    model = find_model(str(tmp_path))
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        model.tokenizer()
    with pytest.raises(ModelError, match="cannot load the model"):
        Capture(model, ["blocks.0.hook_resid_post"], 32)


@pytest.mark.parametrize("family", ["neox", "gpt2"])
def test_a_sequence_longer_than_the_context_is_refused(folders, family):
    find_model(str(folders[family])).check_length(64)
    with pytest.raises(ModelError, match=r"length of 65 is over the context of .*, 64 positions.*--sequence-length 64"):
        find_model(str(folders[family])).check_length(65)


def test_the_revision_of_a_folder_follows_its_weights(folders, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(folders["neox"], copy)
    first = find_model(str(copy)).revision
    assert first == find_model(str(folders["neox"])).revision
    (copy / "README.md").write_text("not part of the model")
    assert find_model(str(copy)).revision == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert find_model(str(copy)).revision != first
