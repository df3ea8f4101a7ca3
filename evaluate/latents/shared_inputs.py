"""What the parts work out once for all SAEs that read one hook: text, labels, contexts, the tail, the row of x."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray
from scipy.sparse import csr_array

from tcsae.evaluate.latents.intruder import context_vectors
from tcsae.evaluate.latents.material import Coded, Sequences
from tcsae.evaluate.latents.patched import CountingTail
from tcsae.evaluate.latents.predictability import Contexts
from tcsae.evaluate.latents.settings_of_latents import LatentsRequest
from tcsae.evaluate.probing.suite import choose_tokens, free_labels, halves
from tcsae.shared.base.errors import ConfigError, NoTailError
from tcsae.shared.lm.tail import Tail, TailError
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.store.reader import Store

X_RATE = 0.01
"""Of tokens, the highest of each dimension of x: where it is taken to be on."""


class Chosen(NamedTuple):
    """The latents that are looked at one by one."""

    sample: Int[ndarray, " n_sample"]
    """Those given, or live ones drawn at random."""
    wide: Int[ndarray, " n_wide"]
    """Others, with the widest contributions; none where latents are given."""
    widest: Int[ndarray, " n_widest"]
    """The widest hundredth of the live ones, to be ablated at once."""
    are_drawn: bool = True
    """Whether the sample is one."""

    @property
    def all(self) -> Int[ndarray, " n"]:
        return np.concatenate([self.sample, self.wide])


def choose_latents(coded: Coded, request: LatentsRequest) -> Chosen:
    """Raises ConfigError for a number that is no latent's."""
    n_latents, live, budget = len(coded.widths), coded.live, request.budget
    if unknown := [one for one in request.latents if one >= n_latents]:
        raise ConfigError(f"--latents {unknown[0]}: the SAE has latents 0 to {n_latents - 1}. Name some of these.")
    by_width = live[np.argsort(-coded.widths[live], kind="stable")]
    widest = by_width[: -(-len(live) // 100)]
    if request.latents:
        return Chosen(np.array(request.latents, np.int64), by_width[:0], widest, are_drawn=False)
    rng = np.random.default_rng(request.seed)
    sample = np.sort(rng.permutation(live)[: budget.sample])
    return Chosen(sample, by_width[~np.isin(by_width, sample)][: budget.widest], widest)


class SharedInputs:
    """Of one hook and one first counted position."""

    def __init__(self, store: Store, hook: str, skip_first: int, request: LatentsRequest) -> None:
        self.store, self.request = store, request
        self.sequences = Sequences(choose_tokens(store, hook, skip_first, request.budget.tokens))
        self.no_tail: str | None = None
        self.rows_of_x: dict[str, dict[str, float | None]] = {}
        """Rows that are the same for every SAE."""

    @cached_property
    def tail(self) -> CountingTail | None:
        """None where the store has none: `no_tail` says why."""
        try:
            return CountingTail(Tail.load(self.store.tail_path(self.sequences.tokens.hook)).model)
        except (NoTailError, TailError) as error:
            self.no_tail = str(error)
            return None

    @cached_property
    def texts(self) -> dict[int, str] | None:
        """What each token id that occurs spells; None without a tokenizer."""
        if self.store.tokenizer_path is None:
            return None
        return TokenTexts(self.store).table(np.unique(self.sequences.tokens.ids).tolist())

    @cached_property
    def _labels(self) -> tuple[list[Int[ndarray, " n"]], Bool[ndarray, " n"]]:
        labels, groups, _ = free_labels(self.store, self.sequences.tokens)
        return [one.values for one in labels], halves(groups)

    @property
    def train(self) -> Bool[ndarray, " n"]:
        """The half of the documents that is chosen and fitted on."""
        return self._labels[1]

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts(self.sequences, self._labels[0], self.train)

    @cached_property
    def vectors(self) -> csr_array:
        return context_vectors(self.sequences)

    @cached_property
    def x_firings(self) -> csr_array:
        """Dimensions of x as if they were latents: on at X_RATE of the tokens. At most as many as latents are drawn."""
        x = self.sequences.x
        rng = np.random.default_rng(self.request.seed)
        dimensions = rng.permutation(x.shape[1])[: self.request.budget.sample]
        columns = x[:, np.sort(dimensions)]
        limit = columns.kthvalue(max(1, int((1 - X_RATE) * len(columns))), 0).values
        return csr_array((columns > limit).numpy())

    @cached_property
    def _any_texts(self) -> TokenTexts:
        return TokenTexts(self.store)

    def token_text(self, ids: Int[ndarray, " n"]) -> list[str]:
        """What ids spell, whether they occur here or not."""
        return [self._any_texts[one] for one in ids.tolist()]
