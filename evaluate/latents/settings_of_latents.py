"""What is asked of `tcsae latents`, and how much text and how many passes through the tail it may take."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from tcsae.shared.base.settings import to_dict

EFFECTS, BITS, REPEATS, TOKENS, TEXT = PARTS = ("effects", "bits", "redundancy", "tokens", "text")
SAE = "SAE"
"""The row of the SAE itself; the others are what it is compared with."""
TITLES = {
    EFFECTS: "Effects: what ablating and steering a latent does to the language model",
    BITS: "Code length: bits a token",
    REPEATS: "Redundancy: latents that repeat others",
    TOKENS: "Splitting and absorption: labels of token ids",
    TEXT: "Predictability: whether the text tells when a latent fires",
}
MEANINGS = {
    EFFECTS: "A latent matters if its ablation costs more than that of a random direction. At equal KL the better "
    "steering direction is the one that costs the following text less.",
    BITS: "At the same error, fewer bits are a shorter description of x. bits x: what principal components take.",
    REPEATS: "Antipodal pairs, twins and followers repeat what another latent says: the fewer, the better.",
    TOKENS: "Few splits and little absorption mean one latent a label. Near the figures of permuted ids no latent "
    "stands for the label.",
    TEXT: "The higher the AUROC, the better a reader can predict the latent. Dimensions of x show what is no merit of "
    "the SAE.",
}
"""How each part is read, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Counts that cost and precision depend on."""

    tokens: int = 100_000
    """Of the eval split that are looked at, whole documents from the first on."""
    sample: int = 32
    """Live latents drawn at random, whose medians stand for all."""
    widest: int = 8
    """Latents of the widest contributions, besides."""
    sequences: int = 12
    """In which a latent is ablated, at most."""
    events: int = 6
    """Tokens at which a latent is ablated alone."""
    places: int = 6
    """Tokens at which it is steered."""
    tail_tokens: int = 1_000_000
    """Positions that the tail is given for each SAE, about: where they would be more, the three counts above shrink."""

    def within(self, n_latents: int, sequence_length: int) -> "Budget":
        """The same with fewer sequences, events and places where `tail_tokens` does not allow as many."""
        cost = self.sequences + EVENT_ROWS * self.events + PLACE_ROWS * self.places
        share = self.tail_tokens / max(1, n_latents * sequence_length * cost)
        if share >= 1:
            return self
        counts = {name: max(1, int(getattr(self, name) * share)) for name in ("sequences", "events", "places")}
        return replace(self, **counts)


EVENT_ROWS, PLACE_ROWS = 3, 4
"""Sequences that an event, and a place with its search, take of the tail for each latent."""
FULL = Budget()
QUICK = Budget(tokens=25_000, sample=16, widest=4, sequences=4, events=3, places=3, tail_tokens=150_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsRequest:
    """What is asked for on the command line."""

    names: Collection[str] = ()
    """Runs; none: all."""
    parts: tuple[str, ...] = PARTS
    latents: tuple[int, ...] = ()
    """In place of a sample; none: drawn."""
    budget: Budget = FULL
    force: bool = False
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """What figures depend on besides weights, store and definitions."""
        return {"latents": list(self.latents), "seed": self.seed} | to_dict(self.budget)

    def with_counts(self, **counts: int | None) -> "LatentsRequest":
        """The same with some counts of the budget, those that are not None."""
        return replace(self, budget=replace(self.budget, **{k: v for k, v in counts.items() if v is not None}))
