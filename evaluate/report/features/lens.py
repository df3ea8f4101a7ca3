"""What a latent does to the next token, as far as the tail knows: a logit lens through all that follows the hook."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.evaluate.report.features.feature_pass import Excerpt
from tcsae.shared.base.errors import NoTailError
from tcsae.shared.lm.tail import Tail, TailError
from tcsae.shared.store.reader import Store

N_TOKENS = 8
N_BINS = 40
"""Of the histogram of all changes of logits."""
LENS_BLOCK = 256
"""Directions that go through the tail at a time."""
DEFINITION = (
    "Change of each token's logit, minus the mean change over the vocabulary, when the latent's decoder row times its "
    "largest activation is added to the mean activation, in a sequence of one position, through every layer after the "
    "hook, the final norm and the unembedding. Only tokens that occur in the text looked at: the rest may never have "
    "been learned."
)


class Lens(NamedTuple):
    """Per direction, strongest first."""

    promoted: Int[Tensor, "n k"]
    gains: Float[Tensor, "n k"]
    suppressed: Int[Tensor, "n k"]
    losses: Float[Tensor, "n k"]
    lowest: Float[Tensor, " n"]
    highest: Float[Tensor, " n"]
    counts: Int[Tensor, "n n_bins"]
    """Tokens by their change, in equal bins from the lowest to the highest."""


@torch.inference_mode()
def logit_lens(
    tail: Tail,
    mean: Float[Tensor, " d_model"],
    directions: Float[Tensor, "n d_model"],
    tokens: Int[Tensor, " n_tokens"],
) -> Lens:
    """Which of `tokens` each direction, added to the mean activation, promotes and suppresses most (DEFINITION)."""
    k = min(N_TOKENS, len(tokens))
    plain = tail.logits(mean.view(1, 1, -1))[0]
    parts = []
    for block in directions.split(LENS_BLOCK):
        hidden = tail.hidden((mean + block)[:, None])[:, 0]
        for _, (logits,) in tail.slices(hidden):
            change = logits - plain
            change = change[:, tokens] - change.mean(1, keepdim=True)
            up, down = change.topk(k, dim=1), change.topk(k, dim=1, largest=False)
            parts.append((tokens[up.indices], up.values, tokens[down.indices], down.values, *_histogram(change)))
    if not parts:
        tokens, changes = torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        ends, counts = torch.zeros(0), torch.zeros(0, N_BINS, dtype=torch.int64)
        return Lens(tokens, changes, tokens, changes, ends, ends, counts)
    return Lens(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _histogram(change: Float[Tensor, "n n_tokens"]) -> tuple[Tensor, Tensor, Tensor]:
    low, high = change.amin(1), change.amax(1)
    bins = ((change - low[:, None]) / (high - low).clamp(min=1e-12)[:, None] * N_BINS).long().clamp(max=N_BINS - 1)
    counts = torch.zeros(len(change), N_BINS, dtype=torch.int64)
    return low, high, counts.scatter_add_(1, bins, torch.ones_like(bins))


class Lenses:
    """The lens after each hook of a store, or why there is none."""

    def __init__(self, store: Store, part: Excerpt) -> None:
        self.store = store
        lengths = torch.from_numpy(part.split.lengths[: part.n_sequences])
        valid = torch.arange(store.sequence_length) < lengths[:, None]
        self.tokens = torch.from_numpy(part.tokens)[valid].unique().long()
        self._tails: dict[str, Tail | str] = {}

    def tail(self, hook: str) -> Tail | str:
        """The tail, or why there is none. Raises StoreError for one that is damaged."""
        if hook not in self._tails:
            try:
                self._tails[hook] = Tail.load(self.store.tail_path(hook))
            except (NoTailError, TailError) as error:
                self._tails[hook] = str(error)
        return self._tails[hook]

    def of(self, hook: str, rows: Float[Tensor, "n window d_model"]) -> list[Lens] | None:
        """`logit_lens` of what latents add after a hook, at each position of a window; None without a tail."""
        tail = self.tail(hook)
        if isinstance(tail, str):
            return None
        mean = torch.from_numpy(self.store.array(f"statistics/{hook}/mean")[:]).float()
        return [logit_lens(tail, mean, directions, self.tokens) for directions in rows.unbind(1)]
