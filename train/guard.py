"""The guard: no loss that is not finite, or that explodes, moves a weight.

On a CPU a step's figures are read before its update. Elsewhere they are judged where they are, and the update is masked
there: from a bad step on nothing moves, until the host has read the verdict, while the next step runs. So a device is
never waited for, and no checkpoint is written before the last verdict is known.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.device import Readout, sum_dtype
from tcsae.shared.base.errors import RunError
from tcsae.train.batch import Batch

LOSS_DECAY = 0.98
"""Of the running mean that a loss is held against."""


CORRELATION_DECAY = 0.8
"""The same of the adjacent correlation, which is read with the lines of the log."""


class UnstableError(RunError):
    """A loss or gradient is not finite, or the loss explodes: no weight was touched, nor by any batch since. Or the
    code's adjacent correlation fell (`counted`): the batch's step was made."""

    def __init__(self, message: str, batch: Batch, counted: bool = False) -> None:
        super().__init__(message)
        self.batch = batch
        """The batch that did it: the one before the last, where a verdict is read late."""
        self.counted = counted


class Verdict(NamedTuple):
    """What a step's figures came to."""

    loss: float
    grad_norm: float
    mean_before: float
    mean_after: float
    """The running mean of the loss, this step's taken up unless it is bad."""
    bad: bool
    most_dead: int
    """Latents that may be dead in the next two steps, at most."""

    def check(self, step: int, explode: float, batch: Batch) -> None:
        """Raises UnstableError for a bad one."""
        if self.bad:
            raise UnstableError(
                f"step {step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}, the mean loss "
                f"so far {self.mean_before:.4g} and {explode:g} times that is allowed (guard.explode). "
                "No weight was touched; lower optimizer.lr. Where the norms of a few tokens are far above the others', "
                "data.max_norm=10 leaves them out.",
                batch,
            )


def watched(correlation: float, mean: float | None, fall: float, step: int, batch: Batch) -> float:
    """The running mean of the code's adjacent correlation, this reading taken up.

    Codes that follow the text have a correlation that changes slowly; where latents die by the hundred, or all fire at
    random, it falls long before the loss explodes. Raises UnstableError for a fall by more than `fall`.
    """
    if mean is None:
        return correlation
    if mean - correlation > fall:
        raise UnstableError(
            f"step {step}: the code's adjacent correlation is {correlation:.3f}, its running mean {mean:.3f}, and a "
            f"fall by {fall:g} is allowed (guard.correlation). Lower optimizer.lr, or bring the last good weights "
            "back: guard.action=restore.",
            batch,
            counted=True,
        )
    return CORRELATION_DECAY * mean + (1 - CORRELATION_DECAY) * correlation


def judged(loss: float, grad_norm: float, mean_loss: float, explode: float) -> Verdict:
    """The verdict on figures that are at hand."""
    finite = math.isfinite(loss + grad_norm)
    bad = not finite or bool(mean_loss and loss > explode * mean_loss)
    decay = LOSS_DECAY if mean_loss else 0.0
    after = mean_loss if bad else decay * mean_loss + (1 - decay) * loss
    return Verdict(loss, grad_norm, mean_loss, after, bad, 0)


class DeviceGuard:
    """The same on a device, without a read."""

    def __init__(self, explode: float, device: torch.device) -> None:
        self.explode, self.device = explode, device
        self.start(0.0)

    def start(self, mean_loss: float) -> None:
        """From a running mean on, with nothing bad so far."""
        self._mean = torch.full((), mean_loss, dtype=sum_dtype(self.device), device=self.device)
        self.halted = torch.zeros((), device=self.device)
        """float32, 1 from the first bad step on: what a fused optimiser takes as `found_inf`."""

    def judge(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""], most_dead: Tensor) -> Readout:
        """Halt if these figures are bad; returns the verdict, to be read with `verdict_of`."""
        before, norm = self._mean, grad_norm.to(self._mean)
        loss = loss.to(before)
        bad = ~torch.isfinite(loss + norm) | ((before != 0) & (loss > self.explode * before))
        self.halted = torch.maximum(self.halted, bad.to(self.halted))
        risen = torch.where(before != 0, LOSS_DECAY * before + (1 - LOSS_DECAY) * loss, loss)
        self._mean = torch.where(self.halted > 0, before, risen)
        figures = (loss, norm, before, self._mean, bad.to(before), most_dead.to(before))
        return Readout(torch.stack(figures), "guard")


def verdict_of(readout: Readout) -> Verdict:
    """Waits for the device, if it has not come so far."""
    loss, grad_norm, before, after, bad, most_dead = readout.values().tolist()
    return Verdict(loss, grad_norm, before, after, bool(bad), int(most_dead))
