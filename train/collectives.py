"""Sums over the processes that train one SAE, each on its part of every batch; the identity in one process.

Every loss is a sum over a batch's tokens divided by the tokens of the whole batch, so a process computes its share of
it, and gradients are added up at the end. What is no plain sum (a ratio, a contrast of all rows, BatchTopK's cut) is
computed from whole-batch quantities in every process and then divided by their number (`share`), so that the shares
add up again.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tcsae.shared.base.device import static_shapes, sum_dtype
from tcsae.shared.base.distributed import ALONE, Ranks
from tcsae.shared.sae.sparse import SparseCode, batchtopk_code, from_flat, threshold_code


class Collectives:
    """All-reduce helpers. All processes of `ranks` call the same ones in the same order."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.world, self.is_first = ranks.world, ranks.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def sum_(self, part: Tensor) -> Tensor:
        """The sum of all parts, in place; no gradient."""
        if not self.alone:
            dist.all_reduce(part)
        return part

    def sum(self, part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum of all parts, with a gradient to this process's."""
        if self.alone:
            return part
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(part)

    def share(self, whole: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """This process's share of a loss that all have computed for the whole batch."""
        return whole / self.world

    def norm(self, part: Tensor) -> Float[Tensor, ""]:
        """Norm of all parts laid end to end, in the dtype of sums."""
        wide = sum_dtype(part.device)
        return part.norm().to(wide) if self.alone else self.sum_(part.to(wide).square().sum()).sqrt()

    def mean(self, rows: Float[Tensor, "n d"], n_whole: int) -> Float[Tensor, " d"]:
        """Mean over the rows of all parts."""
        return rows.mean(0) if self.alone else self.sum_(rows.sum(0)) / n_whole

    def any(self, part: Bool[Tensor, " d"]) -> Bool[Tensor, " d"]:
        """Where some part is true."""
        return part if self.alone else self.sum_(part.to(torch.int32)) > 0

    def smallest(self, part: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """The least entry of all parts; infinity if there is none."""
        least = torch.cat([part, part.new_full((1,), torch.inf)]).min()
        if not self.alone:
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least

    def rows(self, part: Float[Tensor, "m d"], at: Int[Tensor, " m"], n: int) -> Float[Tensor, "n d"]:
        """All n rows, of which this process has those at `at`; with a gradient to them."""
        return part if self.alone else self.sum(part.new_zeros(n, part.shape[1]).index_copy(0, at, part))

    def batchtopk(self, pre: Float[Tensor, "m d_sae"], k: int, n_whole: int) -> SparseCode:
        """This part's share of the whole batch's n * k largest positive entries.

        Every process offers its largest, and all keep what is above the same cut, ties with it included.
        """
        if self.alone:
            return batchtopk_code(pre, k)
        n_kept = k * n_whole
        offered = pre.new_zeros(n_kept)
        flat = pre.flatten()
        best = flat.topk(min(n_kept, pre.numel()), sorted=False)
        offered[: len(best.values)] = best.values.clamp_(min=0)
        gathered = [torch.empty_like(offered) for _ in range(self.world)]
        dist.all_gather(gathered, offered)
        candidates = torch.cat(gathered)
        last = candidates.kthvalue(len(candidates) - n_kept + 1).values
        below = torch.nextafter(last, torch.full_like(last, -torch.inf)).clamp(min=0)
        if static_shapes(pre):
            at = best.indices.sort().values
            return from_flat(at, torch.where(flat[at] > below, flat[at], 0.0), pre.shape)
        return threshold_code(pre, below)


ONE_PROCESS = Collectives()
