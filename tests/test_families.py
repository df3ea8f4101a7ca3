"""Promise: what holds of one family of language models holds of the others: hooks, padding, tails; and token ids."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
)

from tcsae.harvest.documents import CorpusChoice
from tcsae.harvest.run import harvest
from tcsae.shared.base.errors import DataError
from tcsae.shared.lm.tail import Tail

pytestmark = pytest.mark.slow

RESIDUAL, MLP, ATTENTION, HEADS = (
    "blocks.1.hook_resid_post",
    "blocks.2.hook_mlp_out",
    "blocks.0.hook_attn_out",
    "blocks.2.attn.hook_z",
)
LAYERS = {"neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers", "gemma2": "model.layers"}
PARTS = {  # of a layer: whose output are MLP and attention, as they are added to the stream; what reads the heads
    "neox": ("mlp", "attention", "attention.dense"),
    "gpt2": ("mlp", "attn", "attn.c_proj"),
    "llama": ("mlp", "self_attn", "self_attn.o_proj"),
    "gemma2": ("post_feedforward_layernorm", "post_attention_layernorm", "self_attn.o_proj"),
}


@pytest.fixture(scope="module")
def folders(tiny_lm, make_lm, tmp_path_factory):
    size = {"vocab_size": 300, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    wide = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    rope = {"max_position_embeddings": 64, "num_key_value_heads": 1}
    configs = {
        "gpt2": GPT2Config(**size, n_embd=16, n_layer=4, n_head=2, n_positions=64),
        "llama": LlamaConfig(**size, **wide, **rope),
        # Windows of 8 in every other layer, so that they matter within 32 positions; soft caps that matter, too.
        "gemma2": Gemma2Config(
            **size,
            **wide,
            **rope,
            head_dim=8,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        ),
    }
    root = tmp_path_factory.mktemp("families")
    return {"neox": tiny_lm} | {name: make_lm(root / name, config) for name, config in configs.items()}


def plain_pass(folder, family, hooks):
    """A function from token ids of one sequence to activations of all hooks, and to logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen, layers = {}, model.get_submodule(LAYERS[family])
    mlp, attention, out = PARTS[family]

    def keep(name):
        def hook(module, args, output):  # noqa: ARG001
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    layers[1].register_forward_hook(keep(RESIDUAL))
    layers[2].get_submodule(mlp).register_forward_hook(keep(MLP))
    layers[0].get_submodule(attention).register_forward_hook(keep(ATTENTION))
    heads = layers[2].get_submodule(out)
    heads.register_forward_pre_hook(lambda module, args: seen.__setitem__(HEADS, args[0][0]))  # noqa: ARG005

    def run(ids):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
        return {hook: seen[hook].reshape(len(ids), -1).numpy() for hook in hooks}, logits

    return run


@pytest.mark.parametrize("family", list(LAYERS))
def test_hooks_and_tails_of_a_family(folders, tiny_config, tmp_path, family):
    hooks = (RESIDUAL, MLP, ATTENTION, HEADS)
    config = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(tiny_config.model, name=str(folders[family]), batch_size=8),
        hooks=hooks,
        codec="float32",
        n_tokens=1200,
    )
    store = harvest(str(tmp_path / "store.zarr"), config)
    run = plain_pass(folders[family], family, hooks)
    stored = {hook: store.eval.read(hook, 0, 6) for hook in hooks}
    tail = Tail.load(store.tail_path(RESIDUAL))
    with torch.no_grad():
        ours = tail.logits(torch.from_numpy(stored[RESIDUAL]))
    assert store.eval.lengths[:6].min() < 32 == store.eval.lengths[:6].max(), "padding does not matter"
    for i, length in enumerate(store.eval.lengths[:6]):
        expected, logits = run(store.eval.tokens[i, :length])
        for hook in hooks:
            scale = np.abs(expected[hook]).max()
            np.testing.assert_allclose(stored[hook][i, :length], expected[hook], rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(ours[i, :length], logits, rtol=1e-3, atol=1e-4)
    tails = store.manifest.tails
    assert tails[RESIDUAL]["max_difference"] <= 1e-4
    assert all("not a residual stream" in tails[hook]["none"] for hook in (MLP, ATTENTION, HEADS))
    attention = store.manifest.recipe.model.attention
    assert attention == ("eager" if family == "gemma2" else "sdpa"), "sdpa has no soft cap"


def test_data_that_is_tokens_already(tiny_config, tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 300, rng.integers(0, 90)).tolist() for _ in range(120)]
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    corpus = CorpusChoice(name=str(path), field="input_ids", tokenized=True)
    config = dataclasses.replace(tiny_config, corpus=corpus, hooks=(RESIDUAL,), n_tokens=2000)
    store = harvest(str(tmp_path / "store.zarr"), config)
    for split in (store.train, store.eval):
        assert split.n_sequences > 5
        for i in range(split.n_sequences):
            start, length = split.starts[i], split.lengths[i]
            assert split.tokens[i, :length].tolist() == rows[split.documents[i]][start : start + length]
    rows[4] = [1, 300]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"token ids from 1 to 300 .*; the model has 0 to 299"):
        harvest(str(tmp_path / "other.zarr"), config)


def wrappers():
    """Models of text and images: a language model inside, whose config is a part of the model's."""
    text = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
    # As many layers as the language model, so that the two lists can be confused.
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    gemma = text | {"num_key_value_heads": 1, "head_dim": 8}
    return {
        "llava": lambda: LlavaConfig(
            text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision), image_token_index=5
        ),
        "gemma3": lambda: Gemma3Config(text_config=gemma, vision_config=vision, mm_tokens_per_image=4),
    }


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_language_model_inside_a_wrapper(tiny_lm, tiny_config, tmp_path, name, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *call, **_: pytest.fail(f"a program was started: {call}"))
    folder = tmp_path / name
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(wrappers()[name](), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    for file in tiny_lm.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    config = dataclasses.replace(
        tiny_config,
        model=dataclasses.replace(tiny_config.model, name=str(folder)),
        hooks=(RESIDUAL,),
        codec="float32",
        n_tokens=1000,
    )
    store = harvest(str(tmp_path / "store.zarr"), config)
    seen = []
    layer = model.get_submodule("model.language_model.layers.1")
    layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    tail = Tail.load(store.tail_path(RESIDUAL))
    assert tail.n_layers == 1
    for i, length in enumerate(store.eval.lengths[:4]):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(store.eval.tokens[i, :length].astype(np.int64))[None]).logits[0]
        stored = store.eval.read(RESIDUAL, i, i + 1)[:, :length]
        torch.testing.assert_close(torch.from_numpy(stored), seen.pop(), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            repeated = tail.logits(torch.from_numpy(stored))[0]
        torch.testing.assert_close(repeated, logits, rtol=1e-3, atol=1e-3)
