"""Reconstruction and sparsity: columns per token, sums per document, figures from sums.

All in float64, pooled over tokens: a figure is a ratio of totals or a mean over all tokens, never a mean of batch
means, so how a split is cut into batches changes nothing. Sums have rows, one for each document or resampling of the
documents (a product with a matrix of weights), and every figure is worked out on all rows at once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tcsae.shared.base.device import static_shapes
from tcsae.shared.sae import sparse as sparse_codes
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode


def token_activity(code: Code) -> Float64[Tensor, "4 n"]:
    """Of each token: latents with f > 0, latents with f != 0, sum |f|, sum f."""
    values = code.values if isinstance(code, SparseCode) else code
    # A topk or relu code is never negative, so two of the four sums do for all; a GPU would have to be waited for.
    signed = static_shapes(values) or bool((values < 0).any())
    terms = (values > 0, values != 0, values.abs(), values) if signed else (values > 0, values)
    sums = [row_sums(code, term) for term in terms]
    return torch.stack(sums if signed else [sums[0], sums[0], sums[1], sums[1]])


def row_sums(code: Code, terms: Tensor) -> Float64[Tensor, " n"]:
    """Sum of each row's `terms`, which stand where the code's values do."""
    if not isinstance(code, SparseCode):
        return terms.sum(1, dtype=torch.float64)
    if code.per_token is not None:
        return terms.view(code.n_tokens, code.per_token).sum(1, dtype=torch.float64)
    total = torch.zeros(code.n_tokens, dtype=torch.float64, device=terms.device)
    return total.index_add_(0, code.rows, terms.double())


def firing_counts(code: Code, sequence: Int[Tensor, " n"], n_sequences: int) -> Int[Tensor, "2 d_sae"]:
    """Of each latent: tokens at which it is active, and sequences in which it ever is.

    `sequence` numbers each token's sequence, 0 to n_sequences - 1.
    """
    if isinstance(code, SparseCode) and static_shapes(code.values):
        counts = torch.zeros(n_sequences * code.d_sae, dtype=torch.int64, device=code.values.device)
        keys = sequence.index_select(0, code.rows) * code.d_sae + code.columns
        counts = counts.index_add_(0, keys, (code.values > 0).long()).view(n_sequences, code.d_sae)
    elif isinstance(code, SparseCode):
        on = code.values > 0
        keys = sequence.index_select(0, code.rows[on]) * code.d_sae + code.latents[on]
        counts = torch.bincount(keys, minlength=n_sequences * code.d_sae).view(n_sequences, code.d_sae)
    else:
        counts = torch.zeros(n_sequences, code.shape[1], dtype=torch.int64, device=code.device)
        counts.index_add_(0, sequence, (code > 0).long())
    return torch.stack((counts.sum(0), (counts > 0).sum(0)))


def join_codes(parts: list[Code]) -> Code:
    """The codes of consecutive tokens as one."""
    if sparse := [part for part in parts if isinstance(part, SparseCode)]:
        return sparse_codes.join_codes(sparse)
    return parts[0] if len(parts) == 1 else torch.cat([part for part in parts if torch.is_tensor(part)])


def n_latents(code: Code) -> int:
    return code.d_sae if isinstance(code, SparseCode) else code.shape[1]


DEFINITION_VERSION = 8
"""Raised whenever a figure is added or defined anew: evaluations of another version are done again."""

DEFINITIONS = {
    "explained_variance": "1 - sum |x - xhat|^2 / (sum |x|^2 - n |mean x|^2), pooled over the counted positions",
    "explained_variance_all_positions": "the same over all valid positions, the skipped first ones included",
    "explained_variance_legacy": "mean over tokens of 1 - |x - xhat|^2 / |x - mu|^2, mu the mean of the train split "
    "(SAEBench and SAELens take each batch's own mean)",
    "explained_variance_saebench": "1 - E|x - xhat|^2 / (S - (S / d_model)^2), S = E|x|^2: what SAEBench 0.6.0 "
    "computes as explained_variance; it changes with the scale of x",
    "mse": "mean over tokens of |x - xhat|^2, summed over dimensions",
    "mse_saebench": "mse / n_tokens: what SAEBench 0.6.0 computes where one batch holds all counted tokens",
    "cossim": "mean over tokens of x.xhat / (|x| |xhat|); 0 for a token where either is zero",
    "l2_norm_in": "mean |x|",
    "l2_norm_out": "mean |xhat|",
    "l2_ratio": "mean over tokens of |xhat| / |x|; |x| counts as 1 where it is below 1e-4",
    "relative_reconstruction_bias": "sum |xhat|^2 / sum x.xhat",
    "l0": "mean over tokens of the number of latents with f > 0",
    "l0_nonzero": "the same with f != 0, as SAEBench and SAELens count; every latent of a gelu counts",
    "l1": "mean over tokens of sum |f|, as SAELens sums",
    "l1_signed": "mean over tokens of sum f, as SAEBench sums",
    "dead_fraction": "share of latents with f > 0 at no counted position of the split",
}
"""What each figure is, for eval.json. Counted are the valid positions from `skip_first` on."""

PREDICTED = {
    "l0_predicted": "mean over tokens of the number of latents of the predicted code that are not 0; l0 is that of the "
    "novel code",
    "l0_total": "the same of both codes together",
}
"""Figures of temporal feature analysis alone."""

COLUMNS = (
    "squared_input",
    "squared_output",
    "squared_error",
    "product",
    "norm_in",
    "norm_out",
    "cosine",
    "ratio",
    "legacy",
    "active",
    "nonzero",
    "magnitude",
    "signed",
    "predicted",
    "total",
)
"""What is summed for each token, besides x itself: the last six by `token_activity` and `token_predictions`."""

SMALLEST_NORM = 1e-4
CONSTANT = 1e-12
"""Share of the second moment below which inputs count as constant: that much is rounding."""


class Inputs(NamedTuple):
    """n activations, and what is worked out once for all systems."""

    x: Float64[Tensor, "n d_model"]
    norm: Float64[Tensor, " n"]
    squared_deviation: Float64[Tensor, " n"]
    """|x - mu|^2, mu the mean of the train split."""


class Output(NamedTuple):
    """What an SAE, or a baseline, makes of n activations."""

    x_hat: Float[Tensor, "n d_model"]
    code: Code | None
    """None: a baseline without latents."""
    predicted: Float[Tensor, "n d_sae"] | None = None
    """A second code that is decoded with `code`, which then is the novel one (TFA, persistent SAE)."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Totals over tokens, one row a document (or a resampling of documents)."""

    n_tokens: Float64[Tensor, " rows"]
    x: Float64[Tensor, "rows d_model"]
    columns: Float64[Tensor, "rows n_columns"]
    """In the order of COLUMNS."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.n_tokens + other.n_tokens, self.x + other.x, self.columns + other.columns)

    def column(self, name: str) -> Float64[Tensor, " rows"]:
        return self.columns[:, COLUMNS.index(name)]


def token_predictions(output: Output) -> Float64[Tensor, "2 n"]:
    """Of each token: latents of the predicted code that are not 0, and of it and the novel code together."""
    counts = torch.zeros(2, len(output.x_hat), dtype=torch.float64, device=output.x_hat.device)
    if output.predicted is not None:
        assert isinstance(output.code, SparseCode)
        on = output.predicted != 0
        counts[0] = on.sum(1)
        on[output.code.rows, output.code.latents] |= output.code.values != 0
        counts[1] = on.sum(1)
    return counts


def widen(x: Float[Tensor, "n d_model"], mean: Float64[Tensor, " d_model"]) -> Inputs:
    """What every system's figures need of x; n may be 0."""
    wide = x.double()
    return Inputs(wide, torch.linalg.vector_norm(wide, dim=1), torch.linalg.vector_norm(wide - mean, dim=1).square())


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
    legacy = 1 - squared_error / inputs.squared_deviation
    columns = (squared_in, squared_out, squared_error, product, norm_in, norm_out, cosine, ratio, legacy)
    activity = norm_in.new_zeros(4, len(norm_in)) if output.code is None else token_activity(output.code)
    return torch.cat((torch.stack(columns), activity, token_predictions(output)))


def sum_rows(
    values: Float64[Tensor, "n_columns n"], rows: Int[Tensor, " n"], n_rows: int
) -> Float64[Tensor, "n_rows n_columns"]:
    """Columns added up by the row that each token belongs to."""
    return values.new_zeros(n_rows, len(values)).index_add_(0, rows, values.T)


def figures(counted: Sums, skipped: Sums) -> dict[str, Float64[Tensor, " rows"]]:
    """All figures of DEFINITIONS but `dead_fraction`, row by row; those of PREDICTED where there is such a code.

    NaN where a figure is not defined: inputs that do not vary, an output without a component along x, no token.
    """
    n, d_model = counted.n_tokens, counted.x.shape[1]

    def mean(name: str) -> Float64[Tensor, " rows"]:
        return counted.column(name) / n

    predicted = {"l0_predicted": mean("predicted"), "l0_total": mean("total")} if counted.column("total").any() else {}
    mse, second = mean("squared_error"), mean("squared_input")
    product = torch.where(counted.column("product") == 0, torch.nan, counted.column("product"))
    return {
        "explained_variance": explained_variance(counted),
        "explained_variance_all_positions": explained_variance(counted + skipped),
        "explained_variance_legacy": mean("legacy"),
        "explained_variance_saebench": 1 - mse / (second - (second / d_model).square()),
        "mse": mse,
        "mse_saebench": mse / n,
        "cossim": mean("cosine"),
        "l2_norm_in": mean("norm_in"),
        "l2_norm_out": mean("norm_out"),
        "l2_ratio": mean("ratio"),
        "relative_reconstruction_bias": counted.column("squared_output") / product,
        "l0": mean("active"),
        "l0_nonzero": mean("nonzero"),
        "l1": mean("magnitude"),
        "l1_signed": mean("signed"),
        **predicted,
    }


def explained_variance(sums: Sums) -> Float64[Tensor, " rows"]:
    """Centred and pooled (DEFINITIONS); NaN where the inputs do not vary."""
    second = sums.column("squared_input")
    total = second - sums.x.square().sum(1) / sums.n_tokens
    return 1 - sums.column("squared_error") / torch.where(total > CONSTANT * second, total, torch.nan)
