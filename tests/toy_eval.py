"""A language model of three layers, a store of its activations and SAEs for it: what tests of `eval` share.

No test itself; loaded by path, as nothing below tests/ is a package.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import make_tail, save_tail
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer

LAYER, HOOK = 1, "blocks.1.hook_resid_post"
LENGTH, WIDTH, VOCABULARY, LATENTS = 12, 16, 61, 40
N_SEQUENCES = {"train": 30, "eval": 20}
FROM_1 = CountingRules(skip_first=1)
"""What runs count by default."""


def make_model() -> GPTNeoXForCausalLM:
    """Three layers, random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    return GPTNeoXForCausalLM(config).eval()


@torch.no_grad()
def residual(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> np.ndarray:
    kept = []
    layer = model.gpt_neox.layers[LAYER]
    handle = layer.register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    model(torch.from_numpy(tokens).long())
    handle.remove()
    return (kept[0] if torch.is_tensor(kept[0]) else kept[0][0]).numpy()


def write_store(path: Path, model: GPTNeoXForCausalLM, n_sequences: dict[str, int], with_tail: bool = True) -> Store:
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        n_tokens=1,
    )
    writer = open_writer(str(path), recipe, Layout(sequences_per_chunk=8))
    assert writer is not None
    rng = np.random.default_rng(0)
    rows = {}
    for split in SPLITS:
        n = n_sequences[split]
        tokens = rng.integers(0, VOCABULARY, (n, LENGTH)).astype(np.int32)
        lengths = rng.integers(1, LENGTH + 1, n).astype(np.int32)
        rows[split] = Rows(tokens, lengths, np.arange(n) // 2, np.zeros(n, np.int32))
    writer.commit(rows, {})
    counts = {s: {"sequences": len(r.lengths), "tokens": int(r.lengths.sum())} for s, r in rows.items()}
    writer.finish_sequences({s: one | {"documents": one["sequences"] // 2} for s, one in counts.items()})
    for shard in writer.missing_shards():
        writer.write_shard(shard, {HOOK: residual(model, writer.tokens(shard))})
    tail = {"none": "the hook is no residual stream"}
    files = []
    if with_tail:
        folder = path.with_name(f"{path.name}-tail")
        save_tail(make_tail(model, LAYER + 1), folder)
        files, tail = writer.add_folder(f"tail/{HOOK}", folder), {"layers": 1, "max_difference": 0.0}
    writer.seal({HOOK: tail}, files, {})
    return open_store(path)


def make_sae(activation: str = "topk", d_model: int = WIDTH, seed: int = 0, **more: object) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SaeConfig(d_model=d_model, d_sae=LATENTS, activation=activation, k=5, **more))
    for tensor in sae.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator) / d_model**0.5
    sae.b_enc.data[3] = -1e6  # dead
    return sae


def make_place(path: Path, n_eval: int) -> Path:
    """A folder with a store, a.zarr, of so many eval sequences, and below runs an SAE named run."""
    store = write_store(path / "a.zarr", make_model(), {"train": 30, "eval": n_eval})
    make_run(path / "runs", "run", make_sae(), store)
    return path


def run_eval(store: Path, runs: Path, *arguments: str, name: str = "run") -> tuple[dict[str, Any], str]:
    """`tcsae eval` on a store and a folder of runs: what a run's eval.json holds, and what was printed."""
    done = CliRunner().invoke(cli, ["--store", str(store), "--runs", str(runs), "eval", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads((runs / name / "eval.json").read_text()), done.output


def make_run(runs: Path, name: str, sae: SparseAutoencoder, store: Store, **changes: object) -> Path:
    record = {
        "name": name,
        "preset": "topk",
        "hook": HOOK,
        "train": {"data": {"skip_first": 1, "hook": None}},
        "store": {"content": store.content},
        "steps": 7,
        "tokens": 700,
    }
    save_sae(sae, runs / name, record | changes, {})
    return runs / name
