"""Temporal crosscoder: one code for a window of consecutive positions (across layers: Lindsey et al. 2024).

The weights are a SparseAutoencoder's over windows laid end to end: row j of W_enc and W_dec [d_sae, window * d_model]
holds latent j's direction at each of the window's positions, of norm 1 over all of them. With a window of 1 it is that
SAE. Trained on windows side by side; read out on all windows of a sequence: the code of a token is that of the window
that ends there (of the first window for the tokens before), its reconstruction the mean over the windows it lies in.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.windows import positions, tiles
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, join_codes

PART_ENTRIES = 8 << 20
"""Of pre-activations or of windows, at most: 32 MB."""


def decoder_rows(sae: SparseAutoencoder) -> Float[ndarray, "d_sae d_model"]:
    """Each latent's direction; of a code for several positions their mean."""
    rows = sae.W_dec.detach().cpu().float()
    return rows.view(len(rows), -1, sae.config.d_model).mean(1).numpy()


def read_out(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
) -> tuple[Float[Tensor, "n d_model"], SparseCode]:
    """Reconstruction and code of every token of sequences laid end to end.

    Tokens of a sequence shorter than the window are in no window: their code is empty, and their reconstruction the
    decoder's bias, as a mean over its positions.
    """
    window, d_model = sae.config.window, sae.config.d_model
    first, counts = tiles(lengths, window)
    within = np.arange(window)
    total, n_windows = torch.zeros_like(x), torch.from_numpy(_n_windows(lengths, window)).to(x.device)
    codes = []
    for part in np.array_split(first, max(1, -(-len(first) * max(sae.config.d_sae, sae.config.d_in) // PART_ENTRIES))):
        rows = torch.from_numpy(part[:, None] + within).to(x.device)
        codes.append(sae.encode_sparse(x[rows].flatten(1)))
        x_hat = sae.decode_sparse(codes[-1]).view(-1, d_model)
        total.index_add_(0, rows.flatten(), x_hat)
    inside = (n_windows > 0)[:, None]
    mean_bias = sae.b_dec.view(window, d_model).mean(0)
    x_hat = torch.where(inside, total / n_windows.clamp(min=1)[:, None], mean_bias)
    return x_hat, token_code(codes, lengths, counts, window)


def token_code(
    codes: list[SparseCode], lengths: Int[ndarray, " n_sequences"], counts: Int[ndarray, " n_sequences"], window: int
) -> SparseCode:
    """The code of each token, from those of all windows in order; `counts` windows of each sequence."""
    joined = join_codes(codes)
    ends = torch.cat([joined.offsets, joined.offsets[-1:]])  # one empty row, for tokens in no window
    joined = SparseCode(joined.values, joined.latents, ends, joined.d_sae)
    first = np.repeat(np.cumsum(counts) - counts, lengths)
    within = np.maximum(positions(lengths) - window + 1, 0)
    rows = np.where(np.repeat(counts, lengths) > 0, first + within, joined.n_tokens - 1)
    return joined.take(torch.from_numpy(rows).to(joined.values.device))[0]


def _n_windows(lengths: Int[ndarray, " n_sequences"], window: int) -> Int[ndarray, " n_tokens"]:
    """In how many windows each token lies."""
    position, length = positions(lengths), np.repeat(lengths, lengths)
    most = np.minimum(position, length - window) - np.maximum(0, position - window + 1) + 1
    return np.maximum(most, 0)
