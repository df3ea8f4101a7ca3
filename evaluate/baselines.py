"""What every SAE has to beat: outputs that do not look at their input, scored by the same code."""

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.metrics import Activity, Output

DEFINITIONS = {
    "zero_output": "baseline: xhat = 0",
    "mean_output": "baseline: xhat = the mean of x over all valid positions of the train split",
}


class ConstantOutput:
    """Answers every activation with one vector: zero, or the mean of the train split. It has no latents."""

    def __init__(self, value: Float[Tensor, " d_model"]) -> None:
        self.value = value

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        nothing = torch.zeros(len(x), dtype=torch.float64)
        no_latents = torch.zeros(0, dtype=torch.int64)
        return Output(self.value.expand(len(x), -1), Activity(nothing, nothing, no_latents))
