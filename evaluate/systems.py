"""What is evaluated: an SAE, or a baseline, as a function of activations."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.activity import Code, join_codes
from tcsae.evaluate.metrics import Output
from tcsae.shared.codes import SparseCode
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
        parts = [(self._decode(code, part), code) for part, code in code_parts(self.sae, x)]
        x_hats, codes = zip(*parts, strict=True)
        return Output(torch.cat(x_hats) if len(parts) > 1 else x_hats[0], join_codes(list(codes)))

    def _decode(self, code: Code, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return self.sae.decode_sparse(code, x) if isinstance(code, SparseCode) else self.sae.decode(code, x)


def code_parts(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"]
) -> Iterator[tuple[Float[Tensor, "n_part d_model"], Code]]:
    """Activations and their code, at most BATCH_CODE_ENTRIES at a time; at least one part, which may be empty."""
    # Next to no entry of a gelu is zero, so its sparse code would cost three times more.
    encode = sae.encode if sae.config.activation == "gelu" else sae.encode_sparse
    for part in x.split(max(1, BATCH_CODE_ENTRIES // sae.config.d_sae)):
        yield part, encode(part)
