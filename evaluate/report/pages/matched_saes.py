"""Two SAEs of one hook: which latent of each is nearest to each of the other, by the cosine of their decoder rows."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tcsae.evaluate.report.features.likeness import DECODER_BLOCK, unit_rows

MAX_SAES = 8
"""SAEs that are compared pair by pair: 28 pairs."""


def matched_latents(
    rows: Float[Tensor, "n_a d_model"],
    other: Float[Tensor, "n_b d_model"],
    alive: Bool[Tensor, " n_a"],
    other_alive: Bool[Tensor, " n_b"],
) -> dict[str, Any]:
    """For each latent that is alive its best match among the other's: {"a": [of b, cosine], "b": [of a, cosine]}.

    Two lists each, in the order of the latents that are alive; None where the other has none.
    """
    a, b = unit_rows(rows)[alive], unit_rows(other)[other_alive]
    if not len(a) or not len(b):
        return {"a": None, "b": None}
    of_a, of_b = alive.nonzero().squeeze(1), other_alive.nonzero().squeeze(1)
    best = torch.zeros(len(a), dtype=torch.int64)
    cosine, back, back_cosine = torch.zeros(len(a)), torch.zeros(len(b), dtype=torch.int64), torch.full((len(b),), -2.0)
    for first in range(0, len(a), DECODER_BLOCK):
        block = a[first : first + DECODER_BLOCK] @ b.T
        cosine[first : first + len(block)], best[first : first + len(block)] = block.max(1)
        highest, at = block.max(0)
        better = highest > back_cosine
        back[better], back_cosine[better] = at[better] + first, highest[better]
    return {
        "a": [of_b[best].tolist(), [round(value, 3) for value in cosine.tolist()]],
        "b": [of_a[back].tolist(), [round(value, 3) for value in back_cosine.tolist()]],
    }
