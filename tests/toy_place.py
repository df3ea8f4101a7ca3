"""A place to damage: a model folder, a sealed store, two trained and scored runs, an SAE of another tool, made in two
seconds without a harvest. No test itself; loaded by path, as nothing below tests/ is a package.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from tcsae.shared.commands.group import cli
from tcsae.shared.lm.tail import make_tail, save_tail
from tcsae.shared.sae.layout import record_digest
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.writer import Rows, open_writer

HOOK, LAYER, LENGTH, WIDTH, LATENTS = "blocks.1.hook_resid_post", 1, 12, 16, 24
N_SEQUENCES = {"train": 24, "eval": 12}
TRAIN = ("--set", f"sae.d_sae={LATENTS}", "--set", "sae.k=4", "--set", "data.n_segments=4")
TRAIN += ("--set", "data.segment_length=8", "--set", "log_every=1")
RUNS = ("topk", "temporal-topk")
"""Their folders are called so."""
FOREIGN = "foreign"


def make_model(folder: Path) -> Path:
    """A GPT-NeoX of three layers with random weights, and the tokenizer of conftest.py."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=300,
        max_position_embeddings=32,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    conftest.save_tokenizer(folder)
    return folder


def rows(split: str) -> Rows:
    """Whole documents of two sequences; the second one is shorter."""
    n, first = N_SEQUENCES[split], 0 if split == "train" else N_SEQUENCES["train"] // 2
    rng = np.random.default_rng(first)
    lengths = np.where(np.arange(n) % 2, rng.integers(3, LENGTH, n), LENGTH).astype(np.int32)
    tokens = rng.integers(1, 300, (n, LENGTH)).astype(np.int32)
    tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
    starts = (np.arange(n) % 2 * LENGTH).astype(np.int32)
    return Rows(tokens, lengths, first + np.arange(n, dtype=np.int64) // 2, starts)


def write_store(location: Path, model_folder: Path) -> None:
    """A sealed store of the model's residual stream, with tail and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    recipe = Recipe(
        model=ModelRecipe(name=str(model_folder), revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH, eval_every=0),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        n_tokens=1,
    )
    writer = open_writer(str(location), recipe, Layout(sequences_per_chunk=8))
    made = {split: rows(split) for split in SPLITS}
    writer.commit(made, {})
    counts = {split: {"sequences": len(r.lengths), "tokens": int(r.lengths.sum())} for split, r in made.items()}
    writer.finish_sequences({split: one | {"documents": one["sequences"] // 2} for split, one in counts.items()})
    for shard in writer.missing_shards():
        tokens = torch.from_numpy(writer.tokens(shard)).long()
        with torch.no_grad():
            stream = model(tokens, output_hidden_states=True).hidden_states[LAYER + 1]
        writer.write_shard(shard, {HOOK: stream.numpy()})
    with tempfile.TemporaryDirectory() as folder:
        save_tail(make_tail(model, LAYER + 1), Path(folder, "tail"))
        files = writer.add_folder(f"tail/{HOOK}", Path(folder, "tail"))
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(Path(folder, "tokenizer"))
        files += writer.add_folder("tokenizer", Path(folder, "tokenizer"))
    writer.seal({HOOK: {"layers": 1, "max_difference": 0.0}}, files, {})


def write_foreign(folder: Path) -> None:
    """A jumprelu SAE as SAELens writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (WIDTH, LATENTS), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,), "b_enc": (LATENTS,)}
    shapes["threshold"] = (LATENTS,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"hook_name": HOOK}}
    (folder / "cfg.json").write_text(json.dumps(config))


def call(place: Path, *arguments: str, store: str = "a.zarr") -> Result:
    """`tcsae` on the store and the runs of a place, in this process."""
    return CliRunner().invoke(cli, ["--store", str(place / store), "--runs", str(place / "runs"), *arguments])


def make_place(place: Path) -> Path:
    """place/{model,a.zarr,runs/{topk,temporal-topk,foreign}}, all finished and evaluated."""
    place.mkdir(parents=True, exist_ok=True)
    write_store(place / "a.zarr", make_model(place / "model"))
    write_foreign(place / "runs" / FOREIGN)
    for preset in RUNS:
        done = call(place, "train", "--preset", preset, "--steps", "3", *TRAIN)
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
        (made,) = (place / "runs").glob(f"{preset}-*")
        rename_run(made, preset)
    done = call(place, "eval")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return place


def rename_run(folder: Path, name: str) -> None:
    """Give a run a short name, which its record repeats."""
    record = json.loads((folder / "tcsae.json").read_text()) | {"name": name}
    record["files"]["tcsae.json"] = record_digest(record)
    (folder / "tcsae.json").write_text(json.dumps(record))
    folder.rename(folder.with_name(name))
