"""Cross-entropy and KL divergence through the tail: what the language model loses when it reads xhat instead of x."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.batches import Settings, document_numbers
from tcsae.evaluate.intervals import Resamplings
from tcsae.evaluate.measures.core import DEFINITION_VERSION
from tcsae.shared.base.device import sums_on, to_device
from tcsae.shared.base.files import json_digest, write_atomic
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split, Store

DEFINITIONS = {
    "ce_loss_without_sae": "nats per prediction, from the stored activations; counted are predictions made at counted "
    "positions whose next token lies in the same sequence",
    "ce_loss_with_sae": "the same predictions with xhat in place of x",
    "ce_loss_with_ablation": "the same predictions with zeros at all positions, the skipped ones included",
    "ce_loss_with_mean": "the same predictions with the mean over the train split in place of x",
    "ce_loss_with_unigrams": "the same predictions by how often each token is predicted in the split: the best that "
    "knows no context",
    "ce_loss_increase": "with_sae - without_sae: nats a prediction that the reconstruction costs",
    "ce_perplexity_ratio": "e to the power of ce_loss_increase",
    "ce_loss_score": "(with_ablation - with_sae) / (with_ablation - without_sae): the recovered share of the gap to "
    "zero ablation",
    "ce_loss_score_mean": "the same of the gap to the mean: (with_mean - with_sae) / (with_mean - without_sae)",
    "ce_loss_score_unigrams": "the same of the gap to ce_loss_with_unigrams",
    "kl_div_with_sae": "mean over the counted positions, a sequence's last one included, of KL(p || q): p from x, q "
    "from xhat",
    "kl_div_with_ablation": "the same, q from zeros at all positions",
    "kl_div_score": "(with_ablation - with_sae) / with_ablation",
}
"""What each figure is, for eval.json. What is replaced: see SPLICES. The ablation is SAEBench's and SAELens'."""

SPLICES = {
    "counted": "xhat stands at the counted positions, the skipped ones keep x (SAELens: special tokens keep theirs)",
    "all": "xhat stands at all valid positions, the skipped ones included (SAEBench)",
}


FOLDER = ".reference"
"""Below the folder of runs: the losses that no SAE changes, computed once per store and settings."""
COUNTS = ("n_predictions", "n_positions", "unigrams")
LOSSES = ("clean", "ablation", "zero", "mean")
SMALLEST_GAP = 0.01
"""Nats to an ablation; the share of a smaller gap that is recovered is a ratio of noise, and left undefined."""
LOG2_E = math.log2(math.e)
BLOCK_LOGITS = 1 << 18
"""Reduced at a time: 1 MB, and as much of weights."""


class Losses(NamedTuple):
    """Summed over each row's tokens (a row: a sequence, a document, a resampling of documents)."""

    ce: Float64[Tensor, " rows"]
    kl: Float64[Tensor, " rows"]


def splice(
    x: Float[Tensor, "batch position d_model"],
    replaced: Bool[Tensor, "batch position"] | Bool[ndarray, "batch position"],
    x_hat: Float[Tensor, "n d_model"],
) -> Float[Tensor, "batch position d_model"]:
    """x with `x_hat` at the replaced positions, in row order. The mask is the host's, the rest on any one device."""
    at = to_device(np.flatnonzero(np.asarray(replaced)), x.device)
    spliced = x.clone()
    spliced.view(-1, x.shape[2]).index_copy_(0, at, x_hat)
    return spliced


def sequence_losses(
    tail: Tail,
    x: Float[Tensor, "batch position d_model"],
    others: Sequence[Float[Tensor, "batch position d_model"]],
    tokens: Int[Tensor, "batch position"] | Int[ndarray, "batch position"],
    counted: Bool[Tensor, "batch position"] | Bool[ndarray, "batch position"],
    has_next: Bool[Tensor, "batch position"] | Bool[ndarray, "batch position"],
) -> list[Losses]:
    """Losses of x itself (its KL is 0) and of each of `others`, a row a sequence.

    The cross-entropy of position i is that of token i + 1, at counted positions with `has_next`; KL at all counted.
    Logits are made a few tokens at a time and those of x once for all others. Sequences without a counted position
    (half of them where half of the documents count) do not go through the tail. x and `others` are on any device,
    tokens and masks on the CPU; what is returned is where the tail's sums are kept (`sums_on`).
    """
    mask, device = np.asarray(counted), tail.device
    chosen, rows = np.flatnonzero(mask), np.flatnonzero(mask.any(1))
    read, at = to_device(rows, x.device), to_device(np.flatnonzero(mask[rows]), device)
    predicts = to_device(np.asarray(has_next).ravel()[chosen], device)
    targets = to_device(np.roll(np.asarray(tokens), -1, 1).ravel()[chosen].astype(np.int64), device)
    hidden = [tail.hidden(one.index_select(0, read)).flatten(0, 1).index_select(0, at) for one in (x, *others)]
    losses = hidden[0].new_zeros(len(hidden), 2, len(chosen))
    size = max(1, min(tail.slice_tokens, len(targets)))
    weights_buffer, scratch, logits_buffer = hidden[0].new_empty(3, size, tail.vocabulary)
    for start in range(0, len(targets), size):
        part = slice(start, min(start + size, len(targets)))
        weights, logits = (one[: part.stop - start] for one in (weights_buffer, logits_buffer))
        clean = _reduce(tail.unembed(hidden[0][part], logits), targets[part], weights)
        losses[0, 0, part] = clean.log_total - clean.chosen
        for i, one in enumerate(hidden[1:], 1):
            other = _reduce(tail.unembed(one[part], logits), targets[part], scratch, weights)
            losses[i, 0, part] = other.log_total - other.chosen
            losses[i, 1, part] = (clean.weighted - other.weighted) / clean.total + other.log_total - clean.log_total
    losses[:, 0].mul_(predicts)
    there = sums_on(device)
    row = to_device(chosen // tokens.shape[1], there)
    sums = torch.zeros(len(hidden), 2, len(tokens), dtype=torch.float64, device=there)
    return [Losses(ce, kl) for ce, kl in sums.index_add_(2, row, losses.to(there).double())]


class _Reduced(NamedTuple):
    """What a slice of logits comes to, l; its weights are w = e^(l - max l)."""

    log_total: Float[Tensor, " n"]
    """log sum e^l."""
    total: Float[Tensor, " n"]
    """sum w."""
    weighted: Float[Tensor, " n"]
    """sum v l, v the weights given, else its own."""
    chosen: Float[Tensor, " n"]
    """l of the target."""


def _reduce(
    logits: Float[Tensor, "n vocabulary"],
    targets: Int[Tensor, " n"],
    out: Float[Tensor, "m vocabulary"],
    given: Float[Tensor, "n vocabulary"] | None = None,
) -> _Reduced:
    """A few rows at a time, so that each pass over them finds them in the cache; `out` takes the weights."""
    top, total, weighted = logits.new_empty(3, len(logits))
    size = max(1, BLOCK_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        block, weights = logits[rows], out[rows]
        shift = torch.amax(block, 1, out=top[rows])[:, None] * -LOG2_E
        # A power of 2: torch computes it in less than half the time of an exponential.
        torch.add(shift, block, alpha=LOG2_E, out=weights).exp2_()
        torch.sum(weights, 1, out=total[rows])
        _dot_rows(block, weights if given is None else given[rows], weighted[rows])
    return _Reduced(top + total.log(), total, weighted, logits.gather(1, targets[:, None]).squeeze(1))


def _dot_rows(a: Float[Tensor, "n vocabulary"], b: Float[Tensor, "n vocabulary"], out: Float[Tensor, " n"]) -> None:
    if out.device.type == "cpu":  # through BLAS: twice as fast as torch
        np.vecdot(a.numpy(), b.numpy(), out=out.numpy())
    else:
        torch.linalg.vecdot(a, b, out=out)


class Reference(NamedTuple):
    """What no SAE changes: the losses of x, of ablations, and how many predictions and positions they are sums of."""

    n_predictions: Float64[Tensor, " rows"]
    n_positions: Float64[Tensor, " rows"]
    unigrams: Float64[Tensor, " rows"]
    """Cross-entropy of the predicted tokens' frequencies (`unigram_losses`)."""
    clean: Losses
    ablation: Losses
    """Zeros at all positions."""
    zero: Losses
    """Zeros at the replaced positions."""
    mean: Losses
    """The mean of the train split at the replaced positions."""


def unigram_losses(split: Split, rules: CountingRules, n_documents: int, end: int) -> Float64[Tensor, " n_documents"]:
    """-log of how often each predicted token is one, summed over each document's predictions; without a language model.

    A prediction is made at a counted position, of the sequences before `end`, whose next token lies in the same one.
    """
    predicts = counted(split, rules)[:, :-1]
    predicts[end:] = False
    predicts &= np.arange(1, split.tokens.shape[1]) < split.lengths[:, None]
    targets, at = split.tokens[:, 1:][predicts], np.nonzero(predicts)[0]
    _, kind, counts = np.unique(targets, return_inverse=True, return_counts=True)
    nats = -np.log(counts / max(1, len(targets)))[kind]
    return torch.from_numpy(np.bincount(document_numbers(split)[0][at], nats, n_documents))


def resampled(
    resamplings: Resamplings, reference: Reference, losses: Sequence[Losses]
) -> tuple[Reference, list[Losses]]:
    """Losses per document as sums with a row for each resampling."""
    rows = [reference.clean, reference.ablation, reference.zero, reference.mean, *losses]
    fixed = (reference.n_predictions, reference.n_positions, reference.unigrams)
    per_document = torch.stack((*fixed, *(one for row in rows for one in row)), 1)
    n_predictions, n_positions, unigrams, *columns = resamplings.sums(per_document).unbind(1)
    summed = [Losses(*pair) for pair in zip(columns[::2], columns[1::2], strict=True)]
    return Reference(n_predictions, n_positions, unigrams, *summed[:4]), summed[4:]


def tail_figures(reference: Reference | None, spliced: Losses | None) -> dict[str, Float64[Tensor, " rows"]]:
    """The figures of DEFINITIONS, row by row; NaN where undefined. Empty without a tail."""
    if reference is None or spliced is None:
        return {}
    n, positions = reference.n_predictions, reference.n_positions
    clean, sae, zero, mean = (one.ce / n for one in (reference.clean, spliced, reference.ablation, reference.mean))
    unigrams = reference.unigrams / n
    kl, kl_zero = spliced.kl / positions, reference.ablation.kl / positions
    return {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": sae,
        "ce_loss_with_ablation": zero,
        "ce_loss_with_mean": mean,
        "ce_loss_with_unigrams": unigrams,
        "ce_loss_increase": sae - clean,
        "ce_perplexity_ratio": (sae - clean).exp(),
        "ce_loss_score": (zero - sae) / torch.where(zero == clean, torch.nan, zero - clean),
        "ce_loss_score_mean": _recovered(sae, clean, mean),
        "ce_loss_score_unigrams": _recovered(sae, clean, unigrams),
        "kl_div_with_sae": kl,
        "kl_div_with_ablation": kl_zero,
        "kl_div_score": (kl_zero - kl) / torch.where(kl_zero == 0, torch.nan, kl_zero),
    }


def _recovered(sae: Tensor, clean: Tensor, ablated: Tensor) -> Tensor:
    gap = ablated - clean
    return (ablated - sae) / torch.where(gap < SMALLEST_GAP, torch.nan, gap)


def _identity(store: Store, split: str, settings: Settings) -> dict[str, str]:
    return {
        "definition_version": str(DEFINITION_VERSION),
        "content": store.content,
        "split": split,
        "hook": settings.hook,
        "skip_first": settings.rules.key(),
        "splice_all": str(settings.splice_all),
    } | ({} if settings.ce_tokens is None else {"ce_tokens": str(settings.ce_tokens)})


def reference_path(runs_path: Path, store: Store, split: str, settings: Settings) -> Path:
    """Where the losses of this store and these settings are kept."""
    identity = _identity(store, split, settings)
    return runs_path / FOLDER / f"{store.content[:12]}-{json_digest(identity)[:12]}.safetensors"


def load_reference(runs_path: Path, store: Store, split: str, settings: Settings) -> Reference | None:
    """What an earlier evaluation kept, or None: absent, damaged, or of something else."""
    path = reference_path(runs_path, store, split, settings)
    try:
        with safetensors.safe_open(path, "pt") as file:
            identity = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if identity != _identity(store, split, settings) | {"digest": _digest(tensors)}:
            return None
        losses = [Losses(*tensors[name]) for name in LOSSES]
        return Reference(*(tensors[name] for name in COUNTS), *losses)
    except (OSError, KeyError, safetensors.SafetensorError):  # worked out again, then replaced
        return None


def save_reference(runs_path: Path, store: Store, split: str, settings: Settings, reference: Reference) -> None:
    """Keep the losses, per document."""
    tensors = {name: torch.stack(tuple(getattr(reference, name))) for name in LOSSES}
    tensors |= {name: getattr(reference, name).contiguous() for name in COUNTS}
    identity = _identity(store, split, settings) | {"digest": _digest(tensors)}
    write_atomic(reference_path(runs_path, store, split, settings), safetensors.torch.save(tensors, identity))


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and values: safetensors itself has no checksum."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
