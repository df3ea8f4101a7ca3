"""Losses: pure functions of a code and its batch that return a differentiable scalar, one file a family.

`TEMPORAL` is the registry of temporal.kind. A term gets the code of the latents in its scope, the batch whose segments
lie end to end, a seed for what it draws in this step, and what a trainer keeps for it; it returns its value at weight
1, as this process's share.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.ops import Code
from tcsae.train.batch import Batch
from tcsae.train.config import TemporalConfig
from tcsae.train.losses.contrastive import contrastive
from tcsae.train.losses.difference import difference, gated, relative
from tcsae.train.losses.direction import direction
from tcsae.train.losses.state import TermState
from tcsae.train.losses.t_sae import t_sae

Term = Callable[[TemporalConfig, Code, Batch, int, TermState], Float[Tensor, ""]]

TEMPORAL: dict[str, Term] = {
    "difference": difference,
    "relative": relative,
    "gated": gated,
    "contrastive": contrastive,
    "local": contrastive,  # from far pairs of the same segment
    "direction": direction,
    "t-sae": t_sae,
}


def temporal_term(kind: str) -> Term:
    """The term of that name. Raises ConfigError for an unknown one, with the nearest."""
    if kind not in TEMPORAL:
        raise ConfigError(unknown("temporal.kind", kind, TEMPORAL))
    return TEMPORAL[kind]
