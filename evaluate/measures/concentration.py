"""Concentration: whether a few dense, wide latents make the figures that are pooled over all of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tcsae.evaluate.measures.core import Code
from tcsae.evaluate.measures.latent_terms import WIDEST, widest
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
