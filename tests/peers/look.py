"""What other tools make of the exports that tests/peers/prepare.py wrote. Imports nothing of ours; see run.sh."""

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-4
N_LATENTS = 20


def close(name: str, code: Any, x_hat: Any, expected: Any) -> str:
    """The largest differences of codes and reconstructions to ours; raises if they are no rounding."""
    off = [
        float(np.abs(np.asarray(one.detach()) - expected[f"{name}.{what}"]).max())
        for one, what in ((code, "code"), (x_hat, "x_hat"))
    ]
    assert max(off) < TOLERANCE * np.abs(expected["x"]).max(), off
    return f"{name} off by {off[0]:.1e} in codes, {off[1]:.1e} in reconstructions"


def saelens(folder: Path, about: Any, expected: Any) -> str:
    from sae_lens import SAE

    result = []
    for name, run in about["runs"].items():
        for path in (Path(run), folder / "exports/saelens" / name):
            sae = SAE.load_from_disk(path)
            code = sae.encode(torch.from_numpy(expected["x"]))
            line = close(name, code, sae.decode(code), expected)
        result.append(f"{line} ({type(sae).__name__})")
    return "; ".join(result)


def dictionary_learning(folder: Path, about: Any, expected: Any) -> str:
    from dictionary_learning.utils import load_dictionary

    result = []
    for name in about["runs"]:
        sae, _ = load_dictionary(str(folder / "exports/dictionary_learning" / name), device="cpu")
        code = sae.encode(torch.from_numpy(expected["x"]))
        result.append(close(name, code, sae.decode(code), expected) + f" ({type(sae).__name__})")
    return "; ".join(result)


def sparsify(folder: Path, about: Any, expected: Any) -> str:  # noqa: ARG001
    from sparsify import SparseCoder

    result = []
    for name in ("topk", "relu"):
        sae = SparseCoder.load_from_disk(folder / "exports/sparsify" / name)
        made = sae.encode(torch.from_numpy(expected["x"]))
        code = torch.zeros(len(expected["x"]), sae.num_latents).scatter(-1, made.top_indices, made.top_acts)
        result.append(close(name, code, sae.decode(made.top_acts, made.top_indices), expected))
    return "; ".join(result)


def delphi(folder: Path, about: Any, expected: Any) -> str:  # noqa: ARG001
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    cache = folder / "exports/delphi/topk"
    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    files = sorted((cache / "latents" / about["hook"]).glob("*.safetensors"))
    counts: dict[int, int] = {}
    for file in files:
        latents = load_file(file)["locations"][:, 2].astype(int) + int(file.stem.split("_")[0])
        for latent in latents.tolist():
            counts[latent] = counts.get(latent, 0) + 1
    often = sorted(counts, key=lambda latent: -counts[latent])[:N_LATENTS]
    dataset = LatentDataset(
        raw_dir=cache / "latents",
        sampler_cfg=SamplerConfig(n_examples_train=10, n_examples_test=10),
        constructor_cfg=ConstructorConfig(min_examples=20, n_non_activating=10),
        tokenizer=tokenizer,
        latents={about["hook"]: torch.tensor(sorted(often))},
    )
    records = [one for one in dataset if one is not None]
    assert records
    for record in records:
        n = counts[record.latent.latent_index]
        assert abs(record.per_token_frequency * dataset.tokens.numel() - n) < 1e-3 * n + 1e-3
        assert record.train and record.test and record.not_active
    text = "".join(records[0].train[0].str_tokens) if records[0].train[0].str_tokens else ""
    return (
        f"{len(records)} of {len(often)} latents have examples to explain, {dataset.tokens.shape[0]} contexts of "
        f"{dataset.tokens.shape[1]}; latent {records[0].latent.latent_index}: {text[:60]!r}"
    )


def neuronpedia(folder: Path, about: Any, expected: Any) -> str:  # noqa: ARG001
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    n = n_shown = 0
    for file in sorted((folder / "exports/neuronpedia/topk").glob("batch-*.json")):
        values = json.loads(file.read_text())
        batch = NeuronpediaDashboardBatch(**values)
        assert batch.to_dict() == values, "SAEDashboard writes the same again"
        n += len(batch.features)
        n_shown += sum(len(feature.activations) for feature in batch.features)
    return f"SAEDashboard's classes read and write {n} features with {n_shown} sequences alike"


class Tokens:
    """As much of SAELens' ActivationsStore as SAEBench's core asks for."""

    def __init__(self, tokens: Any) -> None:
        self.tokens, self.context_size, self.store_batch_size_prompts = tokens, tokens.shape[1], len(tokens)

    def get_batch_tokens(self, n: int) -> Any:
        assert n == len(self.tokens)
        return self.tokens

    def reset_input_dataset(self) -> None:
        """Every batch is the same one."""


def embedded_model() -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(ROOT / "data" / "embedded"), dtype=torch.float32, device="cpu")


def sae_bench(folder: Path, about: Any, expected: Any) -> str:  # noqa: ARG001
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_lens import SAE

    sae = SAE.load_from_disk(about["runs"]["topk"])
    # The bridge: SAEBench 0.6.0 asks for what SAELens 6 has moved into the metadata.
    hook = sae.cfg.metadata.hook_name
    moved = {"hook_name": hook, "hook_layer": int(hook.split(".")[1]), "hook_head_index": None}
    sae.cfg.__dict__.update(moved, architecture_str=sae.cfg.architecture())
    tokens = torch.from_numpy(expected["tokens"]).long()
    kinds = {key: True for key in CoreEvalConfig.__dataclass_fields__ if key.startswith("compute_")}
    batches = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    config = CoreEvalConfig(batch_size_prompts=len(tokens), **batches, **kinds)
    metrics, _ = core.run_evals(sae, Tokens(tokens), embedded_model(), config)
    flat = {key: value for group in metrics.values() for key, value in group.items()}
    assert flat["l0"] == 16
    shown = ("explained_variance", "l0", "ce_loss_score", "kl_div_score")
    return ", ".join(f"{name} {flat[name]:.4f}" for name in shown)


def sae_probes(folder: Path, about: Any, expected: Any) -> str:  # noqa: ARG001
    from sae_lens import SAE
    from sae_probes import run_sae_evals
    from sae_probes.generate_model_activations import ensure_dataset_activations

    data, place = "105_click_bait", folder / "probes"
    model = {"model_name": "embedded", "model_cache_path": place / "model"}
    # Of a model that is on the Hub, sae-probes makes these itself.
    ensure_dataset_activations(
        dataset_short_names=[data],
        hook_names=[about["hook"]],
        device="cpu",
        max_seq_len=128,
        model=embedded_model(),
        **model,
    )
    sae = SAE.load_from_disk(about["runs"]["topk"])
    options = {"hook_name": about["hook"], "reg_type": "l1", "setting": "normal", "ks": [1, 16], "datasets": [data]}
    run_sae_evals(sae, results_path=place / "results", device="cpu", **model, **options)
    (file,) = (place / "results").rglob("*.json")
    rows = json.loads(file.read_text())
    return f"{data}: " + ", ".join(f"k = {row['k']}: test AUC {row['test_auc']:.3f}" for row in rows)


CHECKS: dict[str, Callable[[Path, Any, Any], str]] = {
    "SAELens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "delphi": delphi,
    "Neuronpedia": neuronpedia,
    "SAEBench": sae_bench,
    "sae-probes": sae_probes,
}


def main(folder: Path) -> int:
    about, expected = json.loads((folder / "about.json").read_text()), np.load(folder / "expected.npz")
    n = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for name, check in CHECKS.items():
        noise = io.StringIO()
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), torch.no_grad():
                seen = check(folder, about, expected)
            outcome = "passed"
        except ImportError as error:
            outcome, seen = "skipped", f"not installed here ({error})"
        except Exception:  # whatever another tool raises is what it makes of our files
            outcome, seen = "failed", f"{noise.getvalue()[-2000:]}\n{traceback.format_exc()}"
        n[outcome] += 1
        print(f"{outcome:8s}{name}: {seen}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in n.items()))
    return min(1, n["failed"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
