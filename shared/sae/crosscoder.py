"""Temporal crosscoder: one code for a window of consecutive positions (across layers: Lindsey et al. 2024).

The weights are a SparseAutoencoder's over windows laid end to end: row j of W_enc and W_dec [d_sae, window * d_model]
holds latent j's direction at each of the window's positions, of norm 1 over all of them. With a window of 1 it is that
SAE. Trained on windows side by side; read out on the window that ends at each token.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.device import to_device
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, decode, join_codes

PART_ENTRIES = 8 << 20
"""Of pre-activations or of windows, at most: 32 MB."""


def decoder_rows(sae: SparseAutoencoder) -> Float[ndarray, "d_sae d_model"]:
    """Each latent's direction; of a code for several positions their mean."""
    rows = sae.W_dec.detach().cpu().float()
    return rows.view(len(rows), -1, sae.config.d_model).mean(1).numpy()


def read_out(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
) -> tuple[Float[Tensor, "n d_model"], SparseCode]:
    """Reconstruction and code of every token of sequences laid end to end, from the window that ends at it.

    A window that reached beyond its token would tell the language model the tokens that it is to predict. Positions
    before a sequence's first stand as the decoder's bias, which adds nothing to a pre-activation.
    """
    window = sae.config.window
    before = np.arange(1 - window, 1)
    bias = sae.b_dec.view(window, -1)
    W_last, missing = sae.window_rows[:, -1].contiguous(), window - 1 - positions(lengths)
    codes, x_hats = [], []
    n_parts = max(1, -(-len(x) * max(sae.config.d_sae, sae.config.d_in) // PART_ENTRIES))
    for tokens in np.array_split(np.arange(len(x)), n_parts):
        rows = (tokens[:, None] + before).clip(min=0)
        outside = np.arange(window) < missing[tokens][:, None]
        windows = torch.where(to_device(outside, x.device)[:, :, None], bias, x[to_device(rows, x.device)])
        codes.append(sae.encode_sparse(windows.flatten(1)))
        x_hats.append(decode(codes[-1], W_last, bias[-1]))
    return torch.cat(x_hats), join_codes(codes)
