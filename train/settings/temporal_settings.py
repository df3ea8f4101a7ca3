"""The settings of the temporal term."""

from dataclasses import dataclass, field, fields
from typing import Literal

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import check_least, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastConfig:
    """Pairs of tokens of the contrastive kinds, and what each is told from. CONTRASTIVE says which kind reads which."""

    temperature: float = 0.1
    """Scores (cosine, bilinear) are divided by it; t-sae has none."""
    negatives: Literal["documents", "sequence", "batch", "position"] | None = None
    """documents: pairs of other documents. sequence: pairs of the same segment. batch: both. position: pairs of other
    documents at the same position. None: as the kind says (contrastive: documents; local: sequence)."""
    gap: int = 16
    """Positions between the pairs of one segment, at least."""
    per_segment: int | None = None
    """Pairs drawn from a segment, at most. None: as the kind says (local and direction: all that fit; the
    others: 1)."""
    min_negatives: int = 1
    """Pairs with fewer negatives are left out."""
    centred: bool = False
    """Compare codes less their (running) mean at their position."""
    partner: Literal["previous", "past"] = "previous"
    """Of t-sae: the token before ("p" there), or any earlier one of the segment ("r")."""
    rank: int = 64
    """Of direction's bilinear score."""
    distance: int = 64
    """Positions between the two tokens of a topic pair, or of one under temporal.order=document, at least."""
    around: int = 4
    """Tokens on either side of each of a topic pair's two, of which none may occur around both."""

    def __post_init__(self) -> None:
        check_positive("temporal.contrast.temperature", self.temperature)
        for name in ("gap", "min_negatives", "rank", "distance"):
            check_least(f"temporal.contrast.{name}", getattr(self, name), 1)
        check_least("temporal.contrast.around", self.around, 0)
        if self.per_segment is not None:
            check_least("temporal.contrast.per_segment", self.per_segment, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TemporalConfig:
    """The temporal consistency term, and the position penalty."""

    weight: float = 0.0
    """lambda_2; 0 leaves the term out."""
    kind: str = "difference"
    """A name in `tcsae.train.losses.TEMPORAL`. difference: eq. 3. relative: the same over the pairs' squared norms, so
    that shrinking the code gains nothing. gated: eq. 3 with each pair weighted by relu(cos(x_t, x_t+1)). contrastive:
    InfoNCE of adjacent tokens against other documents' pairs. local: against far pairs of the same segment. direction:
    the next token against the one before, by a learned bilinear score. topic: tokens of one document that share no
    word. local-topic: the mean of the two. t-sae: as arXiv 2511.05541's code."""
    scope: Literal["all", "first"] = "all"
    """Latents it acts on: all, or the first group of sae.groups."""
    window: int = 3
    pairs: Literal["adjacent", "all"] = "adjacent"
    """Pairs within a window."""
    order: Literal["text", "segment", "document", "batch"] = "text"
    """Order of the positions that the term sees, and an SAE that reads neighbours (crosscoder, TFA, persistent SAE). As
    controls: shuffled within each segment (its pairs are near, but not adjacent), pairs of one document
    contrast.distance positions apart or more (what is left is topic), or shuffled over the batch (any documents)."""
    warmup: float = 0.0
    """Share of the run over which the weight rises from 0."""
    budget: float = 0.0
    """If above 0, the weight follows: the term's gradient at the code gets this share of the reconstruction's norm."""
    position_penalty: float = 0.0
    """Weight of the code's variance between positions (running means), over the same scope."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    """Of the contrastive kinds."""

    def __post_init__(self) -> None:
        check_least("temporal.window", self.window, 2)
        for name in ("weight", "budget", "position_penalty"):
            check_least(f"temporal.{name}", getattr(self, name), 0)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"temporal.warmup={self.warmup}: must lie in 0..1, a share of the run.")
        if self.kind in CONTRASTIVE and self.pairs == "all":
            raise ConfigError(f"temporal.pairs='all' with temporal.kind={self.kind!r}: it takes adjacent pairs only.")
        if self.active:
            self._check_unread()
            self._check_negatives()

    def _check_unread(self) -> None:
        """Raises ConfigError for a setting of the pairs that the term does not read."""
        # A preset has a temperature of its own, which stays where another kind is chosen.
        read = {"temperature", *CONTRASTIVE.get(self.kind, ()), *["distance"] * (self.order == "document")}
        for one in fields(ContrastConfig):
            value, name = getattr(self.contrast, one.name), f"temporal.contrast.{one.name}"
            if one.name not in read and value != one.default:
                kinds = " or ".join(kind for kind, settings in CONTRASTIVE.items() if one.name in settings)
                kinds += " (and temporal.order=document)" if one.name == "distance" else ""
                cure = f"Set {name}={str(one.default).lower()}."
                raise ConfigError(f"{name}={value!r} is for temporal.kind={kinds}, and it is {self.kind!r}. {cure}")

    def _check_negatives(self) -> None:
        """Raises ConfigError where no pair can have the negatives that it needs: the term would be 0 on every batch."""
        limit, needed = self.pairs_per_segment, self.contrast.min_negatives
        if limit is None or self.negatives != "sequence":
            return
        others = limit if self.kind == "direction" else limit - 1  # direction has the token before, too
        if others < needed:
            raise ConfigError(
                f"temporal.kind={self.kind!r} draws {limit} pair(s) a segment (temporal.contrast.per_segment="
                f"{self.contrast.per_segment}) and tells each from others of its segment: {others} at most, fewer than "
                f"temporal.contrast.min_negatives={needed}. Set temporal.contrast.per_segment="
                f"{limit + needed - others} or more."
            )

    @property
    def active(self) -> bool:
        return self.weight > 0 or self.budget > 0

    @property
    def pairs_per_segment(self) -> int | None:
        """Pairs drawn from a segment, at most; None: all that fit."""
        return self.contrast.per_segment or (None if self.kind in ("local", "direction", "local-topic") else 1)

    @property
    def negatives(self) -> str:
        """What a contrastive kind's pairs are told from."""
        return self.contrast.negatives or (
            "sequence" if self.kind in ("local", "direction", "local-topic") else "documents"
        )

    @property
    def contrasts_documents(self) -> bool:
        """Whether all that its pairs are told from lies in other documents."""
        return self.kind in ("contrastive", "local", "topic", "local-topic") and (
            "topic" in self.kind or self.negatives in ("documents", "position")
        )

    @property
    def n_positions(self) -> int:
        """Consecutive positions that the term takes: it is 0 on segments that are all shorter."""
        gap, needed = self.contrast.gap, self.contrast.min_negatives
        match self.kind:
            case "contrastive" | "local" | "local-topic":
                return needed * gap + 2 if self.negatives == "sequence" else 2
            case "direction":
                return max(1, needed - 1) * gap + 3
            case "t-sae":
                return 2
            case "topic":
                return 1
        return self.window

    @property
    def reads_text(self) -> bool:
        """Whether the term takes token ids or their places in the document."""
        return self.active and (self.kind in ("topic", "local-topic") or self.order == "document")


_BY_GAP = ("gap", "per_segment", "min_negatives")
_BY_TOPIC = ("per_segment", "min_negatives", "centred", "distance", "around")
CONTRASTIVE = {
    "contrastive": (*_BY_GAP, "negatives", "centred"),
    "local": (*_BY_GAP, "negatives", "centred"),
    "direction": (*_BY_GAP, "rank"),
    "topic": _BY_TOPIC,
    "local-topic": ("gap", *_BY_TOPIC),
    "t-sae": ("per_segment", "partner"),
}
"""Kinds that compare pairs with pairs, and what each reads of `temporal.contrast` beside the temperature."""
SINGLE_TOKENS = ("t-sae", "topic", "local-topic")
"""Kinds that pick the two tokens of a pair themselves."""
