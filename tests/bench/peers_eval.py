"""What SAELens and SAEBench themselves make of our tokens and SAEs: figures that the tests compare ours with.

    python tests/bench/peers_eval.py prepare FOLDER               here: tokens and SAEs, in SAELens' layout
    PEERS/bin/python tests/bench/peers_eval.py run FOLDER OUT      in an environment of its own, see below
    PEERS/bin/python tests/bench/peers_eval.py validate FILE ...   saebench_core.json against SAEBench's own schema

The second environment: `python -m venv PEERS; PEERS/bin/pip install -c constraints.txt sae-lens sae-bench` and then
`PEERS/bin/pip uninstall torchvision` (it is not needed, and one for another torch breaks transformers). No Hub access:
the language model is the embedded one. The figures lie in tests/golden/peers_eval.json: `run FOLDER` writes that file
anew when OUT is its path.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "peers_eval.json"
HOOK, D_MODEL, D_SAE = "blocks.4.hook_resid_post", 128, 192
N_SEQUENCES, LENGTH, BOS = 24, 96, 0
STORES = ("bos", "plain")
"""Sequences that begin with BOS, and the same without any special token; all of full length."""


def make_sae(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(cfg.json, weights) of one of ARCHITECTURES, from a generator that never changes (numpy's RandomState)."""
    rng = np.random.RandomState(sorted(ARCHITECTURES).index(name))
    decoder = rng.standard_normal((D_SAE, D_MODEL))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    encoder = decoder.T.copy()
    weights = {"W_enc": encoder, "W_dec": decoder, "b_dec": 0.2 * rng.standard_normal(D_MODEL)}
    weights["b_enc"] = 0.1 * rng.standard_normal(D_SAE) - 1.0
    if name == "jumprelu":
        weights["threshold"] = 1.5 + rng.random_sample(D_SAE)
    if name == "gated":
        weights["b_gate"], weights["b_mag"] = weights["b_enc"] - 1, weights.pop("b_enc")
        weights["r_mag"] = 0.2 * rng.standard_normal(D_SAE)
    if name == "topk_rescaled":
        weights["W_dec"] = decoder * (0.5 + rng.random_sample((D_SAE, 1)))
    if name == "standard":
        weights["W_enc"][:, :3] = -1e3 * np.sign(encoder[:, :3])
        weights["b_enc"][:3] = -1e6  # dead
    config = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "model_name": "embedded", "hook_name": HOOK, "hook_head_index": None},
    } | ARCHITECTURES[name]
    return config, {key: value.astype(np.float32) for key, value in weights.items()}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "standard_uncentred": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {"architecture": "topk", "k": 16, "rescale_acts_by_decoder_norm": False},
    "topk_rescaled": {"architecture": "topk", "k": 16, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
}


def write_sae(name: str, folder: Path) -> str:
    """Write one SAE in SAELens' layout; sha256 of its weights' bytes."""
    config, weights = make_sae(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, folder / "sae_weights.safetensors")
    return digest(weights[key] for key in sorted(weights))


def digest(arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in arrays)).hexdigest()


def store_tokens(kind: str, tokens: np.ndarray) -> np.ndarray:
    """[n_sequences, length] of a store: the text alone, or after BOS."""
    return tokens if kind == "plain" else np.concatenate([np.full((len(tokens), 1), BOS), tokens[:, :-1]], 1)


def prepare(folder: Path) -> None:
    """Tokens of this project's own source files, and the SAEs."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "data" / "embedded" / "tokenizer.json"))
    rows = []
    for path in sorted(ROOT.glob("shared/*.py")):
        ids = tokenizer.encode(path.read_text()).ids
        if len(ids) >= LENGTH and len(rows) < N_SEQUENCES:
            rows += [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)][:3]
    tokens = np.array(rows[:N_SEQUENCES])
    assert tokens.shape == (N_SEQUENCES, LENGTH) and not (tokens == BOS).any()
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", tokens)
    for name in ARCHITECTURES:
        write_sae(name, folder / name)


class Tokens:
    """As much of SAELens' ActivationsStore as the evaluations ask for."""

    def __init__(self, tokens: Any) -> None:
        self.tokens, self.context_size, self.store_batch_size_prompts = tokens, tokens.shape[1], len(tokens)

    def get_batch_tokens(self, n: int) -> Any:
        assert n == len(self.tokens)
        return self.tokens

    def reset_input_dataset(self) -> None:
        """Every batch is the same one."""


class OldConfig:
    """SAEBench 0.6.0 asks for what SAELens 6 has moved into the metadata."""

    hook_name, hook_head_index, hook_layer = HOOK, None, 4

    def __init__(self, config: Any) -> None:
        self._config = config
        self.architecture_str = config.architecture()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def run(folder: Path, out: Path) -> None:
    """Both peers on all stores and SAEs; write the golden file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(ROOT / "data" / "embedded"), dtype=torch.float32, device="cpu")
    text = np.load(folder / "tokens.npy")
    result: dict[str, Any] = {"versions": versions(), "tokens": text.tolist(), "weights": {}, "figures": {}}
    for name in ARCHITECTURES:
        result["weights"][name] = write_sae(name, folder / name)
        for kind in STORES:
            tokens = torch.from_numpy(store_tokens(kind, text))
            result["figures"][f"{name} {kind}"] = {
                "sae_lens": run_sae_lens(model, folder / name, Tokens(tokens)),
                "sae_bench": run_sae_bench(model, folder / name, Tokens(tokens), False)[0],
                "sae_bench_excluding": run_sae_bench(model, folder / name, Tokens(tokens), True)[0],
            }
            print(name, kind, "done", flush=True)
    tokens = torch.from_numpy(store_tokens("bos", text))
    _, result["features"], result["keys"] = run_sae_bench(model, folder / "topk", Tokens(tokens), False)
    result["features"] = {key: [round(one, 7) for one in values] for key, values in result["features"].items()}
    # Lists of numbers on one line each.
    lines = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), json.dumps(result, indent=1))
    out.write_text(lines + "\n")


def run_sae_lens(model: Any, folder: Path, tokens: Tokens) -> dict[str, float]:
    """SAELens' run_evals, all metrics, in one flat dictionary."""
    from sae_lens import SAE, evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = evals.get_eval_everything_config(len(tokens.tokens), 1, 1)
    sae = SAE.load_from_disk(folder)
    metrics, _ = evals.run_evals(sae, tokens, model, ActivationScaler(), config)
    return {key: value for group in metrics.values() for key, value in group.items()}


def run_sae_bench(model: Any, folder: Path, tokens: Tokens, excluding: bool) -> tuple[dict[str, float], Any, Any]:
    """SAEBench's core: (figures, details per latent, the keys and types of the file that it writes)."""
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    sae.cfg = OldConfig(sae.cfg)
    config = CoreEvalConfig(
        batch_size_prompts=len(tokens.tokens),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        exclude_special_tokens_from_reconstruction=excluding,
        **{key: True for key in CoreEvalConfig.__dataclass_fields__ if key.startswith("compute_")},
    )
    special = {model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    metrics, features = core.run_evals(sae, tokens, model, config, ignore_tokens=special)
    metrics["misc_metrics"] = core.calculate_misc_metrics(features)
    whole = {"metrics": metrics, "feature_metrics": features, "eval_cfg": config, "sae_set": "a", "sae_id": "b"}
    cleaned = core.replace_nans_with_negative_one(whole)
    written = folder / "sae_bench.json"
    core.save_single_eval_result(cleaned, "id", "6", "hash", str(written), sae)
    flat = {key: value for group in cleaned["metrics"].values() for key, value in group.items()}
    return flat, cleaned["feature_metrics"], kinds(json.loads(written.read_text()))


def kinds(value: Any) -> Any:
    """The keys of nested dictionaries, of lists their first entry, and the names of types."""
    if isinstance(value, dict):
        return {key: kinds(one) for key, one in value.items()}
    if isinstance(value, list):
        return [kinds(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def validate(files: list[Path]) -> None:
    """Raise if one of ours is not what SAEBench's pydantic model takes."""
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    for file in files:
        TypeAdapter(CoreEvalOutput).validate_json(file.read_text())
        print(f"{file}: valid")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sae-lens", "sae-bench", "torch", "transformer-lens", "transformers")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "validate"))
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    match arguments.command:
        case "prepare":
            prepare(arguments.paths[0])
        case "run":
            run(arguments.paths[0], arguments.paths[1] if len(arguments.paths) > 1 else GOLDEN)
        case "validate":
            validate(arguments.paths)


if __name__ == "__main__":
    main()
