"""The paper's questions: which arms answer each, and which figures are shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tcsae.paper import arms
from tcsae.paper.arms import CONTRASTIVE, EQUATION_3, FRONTIER, MATRYOSHKA, MATRYOSHKA_PLAIN, PLAIN, RELATIVE, TEXT, Arm
from tcsae.paper.results import BUDGET, GROUPS, Gain, Results, X

# Markdown tables of arms: means over seeds and, in brackets, what differs from a twin.


class Figure(NamedTuple):
    """A column: its heading and how many digits it takes."""

    heading: str
    digits: int


FIGURES = {
    "explained_variance": Figure("EV", 4),
    "explained_variance_legacy": Figure("EV (legacy)", 4),
    "cossim": Figure("cosine", 4),
    "l2_ratio": Figure("L2 ratio", 4),
    "relative_reconstruction_bias": Figure("rel. bias", 3),
    "l0": Figure("L0", 1),
    "l1": Figure("L1", 1),
    "ce_loss_score": Figure("CE score", 4),
    "delta_ce": Figure("delta CE, nats", 4),
    "dead_fraction": Figure("dead", 3),
    "energy": Figure("mean squared norm of the code", 1),
    "slowness_to_x": Figure("relative change", 3),
    "rho_1_within": Figure("rho(1) in documents", 3),
    "rho_8_within": Figure("rho(8) in documents", 4),
    "rho_1_within_median": Figure("rho(1), median latent", 4),
    "jaccard_corrected": Figure("chance-corrected Jaccard", 3),
    "boundary_auc": Figure("join AUC", 3),
    "join_auc": Figure("join AUC against restarts", 3),
    "boundary_ratio": Figure("join ratio", 2),
    "position_share": Figure("position share", 4),
    "token_share": Figure("token share", 3),
    "document_share": Figure("document share", 3),
    "probe_document": Figure("probe: document", 3),
    "probe_token": Figure("probe: token", 3),
    "probe_position": Figure("probe: position", 3),
}
LEGEND = (
    "Means over seeds. In brackets: minus {twin}, seed by seed; a star where every seed's 95% interval over documents, "
    "paired, leaves out zero on that side."
)


class Line(NamedTuple):
    """A row of a table."""

    arm: Arm
    twin: Arm | None = None
    """What the brackets are in comparison with."""
    group: str = GROUPS[0]
    """What temporal measures are of: all latents, the first group, others that fire as often, or the activations."""


def table(results: Results, lines: Sequence[Line], figures: Sequence[str]) -> str:
    """One row a line, one column a figure."""
    rows = []
    for line in lines:
        label = line.arm.label
        if line.arm.store != TEXT:
            label += f", {line.arm.store}"
        if line.group == X:
            label = "x, the activations" + (f", {line.arm.store}" if line.arm.store != TEXT else "")
        elif line.group != GROUPS[0]:
            label += f": {line.group.replace('_', ' ')}"
        rows.append([label, *(_cell(results, line, figure) for figure in figures)])
    return markdown(["", *(FIGURES[figure].heading for figure in figures)], rows)


def _cell(results: Results, line: Line, figure: str) -> str:
    text = number(results.mean(line.arm, figure, line.group), FIGURES[figure].digits)
    if line.twin is None or figure == "energy" or line.group != "all":
        return text
    return f"{text} ({difference(results.gain(line.arm, line.twin, figure), FIGURES[figure].digits)})"


def difference(gain: Gain, digits: int) -> str:
    """The mean of a gain, signed, with its star."""
    if math.isnan(gain.mean):
        return "-"
    return f"{gain.mean:+.{digits}f}{'*' if gain.sure else ''}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return number(values[0], digits)
    return f"{np.mean(values):.{digits}f} ±{np.std(values, ddof=1):.{digits}f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Section:
    """One question and its table."""

    key: str
    title: str
    question: str
    lines: tuple[Line, ...]
    figures: tuple[str, ...]
    twin: str = ""
    """What the brackets compare with, in words."""
    picture: str = ""
    """Name of a picture in `figures`, if there is one."""
    also: tuple[Arm, ...] = ()
    """Arms that only the picture or a prediction needs."""

    @property
    def arms(self) -> list[Arm]:
        """All that it needs, each once."""
        named = (arm for line in self.lines for arm in (line.arm, line.twin) if arm is not None)
        return list(dict.fromkeys([*named, *self.also]))


FRONT = (
    "explained_variance",
    "delta_ce",
    "slowness_to_x",
    "rho_8_within",
    "rho_1_within_median",
    "jaccard_corrected",
    "energy",
)
CORE = ("explained_variance", "delta_ce", "l0", "dead_fraction")


def _to(twin: Arm, *compared: Arm) -> tuple[Line, ...]:
    """The activations, the twin, and what is compared with it."""
    return (Line(twin, None, X), Line(twin), *(Line(arm, twin) for arm in compared))


PERSISTENCE = (
    "explained_variance",
    "slowness_to_x",
    "rho_1_within",
    "rho_8_within",
    "jaccard_corrected",
    "document_share",
    "probe_document",
)
"""Figures of the questions about order and topic."""
TABLE = "table"
"""Key of the paper's own table, which is put together in `first_table`."""
TABLE_ARMS = [
    *arms.LOGGED.values(),
    *arms.WRITTEN.values(),
    arms.RESCALED,
    arms.NARROW,
    arms.NO_TERM,
    arms.TWO_PHASE,
]
SECTIONS = (
    Section(
        "frontier",
        "What a temporal term costs, and what it brings",
        "Explained variance and delta CE (nats that splicing the SAE in adds) against relative change (lower is "
        "slower; 1: as fast as the model's activations) for eq. 3, relative slowness and the contrastive term, at the "
        "same L0. The controls: fewer active latents, and codes made smaller. The measure has no scale, so a code "
        "that only shrinks gains nothing; the last column shows how much each one shrinks.",
        _to(PLAIN, *(arm for kind in FRONTIER.values() for arm in kind), *arms.FEWER, *arms.SCALED),
        FRONT,
        "no temporal term",
        "frontier",
        tuple(arms.CHOOSING.values()),
    ),
    Section(
        "shuffled",
        "Is it order, topic or mere shrinkage?",
        "The same terms on pairs that are not adjacent: at most 15 tokens apart (what is left is nearness), 64 or more "
        "apart in one document (what is left is topic; beside it adjacent pairs of the same batches, which hold four "
        "segments of each document), and of any documents (what is left is shrinkage).",
        _to(
            PLAIN,
            *(
                arm
                for kind, term in (("relative", RELATIVE), ("contrastive", CONTRASTIVE))
                for arm in (
                    term,
                    arms.SHUFFLED[kind, "segment"],
                    arms.FAR[kind, "text"],
                    arms.FAR[kind, "document"],
                    arms.SHUFFLED[kind, "batch"],
                )
            ),
        ),
        PERSISTENCE,
        "no temporal term",
    ),
    Section(
        "smoothing",
        "Could one simply smooth the codes?",
        "A plain SAE's codes, smoothed along each sequence after training and decoded: an exponential moving average, "
        "a running mean, and hysteresis (a latent that is on stays on more easily than another comes on). Averages "
        "keep latents on that have faded, so their L0 grows; ema-topk keeps each token's k largest.",
        _to(PLAIN, CONTRASTIVE, *arms.SMOOTHED),
        ("explained_variance", "delta_ce", "l0", "slowness_to_x", "rho_8_within", "boundary_auc"),
        "no temporal term",
        "smoothing",
        tuple(FRONTIER["contrastive"]),
    ),
    Section(
        "boundary",
        "Flat inside, sharp at joins?",
        "Where one document follows another the code should change, inside a document less. Join AUC: how well the "
        "size of the change tells a join from the inside; against restarts: from the next sequence of the same "
        "document, where the context begins anew as well; join ratio: the mean change at joins over that inside.",
        _to(PLAIN, EQUATION_3, RELATIVE, CONTRASTIVE),
        ("boundary_auc", "join_auc", "boundary_ratio", "slowness_to_x"),
        "no temporal term",
    ),
    Section(
        "probes",
        "What does the slow group know?",
        "The first fifth of a matryoshka, with the contrastive term on it and without: accuracy of linear probes for "
        "the document, the token and the position.",
        tuple(
            Line(arm, None, group)
            for group in ("first_group", "frequency_matched", "all")
            for arm in (MATRYOSHKA, MATRYOSHKA_PLAIN)
        ),
        ("probe_document", "probe_token", "probe_position"),
    ),
    Section(
        "frequency",
        "Slow, or only frequent?",
        "The same group against latents outside of it that fire as often.",
        tuple(
            Line(arm, None, group)
            for arm in (MATRYOSHKA, MATRYOSHKA_PLAIN)
            for group in ("first_group", "frequency_matched")
        ),
        ("rho_1_within", "rho_8_within", "slowness_to_x", "document_share", "token_share", "position_share"),
    ),
    Section(
        "position",
        "Consistent over time, or only over position?",
        "The share of the code's variance that lies between positions, and what a penalty on it does.",
        (Line(PLAIN), Line(CONTRASTIVE, PLAIN), Line(arms.PENALISED, PLAIN), Line(arms.BOTH, CONTRASTIVE)),
        ("explained_variance", "position_share", "probe_position", "slowness_to_x", "rho_8_within"),
        "the same without what is named last: no temporal term, or the contrastive term alone",
    ),
    Section(
        "nulls",
        "Is it the text, or the method?",
        "The plain SAE and three terms on the activations of the same text with each document's tokens in random order "
        "(`harvest --control permuted`), and on those of a model of the same shape that was never trained "
        "(`harvest --control random-weights`), also less a mean for each token id and one for each position.",
        (
            *(
                line
                for store in (TEXT, arms.PERMUTED, arms.RANDOM, arms.CENTRED)
                for line in _to(PLAIN.on(store), *(arm.on(store) for arm in (CONTRASTIVE, arms.LOCAL, arms.TOPIC)))
            ),
        ),
        PERSISTENCE,
        "the same store without the term",
    ),
    Section(
        "windows",
        "Does the window matter?",
        "Eq. 3 at weight 0.1 with windows of 2, 3 (the line that names none) and 8 positions, over adjacent and over "
        "all pairs; lags beyond those trained on are in the picture.",
        _to(PLAIN, arms.WINDOWS[0], EQUATION_3, *arms.WINDOWS[1:]),
        ("explained_variance", "slowness_to_x", "rho_1_within", "rho_8_within", "jaccard_corrected"),
        "no temporal term",
        "lags",
        (RELATIVE, CONTRASTIVE),
    ),
    Section(
        "sparsity",
        "Reconstruction with sparsity kept",
        "The temporal preset from 8 to 249 active latents; the paper's run 3 has a legacy explained variance of -1.76 "
        "at an L0 of 249.06. From as many active latents as the activations are wide, a code can be exact.",
        tuple(Line(arm) for arm in (arms.RUNGS[0], CONTRASTIVE, *arms.RUNGS[1:])),
        (
            "explained_variance",
            "explained_variance_legacy",
            "cossim",
            "l2_ratio",
            "l0",
            "delta_ce",
            "slowness_to_x",
        ),
        picture="sparsity",
    ),
    Section(
        "lengths",
        "Sequences of any length",
        "Batches of whole sequences: those of 128 positions only, or all, padded nowhere, with as many tokens a batch.",
        _to(arms.FIXED, arms.NATURAL),
        ("explained_variance", "delta_ce", "slowness_to_x"),
        "the first line",
    ),
    Section(
        "without",
        "What of the recipe matters?",
        "One thing left out at a time.",
        _to(PLAIN, *arms.WITHOUT),
        CORE,
        "the whole recipe",
    ),
    Section(
        "default",
        "The contrastive preset",
        "Candidates at 1024 latents with 16 active, and at the default's size. The rule: the contrastive term may cost "
        f"{BUDGET:g} nats of cross-entropy over its twin without it. What `train` defaults to is decided on a real "
        "language model: `tcsae real-lm`.",
        (
            *_to(PLAIN, CONTRASTIVE),
            Line(arms.BATCHTOPK, PLAIN),
            Line(arms.BATCHTOPK_CONTRASTIVE, arms.BATCHTOPK),
            *_to(arms.LARGE_PLAIN, arms.LARGE),
        ),
        (*CORE, "slowness_to_x", "rho_8_within", "boundary_auc"),
        "its twin: the line without the term, for BatchTopK the first line",
    ),
)
KEYS = (TABLE, *(section.key for section in SECTIONS))


def arms_of(key: str) -> list[Arm]:
    """What a question needs trained."""
    return TABLE_ARMS if key == TABLE else next(one for one in SECTIONS if one.key == key).arms
