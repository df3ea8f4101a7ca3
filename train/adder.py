"""What a step needs of the whole batch where several processes have a part of it each; alone, it has all of it.

Every loss is a mean over the whole batch: a process adds up its own tokens' share, the adder makes the sum of all, and
the same number is then known to all of them. Alone nothing is done, so that one process computes as if there were none.
"""

import math

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tcsae.shared.base.distributed import Ranks
from tcsae.shared.sae.sparse import SparseCode, batchtopk_code, threshold_code


class Adder:
    """Of one process alone."""

    keeps = 1.0
    """What a total that all hold is multiplied by before each adds its new part: 0 in all processes but the first."""

    def tensor(self, part: Tensor) -> Tensor:
        """The sum of all parts, in place."""
        return part

    def number(self, part: float) -> float:
        return part

    def norm(self, part: Tensor) -> float:
        """Of all parts laid end to end."""
        return float(part.norm())

    def mean(self, rows: Float[Tensor, "n d"], _n: int) -> Float[Tensor, " d"]:
        """Of all rows, `n` in the whole batch."""
        return rows.mean(0)

    def any(self, part: Bool[Tensor, " d"]) -> Bool[Tensor, " d"]:
        """Where some part is true."""
        return part

    def rows(self, part: Float[Tensor, "m d"], _at: Int[Tensor, " m"], _n: int) -> Float[Tensor, "n d"]:
        """All n rows, of which this process has those at `at`."""
        return part

    def own(self, whole: Float[Tensor, "n d"], _at: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """This process's rows of all."""
        return whole

    def batch_code(self, pre: Float[Tensor, "m d_sae"], k: int, _n: int) -> SparseCode:
        """BatchTopK: this part's share of the whole batch's n * k largest."""
        return batchtopk_code(pre, k)


class RankAdder(Adder):
    """Of a process of several, which all call the same in the same order."""

    def __init__(self, ours: Ranks) -> None:
        self.world = ours.world
        self.keeps = float(ours.rank == 0)

    def tensor(self, part: Tensor) -> Tensor:
        dist.all_reduce(part)
        return part

    def number(self, part: float) -> float:
        return self.tensor(torch.tensor([part], dtype=torch.float64)).item()

    def norm(self, part: Tensor) -> float:
        return math.sqrt(self.number(float(part.norm()) ** 2))

    def mean(self, rows: Float[Tensor, "n d"], n: int) -> Float[Tensor, " d"]:
        return self.tensor(rows.sum(0)) / n

    def any(self, part: Bool[Tensor, " d"]) -> Bool[Tensor, " d"]:
        return self.tensor(part.to(torch.int32)) > 0

    def rows(self, part: Float[Tensor, "m d"], at: Int[Tensor, " m"], n: int) -> Float[Tensor, "n d"]:
        return self.tensor(part.new_zeros(n, part.shape[1]).index_copy_(0, at, part))

    def own(self, whole: Float[Tensor, "n d"], at: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return whole[at]

    def batch_code(self, pre: Float[Tensor, "m d_sae"], k: int, n: int) -> SparseCode:
        """Every process offers its largest, and all keep what is above the same bound, ties with it included."""
        want = k * n
        offered = pre.new_zeros(want)
        best = pre.flatten().topk(min(want, pre.numel()), sorted=False).values
        offered[: len(best)] = best.clamp_(min=0)
        gathered = [torch.empty_like(offered) for _ in range(self.world)]
        dist.all_gather(gathered, offered)
        found = torch.cat(gathered)
        last = found.kthvalue(len(found) - want + 1).values
        below = torch.nextafter(last, torch.full_like(last, -torch.inf))
        return threshold_code(pre, below.clamp(min=0))


ALONE = Adder()


def adder_of(ours: Ranks) -> Adder:
    return RankAdder(ours) if ours.several else ALONE
