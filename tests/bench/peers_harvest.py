"""Tokens a second from a language model to disk: SAELens' CacheActivationsRunner and our harvest, on one core.

    peers/bin/python tests/bench/peers_harvest.py         # the environment: see peers.py beside this file

Pythia-70m's exact shape with random weights, the same for all, offline; the output of block 4; whole sequences of 128
tokens, already tokenized. Timed is the model's forward pass and everything until the store can be read (ours: phase 2
and the seal), not the loading of the model. The yardstick is the bare forward pass of the five blocks, nothing written.
First the activations of all are compared.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternate import alternate, one_core, report
from peers import quiet, versions

HOOK, N_BLOCKS, D_MODEL, LENGTH, VOCABULARY, BATCH = "blocks.4.hook_resid_post", 5, 512, 128, 50304, 32
Contestant = Callable[[Path], Any]
"""Harvests into a new folder; returns something by which its activations can be read."""


def save_model(folder: Path) -> Path:
    """A GPT-NeoX of Pythia-70m's shape with random weights, and a tokenizer of one word an id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with quiet():
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    end = "<|endoftext|>"
    words = Tokenizer(models.WordLevel({end: 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end, pad_token=end).save_pretrained(folder)
    return folder


def bare(model: Path, tokens: np.ndarray) -> Contestant:
    """The blocks up to the hook and nothing else."""
    from transformers import AutoModelForCausalLM

    with quiet():
        blocks = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().gpt_neox
    blocks.layers = blocks.layers[:N_BLOCKS]
    blocks.final_layer_norm = torch.nn.Identity()
    ids = torch.from_numpy(tokens).long()

    def run(_: Path) -> torch.Tensor:
        with torch.inference_mode():
            parts = [blocks(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(BATCH)]
            return parts[0]

    return run


def ours(model: Path, tokens: np.ndarray) -> Contestant:
    """Phase 2 and the seal, from a plan that is on disk."""
    from tcsae.harvest.capture import Capture
    from tcsae.harvest.language_model import find_model
    from tcsae.harvest.phases import write_activations
    from tcsae.shared.store.format import CorpusRecipe, ModelRecipe, Recipe, SequenceRecipe
    from tcsae.shared.store.reader import open_store
    from tcsae.shared.store.writer import Rows, open_writer

    capture = Capture(find_model(str(model)), [HOOK], BATCH)
    n = len(tokens)
    recipe = Recipe(
        model=ModelRecipe(name="random", revision="none", batch_size=BATCH),
        corpus=CorpusRecipe(name="random", revision="none"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=capture.hooks,
        n_tokens=tokens.size,
        libraries={},
    )
    rows = Rows(tokens.astype(np.int32), np.full(n, LENGTH, np.int32), np.arange(n), np.zeros(n, np.int32))
    none = rows.part(slice(0))
    counts = {
        name: {"sequences": len(part.lengths), "tokens": part.tokens.size, "documents": len(part.lengths)}
        for name, part in (("train", rows), ("eval", none))
    }

    def run(folder: Path) -> Any:
        writer = open_writer(str(folder / "store.zarr"), recipe)
        assert writer is not None
        with writer, quiet():
            writer.commit({"train": rows, "eval": none}, {})
            writer.finish_sequences(counts)
            write_activations(writer, capture)
            writer.seal({HOOK: {"none": "not timed"}}, [], {})
        return open_store(folder / "store.zarr").train.read(HOOK, 0, BATCH)

    return run


def saelens(model: Path, tokens: np.ndarray, backend: str, dtype: str) -> Contestant:
    """CacheActivationsRunner; `backend` "HookedTransformer", or "AutoModelForCausalLM" with hooks."""
    from datasets import Dataset, disable_progress_bars
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner
    from sae_lens.load_model import load_model

    disable_progress_bars()
    hook = HOOK if backend == "HookedTransformer" else "gpt_neox.layers.4"
    if backend == "HookedTransformer":
        loaded = hooked_transformer(model)
    else:
        with quiet():
            loaded = load_model(backend, str(model), "cpu", hook_names=[hook])
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    itemsize = {"float32": 4, "float16": 2}[dtype]

    def run(folder: Path) -> Any:
        config = CacheActivationsRunnerConfig(
            dataset_path="random",
            model_name=str(model),
            model_class_name=backend,
            model_batch_size=BATCH,
            hook_name=hook,
            d_in=D_MODEL,
            training_tokens=tokens.size,
            context_size=LENGTH,
            new_cached_activations_path=str(folder / "cache"),
            shuffle=False,
            dtype=dtype,
            device="cpu",
            buffer_size_gb=(tokens.size * D_MODEL * itemsize + 1000) / 1e9,
            prepend_bos=False,
            streaming=False,
        )
        cache_activations_runner.load_model = lambda **_: loaded  # the model is loaded once
        with quiet():
            result = CacheActivationsRunner(config, override_dataset=data).run()
        assert len(result) == len(tokens), f"{len(result)} sequences of {len(tokens)}"
        return np.array(result.with_format("numpy")[:BATCH][hook])

    return run


def hooked_transformer(model: Path) -> Any:
    """TransformerLens' own model with the folder's weights, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = HookedTransformerConfig(
        n_layers=6,
        d_model=D_MODEL,
        n_ctx=2048,
        d_head=64,
        n_heads=8,
        d_mlp=2048,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=16,
        parallel_attn_mlp=True,
        device="cpu",
        default_prepend_bos=False,
    )
    with quiet():
        hooked = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(model))
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        hooked.load_and_process_state_dict(
            convert_neox_weights(plain, config),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    return hooked.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=128)
    asked = parser.parse_args()
    one_core()
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (asked.sequences, LENGTH))
    with tempfile.TemporaryDirectory() as temporary:
        model = save_model(Path(temporary) / "model")
        contestants = {
            "bare forward": bare(model, tokens),
            "tcsae, float16": ours(model, tokens),
            "SAELens, HookedTransformer, float32": saelens(model, tokens, "HookedTransformer", "float32"),
            "SAELens, HookedTransformer, float16": saelens(model, tokens, "HookedTransformer", "float16"),
            "SAELens, AutoModel, float32": saelens(model, tokens, "AutoModelForCausalLM", "float32"),
        }
        numbers = itertools.count()

        def fresh(run: Contestant) -> Any:
            folder = Path(temporary) / f"out-{next(numbers)}"
            folder.mkdir()
            try:
                return run(folder)
            finally:
                shutil.rmtree(folder)

        expected = np.asarray(contestants["bare forward"](Path(temporary)), np.float32)
        scale = float(np.sqrt((expected**2).mean()))
        for name, run in contestants.items():
            worst = np.abs(np.asarray(fresh(run), np.float32) - expected).max() / scale
            print(f"{name:44s} differs from the bare forward by {worst:.1e} of the activations' scale")
        timed = {name: lambda run=run: (fresh(run), tokens.size)[1] for name, run in contestants.items()}
        times = alternate(timed, asked.rounds)
    times.show("token", "bare forward")
    report("peers_harvest", times, "bare forward", n_tokens=tokens.size, batch=BATCH, versions=versions())


if __name__ == "__main__":
    main()
