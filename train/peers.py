"""One SAE trained by several processes, each on its part of every batch; their sums are those of one process.

Every rank reads the same order of data and takes its share of each batch's segments, so it knows the whole batch's
lengths without asking. Its losses and gradients, means over its own tokens, are weighted by its share of the tokens and
added up over ranks before they are clipped; the temporal term, a mean over windows, is weighted by its share of those.
The weights therefore stay the same on every rank, bit for bit, and rank 0 writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.codes import SparseCode, threshold_code
from tcsae.shared.errors import ConfigError
from tcsae.shared.ranks import ALONE, Ranks
from tcsae.train.config import TrainConfig
from tcsae.train.loader import Batch
from tcsae.train.trainer import StepResult, Trainer


@dataclass(frozen=True)
class Peers:
    """The processes that train one SAE together; alone by default."""

    ranks: Ranks = ALONE

    @property
    def writes(self) -> bool:
        """Whether this one writes checkpoints, metrics and the SAE."""
        return self.ranks.rank == 0

    def trainer(self, *given: Any) -> Trainer:
        return PeerTrainer(*given) if self.ranks.several else Trainer(*given)

    def wait(self) -> None:
        """Until all are here."""
        if self.ranks.several:
            dist.barrier()


NO_PEERS = Peers()


class PeerTrainer(Trainer):
    """Trains on this rank's part of each batch, as the others do on theirs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_whole = 0
        self.batch_code = self._batch_code

    def count(self, batch: Batch) -> None:
        self.progress.n_steps += 1
        self.progress.n_tokens += batch.n_whole
        self.progress.n_left_out += batch.n_left_out

    @torch.no_grad()
    def gradients(self, batch: Batch) -> StepResult:
        self._n_whole, before = batch.n_whole, self.tokens_since_fired.clone()
        result = super().gradients(batch)
        share = len(batch.x) / batch.n_whole
        names = sorted(result.losses)
        told = [*(result.losses[name] for name in names), result.l0]
        sums = torch.tensor(told, dtype=torch.float64, device=batch.x.device) * share
        dist.all_reduce(sums)
        result.losses = dict(zip(names, sums.tolist(), strict=False))
        result.l0 = float(sums[-1])
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(share)
            dist.all_reduce(parameter.grad)
        fired = (self.tokens_since_fired == 0).to(torch.int32)
        dist.all_reduce(fired, dist.ReduceOp.MAX)
        self.tokens_since_fired.copy_(before.add_(batch.n_whole).masked_fill_(fired.bool(), 0))
        return result

    def _batch_code(self, pre: Float[Tensor, "n d_sae"], k: int) -> SparseCode:
        """BatchTopK over the whole batch: every rank offers its largest, and all keep what is above the same bound."""
        want = k * self._n_whole
        offered = pre.new_zeros(want)
        best = pre.flatten().topk(min(want, pre.numel()), sorted=False).values
        offered[: len(best)] = best.clamp_(min=0)
        gathered = [torch.empty_like(offered) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, offered)
        found = torch.cat(gathered)
        last = found.kthvalue(len(found) - want + 1).values
        below = torch.nextafter(last, torch.full_like(last, -torch.inf))
        return threshold_code(pre, below.clamp(min=0))


def check_parallel(config: TrainConfig, world: int, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError for settings whose losses are no sums over a batch's parts, or batches that are too small."""
    if torch.device(device).type == "mps":
        raise ConfigError("One run in several processes is not for mps. Give --device cpu, or train in one process.")
    temporal = config.temporal
    found = {
        f"optimizer.gradients={config.optimizer.gradients!r}": config.optimizer.gradients == "autograd",
        f"data.max_norm={config.data.max_norm}": config.data.max_norm is not None,
        f"temporal.kind={temporal.kind!r}": temporal.active and temporal.kind in ("relative", "contrastive"),
        f"temporal.budget={temporal.budget}": temporal.budget > 0,
        f"temporal.position_penalty={temporal.position_penalty}": temporal.position_penalty > 0,
        f"sparsity.l0={config.sparsity.l0}": config.sparsity.l0 > 0,
        f"data.n_segments={config.data.n_segments}": config.data.n_segments < world,
    }
    if wrong := [name for name, does in found.items() if does]:
        raise ConfigError(
            f"One run in {world} processes: {', '.join(wrong)} cannot be taken apart by parts of a batch. Train it in "
            "one process, or several runs at once (--sweep, --preset), which are dealt out whole."
        )


def deal(items: Sequence[Any], ours: Ranks) -> list[Any]:
    """This rank's share."""
    return list(items[ours.rank :: ours.world])
