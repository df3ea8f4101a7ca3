"""Concentration: whether a few dense, wide latents make the figures that are pooled over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from tcsae.evaluate.measures.code_ops import columns
from tcsae.evaluate.measures.latent_terms import WIDEST, widest
from tcsae.evaluate.planted.matching import antipodal_pairs
from tcsae.evaluate.planted.recovery_figures import ANTIPODAL_COSINE
from tcsae.shared.sae.crosscoder import decoder_rows
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode

DENSE_RATE = 0.1


class Concentration:
    """Firing rates and variances of the latents."""

    definitions: Mapping[str, str] = {
        "n_dense": f"latents on at more than {DENSE_RATE:.0%} of tokens",
        "widest_share": f"share of the code's variance in the widest {WIDEST:.0%} of latents",
        "effective_latents": "participation ratio of the latents' variances, (sum v)^2 / sum v^2",
    }

    def __init__(self, d_sae: int) -> None:
        self._n = torch.zeros((), dtype=torch.float64)
        self._sums = torch.zeros(3, d_sae, dtype=torch.float64)
        """Of each latent: tokens at which it is on, f, f^2."""

    def add(self, code: Code) -> None:
        if isinstance(code, SparseCode):
            values = code.values.double()
            self._n += code.n_tokens
            for row, terms in zip(self._sums, ((values > 0).double(), values, values.square()), strict=True):
                row.index_add_(0, code.latents, terms)
        else:
            self._n += len(code)
            self._sums += torch.stack([(code > 0).sum(0), code.sum(0), code.square().sum(0)]).double()

    def sums(self) -> Sequence[Tensor]:
        return [self._n, self._sums]

    def figures(self) -> dict[str, float | None]:
        if not self._n:
            return dict.fromkeys(self.definitions)
        on, mean, square = self._sums / self._n
        variance = (square - mean.square()).clamp(min=0)
        total = variance.sum()
        varies = bool(total > 0)
        return {
            "n_dense": int((on > DENSE_RATE).sum()),
            "widest_share": float(variance[widest(variance)].sum() / total) if varies else None,
            "effective_latents": float(total.square() / variance.square().sum()) if varies else None,
        }


DENSE_DEFINITIONS = {
    "antipodal_pairs": "pairs of latents that fire whose decoder rows have a cosine below "
    f"{ANTIPODAL_COSINE}: two sides of one coordinate",
    "dense_antipodal": f"dense latents, on at more than {DENSE_RATE:.0%} of tokens, with such a partner",
    "dense_l0": "dense latents on at a token, mean",
    "dense_rank": "effective rank of what they write: participation ratio of the eigenvalues of its covariance, on the "
    "tokens of the probes",
}


def dense_latents(
    sae: SparseAutoencoder, firings: Int[Tensor, "2 d_sae"], n_tokens: int, sample: Code | None
) -> dict[str, Any]:
    """{"figures", "definitions"} of the latents that are nearly always on: coordinates of a subspace, not features.

    `firings` count tokens and sequences (`core.firing_counts`) of n_tokens; `sample` is the code of some of these.
    """
    rows = torch.from_numpy(decoder_rows(sae))
    units = functional.normalize(rows, dim=1)
    alive, dense = ((firings[0] > bound).nonzero().squeeze(1) for bound in (0, DENSE_RATE * n_tokens))
    opposite = (units[dense] @ units[alive].T < ANTIPODAL_COSINE).any(1)
    figures = {
        "antipodal_pairs": antipodal_pairs(units[alive].numpy()),
        "dense_antipodal": int(opposite.sum()),
        "dense_l0": float(firings[0, dense].sum() / n_tokens),
        "dense_rank": None if sample is None else _rank(columns(sample, dense) @ rows[dense]),
    }
    return {"figures": figures, "definitions": DENSE_DEFINITIONS}


def _rank(written: Tensor) -> float | None:
    values = np.linalg.eigvalsh(np.cov(written.double().numpy(), rowvar=False)) if len(written) > 1 else np.zeros(1)
    total = np.square(values).sum()
    return float(values.sum() ** 2 / total) if total > 0 else None
