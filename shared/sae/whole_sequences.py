"""SAEs that read whole sequences: a sparse novel code of each token, and a dense code that its past carries to it."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.sae.activations import Encoded
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, join_codes

SEQUENCES_PER_PART = 16
"""Sequences that are encoded at a time in inference: dense codes of 16 * 128 * 4096 entries are 32 MB."""


class SequenceAutoencoder(SparseAutoencoder, ABC):
    """An SAE whose `forward` takes whole sequences [batch, position, d_model], and `encode` gives the novel code.

    `decode` takes the sum of both codes; from the novel code alone what the past carries is missing.
    """

    @abstractmethod
    def codes(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[SparseCode, Float[Tensor, "n d_sae"]]:
        """(novel, predicted) codes of sequences laid end to end, with gradients."""

    @abstractmethod
    def train_pass(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[Encoded, Float[Tensor, "n d_model"]]:
        """Novel code and reconstruction of sequences laid end to end, with gradients."""


@torch.no_grad()
def read_out(
    sae: SequenceAutoencoder, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
) -> tuple[Float[Tensor, "n d_model"], SparseCode, Float[Tensor, "n d_sae"]]:
    """(reconstruction, novel code, predicted code) of every token of sequences laid end to end, in the data's units."""
    ends = np.cumsum(lengths)
    x_hats, novels, predicteds = [], [], []
    for first in range(0, max(len(lengths), 1), SEQUENCES_PER_PART):
        part = lengths[first : first + SEQUENCES_PER_PART]
        stop = int(ends[min(first + SEQUENCES_PER_PART, len(ends)) - 1]) if len(ends) else 0
        rows = x[stop - int(part.sum()) : stop]
        novel, predicted = sae.codes(rows, part)
        x_hats.append(sae.decode_sparse(novel) + predicted @ sae.W_dec / sae.input_scale)
        novels.append(novel)
        predicteds.append(predicted)
    return torch.cat(x_hats), join_codes(novels), torch.cat(predicteds)
