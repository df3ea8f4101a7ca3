"""Every temporal method on one store: which presets, how their learning rates are chosen, and the table's columns.

The rules, fixed before any run: all methods see the same number of tokens of the same store, at 1,024 latents and 16
active a token where the method has such a number. A method's learning rate is the one of RATES times its preset's that
has the highest explained variance on the *choose* half of the eval documents, after half of the steps, with a seed that
the table does not use. The table is of the *report* half, three seeds that set weights and data order, and the paired
differences to the twin named beside each row. A method's shuffled twin sees each segment's tokens in random order; the
topic term's sees pairs of any documents. Plain SAEs are what the literature calls stacked SAEs of a window (a code a
position), the mean over 3 positions its pooled ones.

After a first look at the *choose* half alone, T-SAE and TFA were given larger rates to choose from (FURTHER_RATES), as
both did best at the largest. TFA has no row for its variant that predicts from the past alone: its four products of
d_sae x d_sae a token take 16 times a TopK run's time.
"""

from dataclasses import replace
from typing import NamedTuple

from tcsae.paper.arms import Arm

RATES = (0.5, 1.0, 2.0)
"""Of the preset's own learning rate."""
FURTHER_RATES = {"t-sae": (1.0, 4.0, 13.0, 26.0), "t-sae-past": (1.0, 4.0, 13.0, 26.0), "tfa": (1.0, 2.0, 4.0, 8.0)}
"""Presets with the published rates, which are for long runs: 3e-4 and 1e-3; the others here do best near 4e-3."""
N_TOKENS = 2_560_000
"""Token visits of a run: 1,250 steps of 2,048."""
BASIC = ("sae.d_sae=1024", "sae.k=16")
TUNING_SEED = 100
"""Of weights and data order while a rate is chosen."""


class Method(NamedTuple):
    """A row of the table."""

    label: str
    preset: str
    settings: tuple[str, ...] = BASIC
    batch: int = 2048
    """Tokens of a batch."""
    shuffled: tuple[str, ...] | None = None
    """Settings of its shuffled twin beside the preset NAME-shuffled; None: there is nothing to shuffle."""
    rates: tuple[float, ...] = RATES
    """Multiples of the preset's learning rate that are tried; one: it is taken; none: it takes no step."""
    twin: str = "TopK"
    """Label of the row that it is compared with."""
    smooth: str = ""
    about: str = ""
    """What it is, in a sentence."""
    n_tokens: int = N_TOKENS
    """Token visits of a run."""
    ce_tokens: int | None = None
    """Its cross-entropies are of the first documents that hold so many tokens; None: all."""

    @property
    def name(self) -> str:
        return f"{self.label}, {self.smooth}" if self.smooth else self.label


SHUFFLED = ()
"""The preset NAME-shuffled as it is."""
METHODS = (
    Method("TopK", "topk", about="The plain SAE: no token knows of another."),
    Method("BatchTopK", "batchtopk", twin="TopK", about="16 active a token on average over a batch."),
    Method(
        "matryoshka",
        "temporal-matryoshka",
        (*BASIC, "temporal.weight=0"),
        twin="BatchTopK",
        about="BatchTopK whose first fifth has to reconstruct alone.",
    ),
    *(
        Method("TopK", "topk", smooth=smooth, about=about)
        for smooth, about in (
            ("ema=0.3", "The plain SAE's codes averaged along the sequence afterwards; they stay on, so L0 grows."),
            ("ema-topk=0.3", "The same, of which each token keeps its 16 largest."),
            ("mean=3", "The pooled SAE: the mean code over a window of 3, without training."),
            ("hysteresis=2", "A latent stays on while it is among the 32 largest."),
        )
    ),
    Method(
        "contrastive",
        "temporal-topk",
        shuffled=SHUFFLED,
        about="Adjacent codes contrasted with other documents' (InfoNCE).",
    ),
    Method(
        "contrastive, position penalty",
        "temporal-topk-penalised",
        shuffled=SHUFFLED,
        about="The same, with the code's variance between positions as a loss.",
    ),
    Method(
        "contrastive, centred", "temporal-topk-centred", shuffled=SHUFFLED, about="Of codes less their position's mean."
    ),
    Method(
        "contrastive, same position",
        "temporal-topk-positions",
        shuffled=SHUFFLED,
        about="Against other documents' codes at the same position.",
    ),
    Method(
        "local contrast",
        "local-contrast",
        shuffled=SHUFFLED,
        about="Adjacent codes contrasted with pairs of the same sequence 16 or more away, with the position penalty.",
    ),
    Method(
        "local contrast, batch",
        "local-contrast-batch",
        shuffled=SHUFFLED,
        about="The same, against other documents as well.",
    ),
    Method(
        "topic",
        "topic",
        shuffled=("temporal.order=batch",),
        about="Far tokens of one document contrasted with those of similar documents, with the position penalty.",
    ),
    Method(
        "local contrast and topic",
        "local-topic",
        shuffled=("temporal.order=batch",),
        about="Half of the weight to each.",
    ),
    Method(
        "direction", "direction", shuffled=SHUFFLED, about="The next token against the one before, by a bilinear score."
    ),
    Method(
        "T-SAE",
        "t-sae",
        batch=4096,
        twin="matryoshka",
        shuffled=("data.n_segments=32",),  # of 128 positions: a pair's two would only change places
        rates=FURTHER_RATES["t-sae"],
        about="arXiv 2511.05541 as its code trains it, partners one token before. Its shuffled twin encodes eight "
        "pairs of each sequence, an eighth of the tokens, so that the twin's EV says nothing of order.",
    ),
    Method(
        "T-SAE, past partners",
        "t-sae-past",
        batch=32_768,
        twin="matryoshka",
        shuffled=SHUFFLED,
        rates=FURTHER_RATES["t-sae-past"],
        about="The same, partners from anywhere before: eight pairs of each sequence, an eighth of its tokens.",
    ),
    Method(
        "crosscoder, 3 positions",
        "crosscoder-3",
        ("sae.d_sae=1024", "sae.k=48"),
        shuffled=SHUFFLED,
        about="One code for a window of 3, with 48 active: 16 a position.",
    ),
    Method(
        "crosscoder, 5 positions",
        "crosscoder-5",
        ("sae.d_sae=1024", "sae.k=80"),
        shuffled=SHUFFLED,
        about="One code for a window of 5, with 80 active.",
    ),
    Method(
        "crosscoder, 3 positions, untrained",
        "untrained-crosscoder-3",
        ("sae.d_sae=1024", "sae.k=48"),
        rates=(),
        about="Its first weights: what the window's shape gives alone.",
    ),
    Method(
        "TFA",
        "tfa",
        shuffled=SHUFFLED,
        rates=FURTHER_RATES["tfa"],
        about="arXiv 2511.01836: attention over past codes predicts, a TopK code of the rest; L0 is the novel code's.",
    ),
    Method(
        "persistent SAE",
        "persistent",
        shuffled=SHUFFLED,
        about="arXiv 2607.17117: each latent keeps a learned share of its state; L0 is that of what a token adds.",
    ),
    Method(
        "SFA + BatchTopK",
        "slow-linear",
        ("sae.d_sae=1024", "sae.k=12"),
        twin="BatchTopK",
        about="The 4 slowest linear directions, and 12 active latents on the rest.",
    ),
    Method(
        "PCA + BatchTopK",
        "wide-linear",
        ("sae.d_sae=1024", "sae.k=12"),
        twin="BatchTopK",
        about="The 4 widest linear directions, and 12 active latents on the rest.",
    ),
)


def rate_setting(rate: float) -> str:
    return f"optimizer.lr={rate:g}"


def tuning_arm(method: Method, rate: float) -> Arm:
    """A short run at one rate, scored on the *choose* half."""
    arm = table_arm(method, rate)
    return replace(
        arm,
        n_steps=arm.n_steps // 2,
        n_seeds=1,
        first_seed=TUNING_SEED,
        temporal=False,
        smooth="",
        documents="choose",
    )


def table_arm(method: Method, rate: float, shuffled: bool = False) -> Arm:
    """A row of the table, or its shuffled twin, at the chosen rate."""
    more = method.shuffled or () if shuffled else ()
    return Arm(
        label=f"{method.name}, shuffled" if shuffled else method.name,
        preset=f"{method.preset}-shuffled" if shuffled else method.preset,
        settings=(*method.settings, rate_setting(rate), *more),
        n_steps=method.n_tokens // method.batch if method.rates else 0,
        smooth=method.smooth,
        documents="report",
        vary=("init_seed", "data.seed"),
        ce_tokens=method.ce_tokens,
    )
