"""What is evaluated: an SAE, or a baseline, as a function of activations."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.activity import Code, join_codes
from tcsae.evaluate.metrics import Output
from tcsae.shared.sae import SparseAutoencoder

BATCH_CODE_ENTRIES = 8 << 20
"""Of a dense code or of pre-activations, at most: 32 MB."""

System = Callable[[Float[Tensor, "n d_model"]], Output]
"""Activations in, reconstruction and code out."""


class SaeOutput:
    """An SAE as a system, encoding at most BATCH_CODE_ENTRIES at a time."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        size = max(1, BATCH_CODE_ENTRIES // self.sae.config.d_sae)
        parts = [self._part(part) for part in x.split(size)]
        x_hats, codes = zip(*parts, strict=True)
        return Output(torch.cat(x_hats) if len(parts) > 1 else x_hats[0], join_codes(list(codes)))

    def _part(self, x: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n d_model"], Code]:
        if self.sae.config.activation == "gelu":  # next to no entry is zero, so sparse code would cost three times more
            dense = self.sae.encode(x)
            return self.sae.decode(dense, x), dense
        code = self.sae.encode_sparse(x)
        return self.sae.decode_sparse(code, x), code
