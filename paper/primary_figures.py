"""One primary figure a question: the smallest difference that matters, and tests corrected for their number."""

from collections.abc import Mapping

from tcsae.evaluate.intervals import holm
from tcsae.paper.arms import TEXT
from tcsae.paper.results import BUDGET, GROUPS, Results
from tcsae.paper.sections import FIGURES, Section, number

PRIMARY = {
    "frontier": "slowness_to_x",
    "shuffled": "rho_8_within",
    "smoothing": "explained_variance",
    "boundary": "join_auc",
    "position": "position_share",
    "nulls": "jaccard_corrected",
    "windows": "rho_8_within",
    "lengths": "explained_variance",
    "without": "explained_variance",
    "default": "delta_ce",
}
"""Of each question that compares arms with twins."""
SMALLEST: Mapping[str, float] = {
    "slowness_to_x": 0.05,
    "rho_8_within": 0.02,
    "explained_variance": 0.002,
    "join_auc": 0.02,
    "position_share": 0.01,
    "jaccard_corrected": 0.01,
    "delta_ce": BUDGET,
}
"""Differences that matter; smaller ones are no reason to choose an arm, however sure they are."""
ALPHA = 0.05


def primary_line(section: Section, results: Results) -> str:
    """What holds of the question's primary figure; "" for a question that compares nothing."""
    if section.key not in PRIMARY:
        return ""
    name = PRIMARY[section.key]
    figure, smallest = FIGURES[name], SMALLEST[name]
    pairs = [(line.arm, line.twin) for line in section.lines if line.twin is not None and line.group == GROUPS[0]]
    tested = [(pair, p) for pair in pairs if (p := results.p_value(*pair, name)) is not None]
    held = []
    for ((arm, twin), _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        gain = results.gain(arm, twin, name).mean
        if p <= ALPHA and abs(gain) >= smallest:
            store = f", {arm.store}" if arm.store != TEXT else ""
            held.append(f"{arm.label}{store} ({gain:+.{figure.digits}f}, p = {number(p, 3)})")
    left_out = f" ({len(pairs) - len(tested)} more have no resampling)" if len(tested) < len(pairs) else ""
    return (
        f"Primary figure: {figure.heading}. A difference below {smallest:g} does not matter. Of {len(tested)} "
        f"comparisons{left_out}, over seeds and documents and with Holm's correction at {ALPHA:g}, these matter: "
        f"{'; '.join(held) or 'none'}."
    )
