"""Cross-entropy through the tail: what the language model loses when it reads a reconstruction instead of x."""

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tcsae.shared.tail import Tail

DEFINITIONS = {
    "ce_loss_without_sae": "nats per prediction, from the stored activations; counted are predictions made at valid "
    "positions from skip_first on whose next token lies in the same sequence",
    "ce_loss_with_sae": "the same predictions with xhat at the counted positions; skipped positions keep x",
    "ce_loss_with_ablation": "the same predictions with zeros at all positions, the skipped ones included",
    "ce_loss_with_mean": "the same predictions with the mean over the train split at the counted positions; skipped "
    "positions keep x",
    "ce_loss_score": "(with_ablation - with_sae) / (with_ablation - without_sae)",
}
"""What each figure is, for eval.json. The ablation is SAEBench's and SAELens'; the splice is SAELens'."""


def splice(
    x: Float[Tensor, "batch position d_model"],
    counted: Bool[Tensor, "batch position"],
    x_hat: Float[Tensor, "n d_model"],
) -> Float[Tensor, "batch position d_model"]:
    """x with `x_hat` at the counted positions, in row order."""
    spliced = x.clone()
    spliced[counted] = x_hat
    return spliced


def sequence_losses(
    tail: Tail,
    x: Float[Tensor, "batch position d_model"],
    tokens: Int[Tensor, "batch position"],
    lengths: Int[Tensor, " batch"],
    skip_first: int,
) -> Float64[Tensor, " batch"]:
    """Each sequence's summed cross-entropy, in nats, over the predictions made from position `skip_first` on."""
    return tail.next_token_loss(x, tokens, lengths)[:, skip_first:].sum(1, dtype=torch.float64)


def n_predictions(lengths: Int[Tensor, " batch"], skip_first: int) -> int:
    """How many losses `sequence_losses` sums over: a sequence's last token predicts nothing."""
    return int((lengths - 1 - skip_first).clamp(min=0).sum())


def ce_figures(
    clean: float | None, zero: float | None, mean: float | None, spliced: float | None
) -> dict[str, float | None]:
    """The figures of DEFINITIONS from mean losses; all None without a tail."""
    score = None
    if clean is not None and zero is not None and spliced is not None and zero != clean:
        score = (zero - spliced) / (zero - clean)
    return {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": spliced,
        "ce_loss_with_ablation": zero,
        "ce_loss_with_mean": mean,
        "ce_loss_score": score,
    }
