"""The tail does exactly what the language model does after the hook, or there is none."""

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from tcsae.data.model import embedded_model_path
from tcsae.shared.lm import tail as tail_module
from tcsae.shared.lm.tail import Tail, TailError, make_tail, save_tail, tail_start, verify_tail

VOCABULARY, WIDTH, LAYERS, POSITIONS = 97, 32, 4, 24
LENGTHS = torch.tensor([POSITIONS, 17, 2, 1, 0])

GPT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = GPT | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
SHAPE |= {"max_position_embeddings": 64, "pad_token_id": 0}  # Llama and Gemma treat the padding's embedding specially
GROUPED = SHAPE | {"num_key_value_heads": 2}
CONFIGS: dict[str, Callable] = {
    "gpt-neox": lambda: GPTNeoXConfig(**SHAPE),
    "gpt2": lambda: GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, **GPT),
    "llama": lambda: LlamaConfig(**GROUPED),
    # a window shorter than the sequences: every second layer sees less than the others, so their order matters
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "gpt-neo": lambda: GPTNeoConfig(attention_types=[[["global", "local"], 2]], window_size=5, **SHAPE),
    "bloom": lambda: BloomConfig(hidden_size=WIDTH, n_layer=LAYERS, n_head=4, **GPT),
}
FAMILIES = ["gpt-neox", "gpt2", "llama", "gemma2", "gpt-neo"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Whole:
    """A language model and one run of it: activations[i] goes into layer i, the last one into the final norm."""

    model: PreTrainedModel
    tokens: Tensor
    activations: list[Tensor]
    logits: Tensor


@functools.cache
def whole(family: str) -> Whole:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    tokens = torch.randint(VOCABULARY, (len(LENGTHS), POSITIONS))
    return run(model, tokens)


def run(model: PreTrainedModel, tokens: Tensor) -> Whole:
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    # output_hidden_states would not do: its last entry comes after the final norm
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in layers]
    hooks.append(
        layers[-1].register_forward_hook(lambda _, __, out: seen.append(out[0] if type(out) is tuple else out))
    )
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) + 1
    return Whole(model, tokens, seen, logits)


@every_family
@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_tail_repeats_the_model_from_every_layer(family: str, start: int) -> None:
    lm = whole(family)
    model = make_tail(lm.model, start)
    tail = Tail(model)

    assert (tail.logits(lm.activations[start]) - lm.logits).abs().max() < 1e-4
    assert verify_tail(model, lm.activations[start], lm.logits, LENGTHS) < 1e-4
    assert (tail.n_layers, tail.d_model, tail.vocabulary) == (LAYERS - start, WIDTH, VOCABULARY)
    assert type(model) is type(lm.model)


@every_family
def test_padding_changes_nothing_and_needs_no_mask(family: str) -> None:
    lm = whole(family)
    activations = lm.activations[1].clone()
    for row, length in enumerate(LENGTHS.tolist()):
        activations[row, length:] = 1e3
    logits = Tail(make_tail(lm.model, 1)).logits(activations)

    for row, length in enumerate(LENGTHS.tolist()):
        if length:
            alone = run(lm.model, lm.tokens[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row, :length], alone, atol=1e-4, rtol=0)


@every_family
def test_logits_fill_the_memory_they_are_given(family: str) -> None:
    lm = whole(family)
    tail = Tail(make_tail(lm.model, 2))
    hidden = tail.hidden(lm.activations[2]).flatten(0, 1)
    if family == "gpt-neox":  # of the families with a bias there, none is among these
        tail._unembedding.bias = nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    out = torch.full((len(hidden), VOCABULARY), torch.nan)
    assert tail.unembed(hidden, out) is out
    torch.testing.assert_close(out, tail.unembed(hidden))


def test_slices_carry_a_kl_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "SLICE_MIN_TOKENS", 50)
    monkeypatch.setattr(tail_module, "SLICE_LOGITS", 1)
    lm = whole("gemma2")
    tail = Tail(make_tail(lm.model, 2))
    clean, spliced = (tail.hidden(x).flatten(0, 1) for x in (lm.activations[2], lm.activations[2] * 0.9))

    seen, divergence = 0, torch.zeros(len(clean))
    for part, (p, q) in tail.slices(clean, spliced):
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergence[part] = (p.exp() * (p - q)).sum(-1)
        seen += 1
    p, q = lm.logits.flatten(0, 1).log_softmax(-1), tail.logits(lm.activations[2] * 0.9).flatten(0, 1).log_softmax(-1)
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence, expected, atol=1e-4, rtol=1e-4)
    assert seen == 3  # 5 x 24 tokens, 50 at a time


@every_family
def test_a_tail_of_a_tail_is_a_tail(family: str) -> None:
    lm = whole(family)
    final_norm = Tail(make_tail(make_tail(lm.model, 1), LAYERS - 1))
    assert (final_norm.logits(lm.activations[LAYERS]) - lm.logits).abs().max() < 1e-4


@every_family
@pytest.mark.parametrize("start", [1, LAYERS])
def test_saved_and_loaded_it_is_the_same(family: str, start: int, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    lm = whole(family)
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity_warning()
    save_tail(make_tail(lm.model, start), tmp_path / "tail")
    save_tail(make_tail(lm.model, start), tmp_path / "tail")  # a resumed harvest writes it again
    tail = Tail.load(tmp_path / "tail")

    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled() and transformers_logging.get_verbosity() == logging.WARNING
    assert (tail.logits(lm.activations[start]) - lm.logits).abs().max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["tail"]
    assert {path.name for path in (tmp_path / "tail").iterdir()} == {"config.json", "model.safetensors"}
    weights = load_file(tmp_path / "tail" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum(weight.shape == (VOCABULARY, WIDTH) for weight in weights.values()) == 1  # the unembedding, once


def test_any_rank_of_a_process_group_can_save_one(tmp_path: Path) -> None:
    """transformers writes on rank 0 alone, unless it is told otherwise."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        save_tail(make_tail(whole("llama").model, 1), tmp_path / "tail")
    finally:
        torch.distributed.destroy_process_group()
    assert Tail.load(tmp_path / "tail").n_layers


def test_half_precision_store_and_model(tmp_path: Path) -> None:
    lm = whole("llama")
    half = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float16)
    half.load_state_dict(lm.model.state_dict())
    tail = Tail(make_tail(half, 3))
    logits = tail.logits(lm.activations[3].half())

    assert logits.dtype == torch.float32
    assert 0 < (logits - lm.logits).abs().max() < 0.05 * lm.logits.std()  # float16 has three digits
    with pytest.raises(TailError, match=r"differ .* 0\.001 is allowed; .* half precision"):
        verify_tail(tail.model, lm.activations[3], lm.logits, LENGTHS)
    half.save_pretrained(tmp_path / "half")
    assert Tail.load(tmp_path / "half").model.dtype == torch.float32


@every_family
@pytest.mark.parametrize("shift", [-1, 1])
def test_verify_refuses_a_tail_off_by_one_layer(family: str, shift: int) -> None:
    lm = whole(family)
    for start in range(1, LAYERS):
        with pytest.raises(TailError, match="log-probabilities differ"):
            verify_tail(make_tail(lm.model, start + shift), lm.activations[start], lm.logits, LENGTHS)


def test_verify_looks_at_valid_positions_only_and_refuses_nan() -> None:
    lm = whole("gpt-neox")
    model = make_tail(lm.model, 2)
    logits = lm.logits.clone()
    logits[1, 17:] = torch.nan
    assert verify_tail(model, lm.activations[2], logits, LENGTHS) < 1e-4

    logits[1, 16, 3] = torch.nan
    with pytest.raises(TailError, match="differ from the whole model's by nan"):
        verify_tail(model, lm.activations[2], logits, LENGTHS)
    logits[1, 16] = lm.logits[1, 16] + torch.linspace(0, 0.01, VOCABULARY)
    with pytest.raises(TailError, match="log-probabilities differ"):
        verify_tail(model, lm.activations[2], logits, LENGTHS)
    with pytest.raises(TailError, match="no token to verify it on"):
        verify_tail(model, lm.activations[2], lm.logits, torch.zeros_like(LENGTHS))


def test_an_architecture_with_more_to_it_gets_no_tail() -> None:
    lm = whole("bloom")  # it normalises embeddings before its first layer, inputs_embeds too
    with pytest.raises(TailError, match=r"^No tail: .* BloomForCausalLM does more around its layers than is known"):
        verify_tail(make_tail(lm.model, 2), lm.activations[2], lm.logits, LENGTHS)
    with pytest.raises(TailError, match=r"No tail: BloomForCausalLM cannot run on activations \(RuntimeError: "):
        verify_tail(make_tail(lm.model, 2), lm.activations[2][..., :5], lm.logits, LENGTHS)


def test_the_model_is_copied_not_touched() -> None:
    lm = whole("gemma2")
    config, random = lm.model.config.to_json_string(), torch.random.get_rng_state()
    weights = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    tail = make_tail(lm.model, 1)
    for weight in tail.parameters():
        weight.zero_()

    assert all(torch.equal(weight, weights[name]) for name, weight in lm.model.state_dict().items())
    assert lm.model.config.to_json_string() == config
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not tail.training and not any(weight.requires_grad for weight in tail.parameters())


@pytest.mark.parametrize(
    ("hook", "start"), [("hook_resid_pre", 2), ("hook_in", 2), ("hook_resid_post", 3), ("hook_out", 3)]
)
def test_the_hook_says_where_the_tail_starts(hook: str, start: int) -> None:
    assert tail_start(f"blocks.2.{hook}", n_layers=3) == start
    with pytest.raises(TailError, match="is not in the model: it has blocks 0 to 1"):
        tail_start(f"blocks.2.{hook}", n_layers=2)


@pytest.mark.parametrize(
    "hook", ["blocks.2.attn.hook_out", "blocks.2.hook_resid_mid", "hook_embed", "blocks.2.hook_in_"]
)
def test_other_hooks_have_no_tail(hook: str) -> None:
    with pytest.raises(TailError, match=f"^{hook} is not a residual stream: only blocks.N.hook_resid_pre"):
        tail_start(hook, n_layers=3)


def test_load_refuses_what_is_missing_or_damaged(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    transformers_logging.add_handler(handler)
    path = tmp_path / "tail"
    with pytest.raises(TailError, match=r"No tail at .*tail: there is no config\.json"):
        Tail.load(path)

    save_tail(make_tail(whole("llama").model, 3), path)
    file = path / "model.safetensors"
    stored = file.read_bytes()
    weights = load_file(file)
    for name, changed in {
        "model.norm.weight": {name: w for name, w in weights.items() if name != "model.norm.weight"},
        "model.layers.1.extra": weights | {"model.layers.1.extra": torch.zeros(3)},
    }.items():
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(TailError, match=rf"does not fit its config\.json \({name}\)"):
            Tail.load(path)
    file.write_bytes(stored[:-100])
    with pytest.raises(TailError, match="cannot be read"):
        Tail.load(path)
    file.unlink()
    with pytest.raises(TailError, match="cannot be read"):
        Tail.load(path)
    transformers_logging.remove_handler(handler)
    assert not logged and capfd.readouterr() == ("", "")


def test_the_embedded_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    lm = run(model, torch.arange(2 * 128).reshape(2, 128))
    save_tail(make_tail(model, tail_start("blocks.4.hook_resid_post", n_layers=6)), tmp_path / "tail")
    assert verify_tail(Tail.load(tmp_path / "tail").model, lm.activations[5], lm.logits, torch.tensor([128, 60])) < 1e-4


@pytest.mark.slow
def test_evaluation_needs_no_language_model(tmp_path: Path) -> None:
    lm = whole("gpt-neox")
    save_tail(make_tail(lm.model, 3), tmp_path / "tail")
    program = """if True:
        import json, sys, torch
        from tcsae.shared.lm.tail import Tail
        light = "transformers" not in sys.modules
        from pathlib import Path
        tail = Tail.load(Path(sys.argv[1]))
        logits = tail.logits(torch.ones(1, 4, tail.d_model))
        print(json.dumps([light, sorted({"transformer_lens", "datasets"} & set(sys.modules)), logits[0, -1].tolist()]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "tail"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    light, loaded, logits = json.loads(done.stdout)
    assert light and loaded == []
    expected = Tail(make_tail(lm.model, 3)).logits(torch.ones(1, 4, WIDTH))[0, -1]
    assert logits == pytest.approx(expected.tolist(), abs=1e-5)
