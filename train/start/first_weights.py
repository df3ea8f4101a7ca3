"""The first weights of a run."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.persistent import PersistentAutoencoder
from tcsae.shared.sae.temporal_features import TemporalFeatureAutoencoder
from tcsae.train.config import TrainConfig

MEDIAN_STEPS = 50
FIRST_THRESHOLD = 0.1


@torch.no_grad()
def initial_sae(config: TrainConfig, sample: Float[Tensor, "n d_model"]) -> SparseAutoencoder:
    """Fresh weights by `config.init`, on the device of `sample`, which is in the units that training sees.

    They are drawn on the CPU: a seed gives the same weights on every device.
    """
    sae = new_sae(config.sae)
    generator = torch.Generator().manual_seed(config.init_seed)
    match config.init.weights:
        case _ if isinstance(sae, TemporalFeatureAutoencoder):
            sae.draw(generator)
        case "xavier":
            torch.nn.init.xavier_normal_(sae.W_enc_rows, generator=generator)
            torch.nn.init.xavier_normal_(sae.W_dec, generator=generator)
            if config.optimizer.unit_decoder:
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        case "uniform":
            for weights in (sae.W_enc_rows, sae.W_dec.T):  # outputs x inputs, as torch.nn.Linear has them
                torch.nn.init.kaiming_uniform_(weights, a=math.sqrt(5), generator=generator)
            if config.optimizer.unit_decoder:
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        case "transpose":
            sae.W_dec.normal_(generator=generator)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            sae.W_enc_rows.copy_(sae.W_dec)
    match config.init.b_dec:
        case "mean":
            sae.b_dec.copy_(sample.mean(0))
        case "median":
            sae.b_dec.copy_(geometric_median(sample))
    if sae.threshold is not None and sae.kind.threshold == "learned":
        sae.threshold.fill_(FIRST_THRESHOLD)
    if isinstance(sae, PersistentAutoencoder):
        sae.decay_logit.fill_(config.init.decay).logit_()
    return sae.to(sample.device)


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(MEDIAN_STEPS):
        nearness = 1 / (x - point).norm(dim=1).clamp_(min=1e-8)
        point = nearness @ x / nearness.sum()
    return point
