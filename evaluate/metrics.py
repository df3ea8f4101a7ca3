"""Reconstruction and sparsity: columns per token, sums that add over chunks in any order, figures from the sums.

All in float64, pooled over tokens: a figure is a ratio of totals or a mean over all tokens, never a mean of batch
means, so how a split is cut into batches changes nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tcsae.shared.codes import SparseCode

DEFINITION_VERSION = 1
"""Raised whenever a figure's definition changes: evaluations of another version are done again."""

DEFINITIONS = {
    "explained_variance": "1 - sum |x - xhat|^2 / (sum |x|^2 - n |mean x|^2), pooled over the counted positions",
    "explained_variance_all_positions": "the same over all valid positions, the skipped first ones included",
    "mse": "mean over tokens of |x - xhat|^2, summed over dimensions",
    "cossim": "mean over tokens of x.xhat / (|x| |xhat|); 0 for a token where either is zero",
    "l2_norm_in": "mean |x|",
    "l2_norm_out": "mean |xhat|",
    "l2_ratio": "mean over tokens of |xhat| / |x|; |x| counts as 1 where it is below 1e-4",
    "relative_reconstruction_bias": "sum |xhat|^2 / sum x.xhat",
    "l0": "mean over tokens of the number of latents with f > 0",
    "l1": "mean over tokens of sum |f|",
    "dead_fraction": "share of latents with f > 0 at no counted position of the split",
}
"""What each figure is, for eval.json. Counted are the valid positions from `skip_first` on."""

COLUMNS = (
    "squared_input",
    "squared_output",
    "squared_error",
    "product",
    "norm_in",
    "norm_out",
    "cosine",
    "ratio",
    "active",
    "magnitude",
)
"""What is summed for each token, besides x itself."""

SMALLEST_NORM = 1e-4
CONSTANT = 1e-12
"""Share of the second moment below which inputs count as constant: that much is rounding."""


class Inputs(NamedTuple):
    """n activations, and what is worked out once for all systems."""

    x: Float64[Tensor, "n d_model"]
    norm: Float64[Tensor, " n"]
    total: Float64[Tensor, " d_model"]


class Activity(NamedTuple):
    """What a code does. A latent is active where f > 0: a gelu is never exactly 0, so "not 0" would count them all."""

    active: Float64[Tensor, " n"]
    """Active latents of each token."""
    magnitude: Float64[Tensor, " n"]
    """Sum |f| of each token."""
    firings: Int[Tensor, " d_sae"]
    """Tokens at which each latent is active."""


class Output(NamedTuple):
    """What an SAE, or a baseline, makes of n activations."""

    x_hat: Float[Tensor, "n d_model"]
    activity: Activity


@dataclass(frozen=True, slots=True)
class Sums:
    """Totals over tokens; those of two disjoint sets of tokens add with `+`."""

    n_tokens: int
    x: Float64[Tensor, " d_model"]
    columns: Float64[Tensor, " n_columns"]
    """In the order of COLUMNS."""
    firings: Int[Tensor, " d_sae"]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.n_tokens + other.n_tokens,
            self.x + other.x,
            self.columns + other.columns,
            self.firings + other.firings,
        )

    def total(self, column: str) -> float:
        return float(self.columns[COLUMNS.index(column)])


def sparse_activity(code: SparseCode) -> Activity:
    """Activity of a code given by its entries; an explicit zero is not active."""
    on, rows = code.values > 0, code.rows
    per_token = torch.zeros(2, code.n_tokens, dtype=torch.float64, device=code.values.device)
    per_token[0].index_add_(0, rows, on.double())
    per_token[1].index_add_(0, rows, code.values.abs().double())
    return Activity(per_token[0], per_token[1], torch.bincount(code.latents[on], minlength=code.d_sae))


def dense_activity(code: Float[Tensor, "n d_sae"]) -> Activity:
    """Activity of a code given as a matrix."""
    on = code > 0
    return Activity(on.sum(1).double(), code.abs().sum(1, dtype=torch.float64), on.sum(0))


def widen(x: Float[Tensor, "n d_model"]) -> Inputs:
    """What every system's figures need of x; n may be 0."""
    wide = x.double()
    return Inputs(wide, torch.linalg.vector_norm(wide, dim=1), wide.sum(0))


def token_columns(inputs: Inputs, output: Output) -> Float64[Tensor, "n_columns n"]:
    """Each token's share of the sums, in the order of COLUMNS."""
    wide_hat, norm_in = output.x_hat.double(), inputs.norm
    norm_out = torch.linalg.vector_norm(wide_hat, dim=1)
    squared_in, squared_out = norm_in.square(), norm_out.square()
    squared_error = torch.linalg.vector_norm(inputs.x - wide_hat, dim=1).square()
    product = (squared_in + squared_out - squared_error) / 2  # x.xhat, a third of its direct cost
    norms = norm_in * norm_out
    cosine = torch.where(norms > 0, product / norms, 0.0)
    ratio = norm_out / torch.where(norm_in < SMALLEST_NORM, 1.0, norm_in)
    activity = output.activity
    columns = (squared_in, squared_out, squared_error, product, norm_in, norm_out, cosine, ratio)
    return torch.stack((*columns, activity.active, activity.magnitude))


def sum_tokens(inputs: Inputs, output: Output) -> Sums:
    """The sums over n tokens and what was made of them."""
    columns = token_columns(inputs, output)
    return Sums(len(inputs.x), inputs.total, columns.sum(1), output.activity.firings)


def explained_variance(sums: Sums) -> float | None:
    """Centred and pooled (DEFINITIONS); None where the inputs do not vary."""
    if not sums.n_tokens:
        return None
    second = sums.total("squared_input")
    total = second - float(sums.x @ sums.x) / sums.n_tokens
    return 1 - sums.total("squared_error") / total if total > CONSTANT * second else None


def figures(counted: Sums, skipped: Sums) -> dict[str, float | None]:
    """All figures of DEFINITIONS from the sums over the counted positions and over the skipped ones.

    None where a figure is not defined: inputs that do not vary, an output without a component along x, no latents.
    """

    def mean(column: str) -> float | None:
        return counted.total(column) / counted.n_tokens if counted.n_tokens else None

    product, n_latents = counted.total("product"), len(counted.firings)
    return {
        "explained_variance": explained_variance(counted),
        "explained_variance_all_positions": explained_variance(counted + skipped),
        "mse": mean("squared_error"),
        "cossim": mean("cosine"),
        "l2_norm_in": mean("norm_in"),
        "l2_norm_out": mean("norm_out"),
        "l2_ratio": mean("ratio"),
        "relative_reconstruction_bias": counted.total("squared_output") / product if product else None,
        "l0": mean("active"),
        "l1": mean("magnitude"),
        "dead_fraction": float((counted.firings == 0).double().mean()) if n_latents else None,
    }
