"""What every SAE has to beat: systems that nobody trained, scored by the same code."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tcsae.evaluate.measures.core import Output
from tcsae.evaluate.systems import SaeOutput, System
from tcsae.shared.base.errors import StoreError
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules, counted, norm_median
from tcsae.shared.store.reader import Store

DEFINITIONS = {
    "zero_output": "baseline: xhat = 0",
    "mean_output": "baseline: xhat = the mean of x over all valid positions of the train split",
    "pca": "baseline: projection on the first k principal components of a sample of the train split, k the SAE's",
    "random_topk": "baseline: as many random unit directions as the SAE has latents, encoder = decoder transposed, x "
    "centred on the train mean, the SAE's k largest products kept",
    "untrained": "baseline: the same number of latents, Xavier-normal encoder and decoder, relu, no bias: what the "
    "paper's printed figures are of",
}
PCA_TOKENS = 32_768
"""Sampled from the train split for the principal components."""


class ConstantOutput:
    """Answers every activation with one vector: zero, or the mean of the train split. It has no latents.

    What it costs through the tail is in the `Reference` of a pass already, under the name `losses`.
    """

    def __init__(self, value: Float[Tensor, " d_model"], losses: Literal["zero", "mean"]) -> None:
        self.value, self.losses = value, losses

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        return Output(self.value.expand(len(x), -1), None)


class PcaOutput:
    """x projected on the first k principal components, around the mean. Its code is signed, so it has no L0."""

    def __init__(self, mean: Float[Tensor, " d_model"], components: Float[Tensor, "k d_model"]) -> None:
        self.mean, self.components = mean, components

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        code = (x - self.mean) @ self.components.T
        return Output(torch.addmm(self.mean, code, self.components), None)


def constant_baselines(mean: Float[Tensor, " d_model"]) -> dict[str, System]:
    """The two that cost nothing: always scored."""
    return {
        "zero_output": ConstantOutput(torch.zeros_like(mean), "zero"),
        "mean_output": ConstantOutput(mean, "mean"),
    }


def sized_baselines(
    store: Store, hook: str, rules: CountingRules, like: SaeConfig, device: torch.device | str = "cpu"
) -> dict[str, System]:
    """The three that have the size of an SAE, `like`; drawn with a fixed seed, then brought to `device`."""
    mean, covariance = sample_moments(store, hook, rules)
    k = min(like.k, like.d_model)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].T.float().contiguous()
    random = SparseAutoencoder(SaeConfig(d_model=like.d_model, d_sae=like.d_sae, activation="topk", k=like.k))
    untrained = SparseAutoencoder(SaeConfig(d_model=like.d_model, d_sae=like.d_sae, activation="relu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        random.W_dec.normal_(generator=generator)
        random.W_dec.div_(random.W_dec.norm(dim=1, keepdim=True))
        random.W_enc_rows.copy_(random.W_dec)
        random.b_dec.copy_(mean)
        deviation = math.sqrt(2 / (like.d_model + like.d_sae))
        for weight in (untrained.W_enc_rows, untrained.W_dec):
            weight.normal_(std=deviation, generator=generator)
    return {
        "pca": PcaOutput(mean.float().to(device), components.to(device)),
        "random_topk": SaeOutput(random.eval().to(device)),
        "untrained": SaeOutput(untrained.eval().to(device)),
    }


def sample_moments(
    store: Store, hook: str, rules: CountingRules
) -> tuple[Float64[Tensor, " d_model"], Float64[Tensor, "d_model d_model"]]:
    """Mean and covariance of x over about PCA_TOKENS counted positions, from evenly spaced train chunks.

    Raises StoreError if the train split has none.
    """
    split, step = store.train, store.sequences_per_chunk
    limit = None if rules.max_norm is None else rules.max_norm * norm_median(store, hook)
    chunks = range(0, split.n_sequences, step)
    n_chunks = max(1, math.ceil(PCA_TOKENS / (step * store.sequence_length)))
    n, total = 0, torch.zeros(store.d_model(hook), dtype=torch.float64)
    second = torch.zeros(len(total), len(total), dtype=torch.float64)
    for i in np.unique(np.linspace(0, len(chunks) - 1, min(n_chunks, len(chunks))).astype(int)):
        start = chunks[i]
        stop = min(start + step, split.n_sequences)
        x = torch.from_numpy(split.read(hook, start, stop)[counted(split, rules.without_norm(), start, stop)]).double()
        x = x if limit is None else x[~(x.norm(dim=1) > limit)]
        n, total = n + len(x), total + x.sum(0)
        second += x.T @ x
    if not n:
        raise StoreError(
            f"{store.location}: its train split has no position {rules}, so there are no principal "
            "components of it. Evaluate without --baselines."
        )
    mean = total / n
    return mean, second / n - torch.outer(mean, mean)
