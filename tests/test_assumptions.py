"""Promise: what a harvest assumes of a model is tested before: no padding, no neighbour moves what is stored."""

import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BartConfig, BertConfig, Gemma3TextConfig, LlamaConfig, T5Config

from tcsae.harvest.assumptions import CUT, is_causal
from tcsae.harvest.capture import Capture
from tcsae.harvest.language_model import find_model
from tcsae.shared.base.errors import ModelError

LENGTHS = np.array([20, 3, 11, 1, 20, 7], np.int32)
SIZE = {"vocab_size": 300, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ROPE = {"max_position_embeddings": 64, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {  # class, config, module whose output is the hook, hook, whether it is causal
    "llama": ("LlamaForCausalLM", lambda: LlamaConfig(**SIZE, **WIDE, **ROPE), "model.layers.1", True),
    "bert": ("BertForMaskedLM", lambda: BertConfig(**SIZE, **WIDE), "bert.encoder.layer.1", False),
    "bidirectional": (
        "Gemma3ForCausalLM",
        lambda: Gemma3TextConfig(**SIZE, **WIDE, **ROPE, use_bidirectional_attention=True),
        "model.layers.1",
        False,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: T5Config(
            vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        "encoder.block.1",
        False,
    ),
    "bart": (
        "BartForConditionalGeneration",
        lambda: BartConfig(
            **SIZE | {"eos_token_id": 2},
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
        "model.encoder.layers.1",
        False,
    ),
}


@pytest.fixture(scope="module")
def folders(tiny_lm, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, (kind, config, _, _) in MODELS.items():
        torch.manual_seed(0)
        getattr(transformers, kind)(config()).save_pretrained(root / name)
        for file in tiny_lm.glob("tokenizer*"):
            shutil.copy(file, root / name / file.name)
    return root


def hook_of(name: str) -> str:
    return f"{'encoder_' if name in ('t5', 'bart') else ''}blocks.1.hook_resid_post"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 6])
def test_activations_are_those_of_each_sequence_alone(folders, name, batch_size):
    kind, _, module, causal = MODELS[name]
    capture = Capture(find_model(str(folders / name)), [hook_of(name)], batch_size)
    assert capture.causal == causal
    model = getattr(transformers, kind).from_pretrained(folders / name, dtype=torch.float32).eval()
    seen = []
    model.get_submodule(module).register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    tokens = np.random.default_rng(0).integers(1, 300, (len(LENGTHS), 20)).astype(np.int32)
    activations = capture.run(tokens, LENGTHS)[hook_of(name)]
    for row, n, values in zip(tokens, LENGTHS, activations, strict=True):
        ids = torch.from_numpy(row[None, :n].astype(np.int64))
        with torch.no_grad():
            model(ids, decoder_input_ids=ids) if kind.startswith(("T5", "Bart")) else model(ids)
        expected = seen.pop()[0].numpy()
        np.testing.assert_allclose(values[:n], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_names_hooks_that_it_has(folders, name):
    with pytest.raises(ModelError, match="Unknown hook 'blocks.1.hook_resid_post'") as caught:
        Capture(find_model(str(folders / name)), ["blocks.1.hook_resid_post"], 4)
    names = re.findall(r"\w+blocks\.\d\.[\w.]+\w", str(caught.value))
    assert len(names) >= 4
    Capture(find_model(str(folders / name)), [names[-1]], 4)
    with pytest.raises(ModelError, match="is in the decoder .* reads the answer.* encoder_blocks.1.hook_resid_post"):
        Capture(find_model(str(folders / name)), ["decoder_blocks.1.hook_resid_post"], 4)


# What can be wrong with a model, one fault each: ids -> values [n, position, 2]


def _causal(ids):
    return torch.from_numpy(np.stack([np.cumsum(ids, 1), ids], -1)).float()


def _bidirectional(ids):
    return _causal(ids) + torch.from_numpy(ids.sum(1)).float()[:, None, None]


def _by_length(ids):
    return _causal(ids) * ids.shape[1]


def _next_token(ids):
    return _causal(np.roll(ids, -1, 1))


def _sees_padding(ids):
    return _causal(ids) + torch.from_numpy((ids == 0).sum(1)).float()[:, None, None] * 100


def _in_the_batch(ids):
    return _causal(ids) + float(ids[-1, 0])


def _random(ids):
    return _causal(ids) + torch.rand(1)


def _one_flip(ids):
    """A near tie between experts in one sequence, which rounding decides."""
    values = _causal(ids)
    values[0, 2] += float(ids[:, CUT:].sum() % 7)
    return values


def check(run, batch_size=4):
    return is_causal(lambda ids: {"hook": run(ids)}, "it", 97, batch_size, "float32")


@pytest.mark.parametrize(
    "run, causal",
    [
        (_causal, True),
        (_one_flip, True),
        (_bidirectional, False),
        (_by_length, False),
        (_next_token, False),
        (_sees_padding, False),
    ],
)
def test_whether_later_tokens_move_earlier_positions(run, causal):
    assert check(run) == causal


def test_what_no_way_of_batching_cures_is_refused():
    with pytest.raises(ModelError, match="other activations the second time: something in it is random"):
        check(_random)
    with pytest.raises(ModelError, match="depend on the other sequences in the batch.* Give --batch-size 1"):
        check(_in_the_batch)
    check(_in_the_batch, batch_size=1)


@pytest.mark.slow
def test_weights_are_loaded_once(tiny_config, tmp_path, monkeypatch):
    """By the bridge, the plain model, the sample and the tails together; the tail that was saved is read back."""
    from tcsae.harvest.run import harvest

    loaded = []
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def counted(cls, source, *arguments, **options):
        loaded.append(str(source))
        return load(cls, source, *arguments, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(counted))
    harvest(str(tmp_path / "a.zarr"), tiny_config)
    assert loaded.count(tiny_config.model.name) == 1
    assert [source for source in loaded if source != tiny_config.model.name and not source.endswith("tail")] == []


def test_the_bridge_leaves_the_shared_weights_as_they_were(tiny_lm):
    capture = Capture(find_model(str(tiny_lm)), ["blocks.2.hook_resid_post"], 4)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in capture.plain.state_dict().items())
