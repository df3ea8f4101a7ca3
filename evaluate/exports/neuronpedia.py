"""Feature dashboards for Neuronpedia: the batches of JSON that SAEDashboard writes and Neuronpedia's converter reads.

`convert-saedashboard-to-neuronpedia-export.py` of Neuronpedia's utils takes the folder. Every live feature has its
strongest sequences, sequences from five intervals of its activation, a histogram, the tokens that it promotes and
suppresses through the layers after the hook, and its decoder row (to steer with). What SAEDashboard draws from weights
that the store does not hold (neurons of the MLP, logits of all tokens) is empty.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.batches import batches
from tcsae.evaluate.exports.feature_source import FeatureSource
from tcsae.evaluate.measures.core import join_codes
from tcsae.evaluate.report.features.contexts import N_TOP, Context
from tcsae.evaluate.report.features.feature_pass import Features, collect_features
from tcsae.evaluate.report.features.lens import Lens, Lenses
from tcsae.evaluate.systems import code_parts
from tcsae.shared.base.files import write_atomic
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.sparse import SparseCode, positive_code

BATCH_FEATURES = 128
"""In a file, as SAEDashboard has by default; also the most that Neuronpedia takes in one upload."""
N_BARS, N_INTERVALS, PER_INTERVAL, N_ALIGNED = 40, 5, 3, 3
TOP_BIN = (-1.0, -1.0)
"""bin_min and bin_contains of the strongest sequences."""
SKIPPED = "skipped_indexes.json"
UNKNOWN = (
    *(f"correlated_{what}_{name}" for what in ("neurons", "features") for name in ("indices", "l1", "pearson")),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
"""Lists that are empty: the store does not hold what they are made of."""


def write_neuronpedia(source: FeatureSource, folder: Path, advance: Callable[[int], None]) -> int:
    """Write batch-0.json, batch-1.json, ... and skipped_indexes.json; returns how many features these hold.

    `advance` is told the tokens read, of two passes.
    """
    (features,) = collect_features(source.part, [source.sae], advance)
    peaks = features.contexts.maximum()
    heights = _histograms(source, peaks, advance)
    alive = features.alive.nonzero().squeeze(1).tolist()
    rows = source.sae.window_rows[:, -1:] * peaks[:, None, None]
    lenses = Lenses(source.store, source.part).of(source.part.hook, rows)
    lens = lenses[0] if lenses else None
    texts = TokenTexts(source.store)
    common = {"model_id": source.model, "layer": source.layer, "sae_set": source.name, "sae_id_suffix": None}
    for number, start in enumerate(range(0, len(alive), BATCH_FEATURES)):
        batch = [
            _feature(source, features, (heights, lens), texts, latent)
            for latent in alive[start : start + BATCH_FEATURES]
        ]
        data = json.dumps({**common, "features": batch}, ensure_ascii=False, allow_nan=False)
        write_atomic(folder / f"batch-{number}.json", data.encode())
    dead = (~features.alive).nonzero().squeeze(1).tolist()
    skipped = {**common, "layer": str(source.layer), "log_sparsity": None, "skipped_indexes": dead}
    del skipped["sae_id_suffix"]
    write_atomic(folder / SKIPPED, json.dumps(skipped).encode())
    return len(alive)


def _feature(
    source: FeatureSource,
    features: Features,
    tables: tuple[Int[ndarray, "d_sae n_bars"], Lens | None],
    texts: TokenTexts,
    latent: int,
) -> dict[str, Any]:
    heights, lens = tables
    row = source.sae.directions[latent]
    largest = row.abs().topk(min(N_ALIGNED, len(row))).indices.tolist()
    peak = float(features.contexts.maximum()[latent])
    bars = (np.arange(N_BARS) + 0.5) * peak / N_BARS
    empty: list[Any] = []
    return {
        "feature_index": latent,
        "neuron_alignment_indices": largest,
        "neuron_alignment_values": _rounded(row[largest].tolist()),
        "neuron_alignment_l1": _rounded((row[largest].abs() / row.abs().sum().clamp(min=1e-12)).tolist()),
        **dict.fromkeys(UNKNOWN, empty),
        "neg_str": [texts[int(token)] for token in lens.suppressed[latent]] if lens else [],
        "neg_values": _rounded(lens.losses[latent].tolist()) if lens else [],
        "pos_str": [texts[int(token)] for token in lens.promoted[latent]] if lens else [],
        "pos_values": _rounded(lens.gains[latent].tolist()) if lens else [],
        "frac_nonzero": float(features.contexts.n_active[latent]) / features.n_tokens,
        "freq_hist_data_bar_values": _rounded(bars.tolist()),
        "freq_hist_data_bar_heights": [float(one) for one in heights[latent]],
        "n_prompts_total": source.part.n_sequences,
        "n_tokens_in_prompt": source.store.sequence_length,
        "dataset": source.dataset,
        "activations": list(_activations(source, features, texts, latent)),
        "vector": [float(one) for one in row.tolist()],
    }


def _activations(source: FeatureSource, features: Features, texts: TokenTexts, latent: int) -> Iterator[dict[str, Any]]:
    """The strongest sequences; then of the others some of each interval of the largest activation."""
    collected = features.contexts
    examples = sorted(collected.kept(latent), key=lambda one: (-float(one.activations.max()), one.sequence))
    peak = float(collected.maximum()[latent])
    for one in examples[:N_TOP]:
        yield _activation(source, texts, one, (TOP_BIN[0], peak, TOP_BIN[1]))
    drawn = collected.sample.peak[latent][collected.sample.sequence[latent] >= 0].numpy()
    edges = np.linspace(0, peak, N_INTERVALS + 1)
    for low, high in zip(edges[-2::-1].tolist(), edges[:0:-1].tolist(), strict=True):
        share = float(((drawn > low) & (drawn <= high)).mean()) if len(drawn) else 0.0
        inside = [one for one in examples[N_TOP:] if low < float(one.activations.max()) <= high]
        for one in inside[:PER_INTERVAL]:
            yield _activation(source, texts, one, (low, high, share))


def _activation(
    source: FeatureSource, texts: TokenTexts, context: Context, interval: tuple[float, float, float]
) -> dict[str, Any]:
    split = source.part.split
    length = int(split.lengths[context.sequence])
    tokens, values = split.tokens[context.sequence, :length], context.activations[:length]
    return {
        "bin_min": round(interval[0], 3),
        "bin_max": round(interval[1], 3),
        "bin_contains": round(interval[2], 3),
        "tokens": [texts[int(token)] for token in tokens],
        "values": _rounded(values.tolist()),
        "qualifying_token_index": int(values.argmax()),
    }


@torch.inference_mode()
def _histograms(source: FeatureSource, peaks: Tensor, advance: Callable[[int], None]) -> Int[ndarray, "d_sae n_bars"]:
    """How often each latent has a value in each of N_BARS intervals up to its largest."""
    counts = torch.zeros(len(peaks) * N_BARS, dtype=torch.int64)
    part = source.part
    for batch in batches(part.split, part.hook, part.rules, part.max_tokens):
        x = batch.x[batch.counted]
        if len(x):
            code = join_codes([code for _, code in code_parts(source.sae, x)])
            sparse = code if isinstance(code, SparseCode) else positive_code(code)
            on = sparse.values > 0
            latents, values = sparse.latents[on].long(), sparse.values[on]
            bar = (values / peaks[latents] * N_BARS).long().clamp(max=N_BARS - 1)
            counts += torch.bincount(latents * N_BARS + bar, minlength=len(counts))
        advance(int(batch.lengths.sum()))
    return counts.view(-1, N_BARS).numpy()


def _rounded(values: Sequence[float]) -> list[float]:
    """To three decimals, as SAEDashboard has them."""
    return [round(float(one), 3) for one in values]
