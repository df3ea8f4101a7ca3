"""From a step's rows to code, reconstructions and their error: tensors alone, so that --compile can make it one graph.

What is drawn or counted on the host (pairs of the temporal terms, the dead of AuxK, the guard) stays outside.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.sae.activations import Encoded, Encoder
from tcsae.shared.sae.module import SparseAutoencoder, layer_normed
from tcsae.shared.sae.ops import Code, EncoderWeights, decode_code, part
from tcsae.shared.sae.sparse import SparseCode


class Recipe(NamedTuple):
    """What a run's settings say of it, beside the SAE's."""

    group_weights: tuple[float, ...]
    bandwidth: float


class Autoencoded(NamedTuple):
    """A batch's code and reconstructions, with gradients."""

    inputs: Float[Tensor, "n d_model"]
    """What the encoder reads before b_dec is taken away."""
    encoded: Encoded
    x_hats: list[Float[Tensor, "n d_model"]]
    """From every prefix of the groups."""
    error: Float[Tensor, ""]
    """sum over prefixes g of w_g ||x - x_hat_g||^2 (matryoshka; one prefix is the plain autoencoder)."""


BatchTopk = Callable[[Float[Tensor, "n d_sae"], int], SparseCode]


def autoencode(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], recipe: Recipe, batchtopk: BatchTopk
) -> Autoencoded:
    """Of rows in the units of training."""
    inputs, scaling = encoder_input(sae, x)
    encoded = encode(sae, inputs, recipe, batchtopk)
    x_hats = _reconstructions(sae, encoded.code, scaling)
    return Autoencoded(inputs, encoded, x_hats, prefix_error(x_hats, x, recipe.group_weights))


def encoder_input(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"]
) -> tuple[Float[Tensor, "n d_model"], tuple[Tensor, Tensor] | None]:
    """What the encoder reads before b_dec is taken away, and (scale, shift) of the decoder's output, if any."""
    if sae.config.layer_norm == "none":
        return x, None
    inputs, mean, spread = layer_normed(x)
    return inputs, (spread, mean) if sae.config.layer_norm == "in_out" else None


def encode(sae: SparseAutoencoder, inputs: Float[Tensor, "n d_model"], recipe: Recipe, batchtopk: BatchTopk) -> Encoded:
    """The code, with gradients to encoder, biases and thresholds."""
    weights = EncoderWeights(sae.W_enc_rows, sae.b_enc, sae.b_dec)
    centred = inputs - sae.b_dec.detach()
    return sae.kind.train(Encoder(centred, weights, sae.config.k, sae.threshold, recipe.bandwidth, batchtopk))


def _reconstructions(
    sae: SparseAutoencoder, code: Code, scaling: tuple[Tensor, Tensor] | None
) -> list[Float[Tensor, "n d_model"]]:
    """Of every prefix of the groups: prefix g decodes the latents of groups 0..g."""
    ranges = sae.config.group_ranges()
    weights = sae.W_dec.split([stop - first for first, stop in ranges]) if len(ranges) > 1 else [sae.W_dec]
    x_hats: list[Tensor] = []
    for (first, stop), W_dec in zip(ranges, weights, strict=True):
        one = decode_code(part(code, first, stop), W_dec, None if x_hats else sae.b_dec)
        x_hats.append(x_hats[-1] + one if x_hats else one)
    if scaling is None:
        return x_hats
    spread, mean = scaling
    return [x_hat * spread + mean for x_hat in x_hats]


def prefix_error(
    x_hats: list[Float[Tensor, "n d_model"]], x: Float[Tensor, "n d_model"], weights: tuple[float, ...]
) -> Float[Tensor, ""]:
    """sum over prefixes g of w_g ||x - x_hat_g||^2."""
    errors = [F.mse_loss(x_hat, x, reduction="sum") for x_hat in x_hats]
    return sum((weight * error for weight, error in zip(weights, errors, strict=True)), start=x.new_zeros(()))


def without_radial(W: Float[Tensor, "n d"], grad: Float[Tensor, "n d"]) -> None:
    """Take the gradient along unit rows away, in place: the norm would undo it, yet it would feed Adam's moments."""
    grad.addcmul_(W, (grad * W).sum(1)[:, None], value=-1)


def norm_rows(W: Float[Tensor, "n d"], halted: Float[Tensor, ""] | None) -> None:
    """Bring rows back to norm 1, in place; where an update was masked they are so to the last bit already."""
    norm = W.norm(dim=1, keepdim=True)
    W.div_(norm if halted is None else torch.where(halted > 0, 1.0, norm))
