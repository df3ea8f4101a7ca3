"""SAEs side by side: a table of few figures, and what they say in two sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("", "EV", "delta CE", "L0", "alive %", "persistence", "pooled", "document probe")
LEGEND = (
    "delta CE: nats a prediction that the reconstruction costs. persistence: correlation of adjacent tokens within a "
    "document, median over latents;\npooled: the same weighted by variance. document probe: share of held-out tokens "
    "whose document the code names."
)
MEDIAN, POOLED, PROBE = "rho_1_within_median", "rho_1_within", "probe_document"
VARIANTS = (
    "explained_variance_all_positions",
    "explained_variance_legacy",
    "explained_variance_saebench",
    "mse_saebench",
    "l0_nonzero",
    "l1_signed",
)
"""Other definitions of figures that stand beside them."""


def rows(evaluations: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """One row an SAE in the order of `COLUMNS`; before them the activations themselves."""
    first = evaluations[0]
    x = (first.get("temporal") or {}).get("x", {}).get("measures", {})
    known = first["metrics"]["ce_loss_without_sae"] is not None
    own = ["x itself", 1.0, 0.0 if known else None, None, None, None, _value(x, POOLED), _value(x, PROBE)]
    return [own, *map(_row, evaluations)]


def _row(evaluation: Mapping[str, Any]) -> list[object]:
    figures, measures = evaluation["metrics"], _measures(evaluation)
    temporal = (_value(measures, name) for name in (MEDIAN, POOLED, PROBE))
    return [
        evaluation["name"],
        figures["explained_variance"],
        delta_ce(figures),
        figures["l0"],
        None if figures["dead_fraction"] is None else 100 * (1 - figures["dead_fraction"]),
        *temporal,
    ]


def delta_ce(figures: Mapping[str, float | None]) -> float | None:
    """Nats a prediction that the reconstruction costs; None without a tail."""
    clean, spliced = figures["ce_loss_without_sae"], figures["ce_loss_with_sae"]
    return None if clean is None or spliced is None else spliced - clean


def sentences(
    one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What `one` costs and gains against `other`, by their evaluations and paired differences. A word such as "more"
    stands only where the 95% interval of the difference leaves out zero.
    """
    said = [_cost(one, other, differences)]
    if _measures(one) and _measures(other):
        said.append(_gain(one, other, differences))
    return said


def _cost(one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]) -> str:
    ours, theirs = one["metrics"], other["metrics"]
    word = _word(differences.get("explained_variance"), "better than", "worse than", "as well as")
    said = (
        f"{one['name']} reconstructs {word} {other['name']}: it explains {_percent(ours['explained_variance'])} of the "
        f"variance ({other['name']}: {_percent(theirs['explained_variance'])})"
    )
    if (cost := delta_ce(ours)) is not None and (their_cost := delta_ce(theirs)) is not None:
        said += f" and costs the language model {cost:.3f} nats a token ({their_cost:.3f})"
    return f"{said}, with {ours['l0']:.3g} latents active per token ({theirs['l0']:.3g})."


def _gain(one: Mapping[str, Any], other: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]) -> str:
    ours, theirs, x = _measures(one), _measures(other), one["temporal"]["x"]["measures"]

    def pair(name: str) -> str:
        return f"{_figure(_value(ours, name))} against {_figure(_value(theirs, name))}"

    median = _word(differences.get(MEDIAN), "is more", "is less", "is no more")
    said = (
        f"Between neighbouring tokens of a document its median latent {median} persistent (correlation "
        f"{pair(MEDIAN)}), its code weighted by variance {_word(differences.get(POOLED), 'more', 'less', 'no more')} "
        f"({pair(POOLED)}; the activations {_figure(_value(x, POOLED))})"
    )
    if None not in (shares := (_widest(one), _widest(other))):
        said += f", of which the widest 1% of latents hold {_percent(shares[0])} ({_percent(shares[1])})"
    if _value(ours, PROBE) is not None and _value(theirs, PROBE) is not None:
        named = f"{_percent(_value(ours, PROBE))} against {_percent(_value(theirs, PROBE))}"
        said += f"; a probe on the code names the document of {named} of held-out tokens"
        if (of_x := _value(x, PROBE)) is not None:
            said += f" ({_percent(of_x)} from the activations)"
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


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None else f"{100 * value:.1f}%"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
