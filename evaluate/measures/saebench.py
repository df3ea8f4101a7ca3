"""An evaluation as SAEBench 0.6.0's "core" JSON, every key of it, so that its own tools read ours.

Where SAEBench's definition is known to be another (`metrics.DEFINITIONS`), its key holds what its code computes; what
we take for right is in eval.json. As there, a figure that is not defined is -1.
"""

import time
import uuid
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tcsae import __version__
from tcsae.shared.sae.module import SparseAutoencoder

FILE = "saebench_core.json"
SAEBENCH_VERSION = "0.6.0"
BLOCK = 1024
"""Rows of latents compared at a time: 4 MB of cosines."""


def feature_details(
    sae: SparseAutoencoder, firings: Int[Tensor, "2 d_sae"], n_tokens: int
) -> dict[str, Float[Tensor, " d_sae"]]:
    """Per latent, by SAEBench's names: how often it fires, and what its weights look like. NaN where undefined."""
    tokens, sequences = firings.double()
    W_enc, W_dec = sae.W_enc_rows.detach(), sae.W_dec.detach()
    return {
        "feature_density": tokens / n_tokens,
        "consistent_activation_heuristic": tokens / sequences,
        "encoder_bias": sae.b_enc.detach(),
        "encoder_norm": W_enc.norm(dim=1),
        "encoder_decoder_cosine_sim": functional.cosine_similarity(W_dec, W_enc),
        "max_decoder_cosine_sim": max_cosines(W_dec),
        "max_encoder_cosine_sim": max_cosines(W_enc),
    }


def max_cosines(rows: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_sae"]:
    """Each row's largest cosine with any other row; -inf if there is only one."""
    unit = functional.normalize(rows, dim=1)
    best = rows.new_full((len(rows),), -torch.inf)
    for first in range(0, len(rows), BLOCK):
        one = slice(first, first + BLOCK)
        for second in range(first, len(rows), BLOCK):  # each pair of blocks once
            other = slice(second, second + BLOCK)
            cosines = unit[one] @ unit[other].T
            if first == second:
                cosines.fill_diagonal_(-torch.inf)
            best[one] = torch.maximum(best[one], cosines.amax(1))
            best[other] = torch.maximum(best[other], cosines.amax(0))
    return best


def misc_metrics(details: dict[str, Float[Tensor, " d_sae"]]) -> dict[str, float]:
    """SAEBench's `misc_metrics`: shares of latents, and of all firings, above a density."""
    density = details["feature_density"]
    total = float(density.sum())

    def share(bound: float) -> float:
        return float(density[density > bound].sum()) / total if total > 0 else 0.0

    return {
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": share(0.01),
        "normalized_freq_over_10_percent": share(0.1),
        "average_max_encoder_cosine_sim": float(details["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(details["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).double().mean()),
    }


GROUPS = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
}
AS_SAEBENCH = {
    "explained_variance": "explained_variance_saebench",
    "mse": "mse_saebench",
    "l0": "l0_nonzero",
    "l1": "l1_signed",
}
"""Keys under which SAEBench's code computes something else than ours of the same name."""


def core_output(
    evaluation: dict[str, Any], sae: SparseAutoencoder, details: dict[str, Float[Tensor, " d_sae"]], model_name: str
) -> dict[str, Any]:
    """The whole file, from an eval.json and the latents' details."""
    figures, options = evaluation["metrics"], evaluation["options"]
    groups: dict[str, Any] = {
        group: {key: _number(figures.get(AS_SAEBENCH.get(key, key))) for key in keys} for group, keys in GROUPS.items()
    }
    groups["token_stats"] = {
        "total_tokens_eval_reconstruction": evaluation["n_ce_tokens"],
        "total_tokens_eval_sparsity_variance": evaluation["n_tokens"] + evaluation["n_tokens_skipped"],
    }
    groups["misc_metrics"] = {key: _number(value) for key, value in misc_metrics(details).items()}
    columns = {name: values.double().tolist() for name, values in details.items()}
    has_tail = evaluation["no_tail"] is None
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": model_name,
            "llm_dtype": "float32",
            "batch_size_prompts": evaluation["n_sequences"],
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
            "dataset": evaluation["store"]["location"],
            "context_size": evaluation["sequence_length"],
            "compute_kl": has_tail,
            "compute_ce_loss": has_tail,
            "compute_l2_norms": True,
            "compute_sparsity_metrics": True,
            "compute_variance_metrics": True,
            "compute_featurewise_density_statistics": True,
            "compute_featurewise_weight_based_metrics": True,
            "exclude_special_tokens_from_reconstruction": options["splice"] == "counted",
            "verbose": False,
        },
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": groups,
        "eval_result_details": [
            {"index": i} | {name: _number(values[i]) for name, values in columns.items()}
            for i in range(sae.config.d_sae)
        ],
        "sae_bench_commit_hash": f"none: written by tcsae {__version__} in the form of SAEBench {SAEBENCH_VERSION}",
        "sae_lens_id": evaluation["name"],
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": sae.saelens_config(),
        "eval_result_unstructured": {
            "definitions": evaluation["definitions"],
            "definition_version": evaluation["definition_version"],
            "computed_as": AS_SAEBENCH,
        },
    }


def _number(value: float | None) -> float:
    """SAEBench writes -1 for NaN, and ours has no infinities in JSON."""
    return -1.0 if value is None or not torch.isfinite(torch.tensor(value)) else round(float(value), 10)
