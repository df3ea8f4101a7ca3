"""SAEs side by side: a table of few figures, and what they say in two sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("", "EV", "delta CE", "L0", "alive %", "Jaccard", "median persistence", "document probe")
LEGEND = (
    "delta CE: nats a token that the reconstruction costs. Jaccard: overlap of the active latents of adjacent tokens, "
    "corrected for chance.\nmedian persistence: correlation of adjacent tokens of a document, of the median latent. "
    "document probe: share of held-out tokens whose document is named."
)
JACCARD, MEDIAN, POOLED, PROBE = "jaccard_corrected", "rho_1_within_median", "rho_1_within", "probe_document"
MAIN = (
    "explained_variance",
    "ce_loss_increase",
    "ce_loss_score_mean",
    "kl_div_with_sae",
    "l0",
    "dead_fraction",
    JACCARD,
    POOLED,
    MEDIAN,
    "rho_8_within",
    "rho_8_within_without_widest",
    "slowness_to_x",
    "slowness_to_x_without_widest",
    "dwell",
    "join_auc",
    "position_share",
    "token_share",
    "document_share",
    PROBE,
    "probe_token",
    "probe_position",
)
"""Figures of a comparison that are printed without --details: one of each kind."""
NAMES = {
    "ce_loss_increase": "delta CE, nats a token",
    "ce_loss_score_mean": "recovered of the gap to mean ablation",
    "dead_fraction": "share of latents never on in eval",
    JACCARD: "chance-corrected Jaccard",
    POOLED: "within-document autocorrelation, variance-weighted",
    MEDIAN: "the same of the median latent",
    "rho_8_within": "the same at lag 8, variance-weighted",
    "rho_8_within_without_widest": "the same without the widest 1%",
    "slowness_to_x": "relative change (lower is slower; 1 = as fast as x)",
    "slowness_to_x_without_widest": "the same without the widest 1%",
    "join_auc": "joins of documents against restarts, AUC",
}
"""Of figures as a comparison prints them, where the key of eval.json is no name."""


def rows(evaluations: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """One row an SAE in the order of `COLUMNS`; before them the activations themselves."""
    first = evaluations[0]
    x = (first.get("temporal") or {}).get("x", {}).get("measures", {})
    known = first["metrics"]["ce_loss_without_sae"] is not None
    x_row: list[object] = ["x itself", 1.0, 0.0 if known else None, None, None, None, None, _value(x, PROBE)]
    return [x_row, *map(_row, evaluations)]


def _row(evaluation: Mapping[str, Any]) -> list[object]:
    figures, measures = evaluation["metrics"], _measures(evaluation)
    alive = None if figures["dead_fraction"] is None else 100 * (1 - figures["dead_fraction"])
    temporal = (_value(measures, name) for name in (JACCARD, MEDIAN, PROBE))
    return [evaluation["name"], figures["explained_variance"], delta_ce(figures), figures["l0"], alive, *temporal]


def shown(row: Sequence[object]) -> list[object]:
    """A row as it is printed: four decimals of explained variance, three of the rest, one of counts and percentages."""
    digits = (0, 4, 3, 1, 1, 3, 3, 3)
    return [f"{value:.{n}f}" if isinstance(value, float) else value for value, n in zip(row, digits, strict=True)]


def delta_ce(figures: Mapping[str, float | None]) -> float | None:
    """Nats a prediction that the reconstruction costs; None without a tail."""
    clean, spliced = figures["ce_loss_without_sae"], figures["ce_loss_with_sae"]
    return None if clean is None or spliced is None else spliced - clean


def sentences(
    one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What `one` costs and gains against `other`, by their evaluations and paired differences, a sentence each. A word
    such as "more" stands only where the 95% interval of the difference leaves out zero.
    """
    said = [_cost(one, other, differences)]
    if _measures(one) and _measures(other):
        said.append(_gain(one, other, differences))
    return said


def _cost(one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]) -> str:
    ours, theirs = one["metrics"], other["metrics"]
    word = _word(differences.get("explained_variance"), "better than", "worse than", "as well as")
    ev = f"{_figure(ours['explained_variance'], 4)} against {_figure(theirs['explained_variance'], 4)}"
    said = f"{one['name']} reconstructs {word} {other['name']}: explained variance {ev}"
    if (cost := delta_ce(ours)) is not None and (their_cost := delta_ce(theirs)) is not None:
        said += f", cross-entropy raised by {cost:.3f} against {their_cost:.3f} nats a token"
    return f"{said}, L0 {ours['l0']:.3g} against {theirs['l0']:.3g}."


def _gain(one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]) -> str:
    ours, theirs, x = _measures(one), _measures(other), one["temporal"]["x"]["measures"]

    def pair(name: str) -> str:
        return f"{_figure(_value(ours, name))} against {_figure(_value(theirs, name))}"

    code, latent = (_word(differences.get(name), "more", "less", "no more") for name in (POOLED, MEDIAN))
    said = (
        f"Between adjacent tokens of a document its code is {code} persistent (variance-weighted correlation "
        f"{pair(POOLED)}, the activations {_figure(_value(x, POOLED))}), its median latent {latent} ({pair(MEDIAN)})"
    )
    if None not in (shares := (_widest(one), _widest(other))):
        said += "; the widest 1% of latents hold {:.0%} of the code's variance, against {:.0%}".format(*shares)
    return f"{said}."


def _word(difference: Mapping[str, Any] | None, above: str, below: str, neither: str) -> str:
    interval = difference["interval"] if difference else None
    if not interval or interval[0] <= 0 <= interval[1]:
        return neither
    return above if interval[0] > 0 else below


def _measures(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    temporal = evaluation.get("temporal")
    return temporal["groups"]["all"]["measures"] if temporal else {}


def _value(measures: Mapping[str, Any], name: str) -> float | None:
    return measures[name]["value"] if name in measures else None


def _widest(evaluation: Mapping[str, Any]) -> float | None:
    return evaluation.get("measures", {}).get("concentration", {}).get("figures", {}).get("widest_share")


def _figure(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"
