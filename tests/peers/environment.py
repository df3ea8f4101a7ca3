"""TC-SAE and SAELens in one process: each harvests or trains its own way, and loads the other's SAEs.

Run by environment.sh, where both are installed. Prints the versions and a line a check; exits with 1 if one fails.
"""

import importlib.metadata
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import tcsae

LIBRARIES = (
    "torch",
    "numpy",
    "pandas",
    "transformers",
    "transformer-lens",
    "datasets",
    "zarr",
    "numcodecs",
    "sae-lens",
)
ARCHITECTURES = ("topk", "relu-l1", "jumprelu", "batchtopk")
SMALL = {"sae.d_sae": 256, "sae.k": 8, "log_every": 10}
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md")
"""The text: installed documentation would be another in each environment, and take minutes to read."""
TOKENS = 8000
failed = []


def check(what: str, difference: float, allowed: float) -> None:
    good = difference <= allowed
    failed.extend([] if good else [what])
    print(f"{'ok' if good else 'FAILED'}: {what} ({difference:.2g}, allowed {allowed:g})")


def vectors(store: tcsae.Store) -> Iterator[torch.Tensor]:
    for batch in store.iterate(segment_length=16, batch_tokens=512, epochs=None):
        yield batch.x[batch.valid][:256]


@torch.no_grad()
def main(folder: Path) -> None:
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES))
    text = "\n\n".join((Path(tcsae.__file__).parent / page).read_text(encoding="utf-8") for page in PAGES)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n- ")))
    store = tcsae.harvest(folder / "a.zarr", dataset=folder / "text.jsonl", tokens=TOKENS, eval_every=4)
    x = next(vectors(store))
    check(
        "harvest: share of tokens not stored", abs(store.train.n_tokens + store.eval.n_tokens - TOKENS) / TOKENS, 0.05
    )
    with torch.enable_grad():
        runs = tcsae.train(store, folder / "runs", preset=ARCHITECTURES, set=SMALL, steps=20)

    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    for run in runs:
        theirs = SAE.load_from_disk(run.path)
        check(
            f"SAELens reads our {run.record['preset']}: codes",
            float((theirs.encode(x) - run.sae.encode(x)).abs().max()),
            1e-3,
        )

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=256, k=8))
    config = SAETrainerConfig(total_training_samples=256 * 20, train_batch_size_samples=256, lr_end=3e-4)
    with torch.enable_grad():
        SAETrainer(config, sae, vectors(store)).fit()
    sae.save_inference_model(folder / "runs" / "theirs")
    theirs, ours = SAE.load_from_disk(folder / "runs" / "theirs"), tcsae.load_sae(folder / "runs" / "theirs")
    check("we read SAELens' topk: codes", float((theirs.encode(x) - ours.encode(x)).abs().max()), 1e-3)
    check("we read SAELens' topk: reconstructions", float((theirs(x) - ours(x)).abs().max()), 1e-3)
    ours.save(folder / "saved")
    again = SAE.load_from_disk(folder / "saved")
    check("SAELens reads what sae.save wrote", float((again(x) - theirs(x)).abs().max()), 1e-3)
    table = tcsae.evaluate(store, folder / "runs", temporal=False).to_pandas()
    check("all are evaluated: missing", len(runs) + 1 - len(table), 0)
    text = tcsae.activations(runs[0].sae, "embedded", "Return True if the file exists.")
    check("codes in a live model: tokens without one", 1 - float(text.code.values.gt(0).any()), 0)
    rows = list(itertools.islice(store.to_dataset("eval", streaming=True), 2))
    check("as a Hugging Face dataset: missing rows", 2 - len(rows), 0)
    _transformer_lens(runs[0].sae, text)


def _transformer_lens(sae: tcsae.SparseAutoencoder, text: tcsae.TextActivations) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    from tcsae.data.model import embedded_model_path

    bridge = TransformerBridge.boot_transformers(str(embedded_model_path()), dtype=torch.float32, device="cpu")
    with tcsae.attach(sae, bridge) as live:
        bridge(text.ids[None])
    difference = (live.code.dense() - text.code.dense()).abs().max()
    check("codes through TransformerBridge and through transformers", float(difference), 1e-3)
    _hooked_transformer(sae)


def _hooked_transformer(sae: tcsae.SparseAutoencoder) -> None:
    """The older class, which version 4 has no longer: a small model of random weights."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return
    torch.manual_seed(0)
    d_model = sae.config.d_model
    shape = {"n_layers": 6, "d_model": d_model, "n_ctx": 32, "d_head": 32, "d_vocab": 100, "act_fn": "gelu"}
    model = HookedTransformer(HookedTransformerConfig(**shape))
    tokens = torch.arange(10)[None]
    hook = str(sae.metadata.hook)
    _, cache = model.run_with_cache(tokens)
    with tcsae.attach(sae, model) as live:
        model(tokens)
    check("codes in a HookedTransformer", float((live.dense() - sae.encode(cache[hook])).abs().max()), 1e-3)
    with tcsae.attach(sae, model, splice=True, error=True):
        again = model(tokens)
    check("splice with its error changes nothing", float((again - model(tokens)).abs().max()), 1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
    print(f"{len(failed)} failed" if failed else "all passed")
    sys.exit(bool(failed))
