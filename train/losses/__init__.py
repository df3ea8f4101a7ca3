"""Losses: pure functions of a code and its batch that return a differentiable scalar, one file a family.

`TEMPORAL` is the registry of temporal.kind. A term gets the code of the latents in its scope, the batch whose segments
lie end to end, and a seed for what it draws in this step; it returns its value at weight 1, as this process's share.
Those in `STATEFUL` also take what a trainer keeps for them.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.sae.ops import Code
from tcsae.train.batch import Batch
from tcsae.train.losses.contrastive import contrastive
from tcsae.train.losses.difference import difference, gated, relative
from tcsae.train.losses.direction import direction
from tcsae.train.losses.state import NO_STATE, TermState
from tcsae.train.losses.t_sae import t_sae
from tcsae.train.losses.topic import local_topic, topic
from tcsae.train.settings.temporal_settings import TemporalConfig

Term = Callable[[TemporalConfig, Code, Batch, int], Float[Tensor, ""]]
StatefulTerm = Callable[[TemporalConfig, Code, Batch, int, TermState], Float[Tensor, ""]]

TEMPORAL: dict[str, Term] = {
    "difference": difference,
    "relative": relative,
    "gated": gated,
}
STATEFUL: dict[str, StatefulTerm] = {
    "contrastive": contrastive,
    "local": contrastive,  # from far pairs of the same segment
    "direction": direction,
    "topic": topic,
    "local-topic": local_topic,
    "t-sae": t_sae,
}


def temporal_term(kind: str, state: TermState = NO_STATE) -> Term:
    """The term of that name. Raises ConfigError for an unknown one, with the nearest."""
    if kind in STATEFUL:
        stateful = STATEFUL[kind]
        return lambda config, code, batch, seed: stateful(config, code, batch, seed, state)
    if kind not in TEMPORAL:
        raise ConfigError(unknown("temporal.kind", kind, [*TEMPORAL, *STATEFUL]))
    return TEMPORAL[kind]
