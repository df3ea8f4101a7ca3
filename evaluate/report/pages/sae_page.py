"""What the report says of one SAE: how its latents are distributed, what persists, the temporal group and the rest."""

from typing import Any

import numpy as np
import torch

from tcsae.evaluate.measures.core import DEFINITIONS
from tcsae.evaluate.measures.cross_entropy import DEFINITIONS as TAIL_DEFINITIONS
from tcsae.evaluate.measures.temporal_run import matched
from tcsae.evaluate.report.features.feature_data import FeatureData
from tcsae.evaluate.report.features.feature_pass import Features
from tcsae.evaluate.report.features.shown_feature import LABELS
from tcsae.evaluate.report.pages.overview import cell
from tcsae.evaluate.report.pages.page_files import Included, number
from tcsae.evaluate.report.pages.plots import Series, histogram, lines
from tcsae.evaluate.temporal_tables import BY_LATENT, by_latent
from tcsae.shared.base.settings import to_settings

DENSE = 0.1
"""Density from which on a latent counts as dense."""
N_NOTABLE = 5
HISTOGRAMS = {
    "density": ("density", True),
    "dwell": ("dwell, over that of firing without memory", False),
    "rho_8_within": ("autocorrelation at lag 8, within documents", False),
    "position_share": ("position share", False),
    "document_share": ("document share", False),
    "decoder_cosine": ("largest decoder cosine with another latent", False),
}
NOTABLE = (
    ("Most persistent", "rho_8_within"),
    ("Longest dwell", "dwell"),
    ("Most position-driven", "position_share"),
    ("Most document-wide", "document_share"),
    ("Most token-driven", "token_share"),
    ("Densest", "density"),
)
GROUP_MEASURES = ("density", "dwell", "rho_1_within", "rho_8_within", "position_share", "document_share", "token_share")


def sae_page(one: Included, features: Features, data: FeatureData) -> dict[str, Any]:
    """The values of sae.html."""
    evaluation, config = one.evaluation, one.loaded.sae.config
    density = data.measures["density"]
    dense = np.flatnonzero(density >= DENSE)
    groups = _groups(one, features)
    settings = to_settings(config)
    return {
        "differences": evaluation.get("differences", []),
        "n_latents": config.d_sae,
        "n_alive": len(data.latents),
        "dense": [int(latent) for latent in dense[np.argsort(-density[dense], kind="stable")]],
        "dense_from": DENSE,
        "settings": settings,
        "figures": {
            name: cell(value, evaluation["intervals"], name) | {"about": about.get(name, "")}
            for about in (DEFINITIONS | TAIL_DEFINITIONS,)
            for name, value in evaluation["metrics"].items()
        },
        "histograms": _histograms(data, groups),
        "rho": _rho(one),
        "temporal": (evaluation.get("temporal") or {"groups": {}})["groups"],
        "latent_columns": BY_LATENT,
        "by_latent": by_latent(evaluation["temporal"]) if evaluation.get("temporal") else {},
        "nulls": (evaluation.get("temporal") or {"nulls": {}})["nulls"],
        "groups": _group_table(groups, data),
        "notable": _notable(data),
        "labels": LABELS,
    }


def _groups(one: Included, features: Features) -> list[tuple[str, np.ndarray]]:
    """(name, its latents that are alive): the temporal group, the rest, and of these as many of the same rates."""
    config = one.loaded.sae.config
    alive = features.alive.numpy()
    if len(config.groups) == 1:
        return [("all latents", np.flatnonzero(alive))]
    first = torch.arange(config.d_sae) < config.group_ranges()[0][1]
    like = matched(features.sums.active[0], first).numpy()
    first_group = first.numpy()
    return [
        ("first group", np.flatnonzero(alive & first_group)),
        ("the rest", np.flatnonzero(alive & ~first_group)),
        ("of the rest, as frequent", np.flatnonzero(alive & like)),
    ]


def _histograms(data: FeatureData, groups: list[tuple[str, np.ndarray]]) -> list[dict[str, str]]:
    made = []
    for name, (label, log) in HISTOGRAMS.items():
        values = [(group, data.measures[name][which]) for group, which in groups[:2]]
        svg = histogram(values, label, log)
        if svg:
            summary = "; ".join(_quartiles(group, one) for group, one in values if np.isfinite(one).any())
            made.append({"title": label, "svg": svg, "summary": summary})
    return made


def _quartiles(group: str, values: np.ndarray) -> str:
    low, middle, high = np.quantile(values[np.isfinite(values)], [0.25, 0.5, 0.75])
    return f"{group}: median {middle:.3g}, half of them between {low:.3g} and {high:.3g}"


def _rho(one: Included) -> list[dict[str, str]]:
    """Curves over lags against their nulls: of the code, of each group, and of x itself."""
    temporal = one.evaluation.get("temporal")
    if not temporal:
        return []
    made = []
    kinds = (("rho_1", "around the mean of the split"), ("rho_1_within", "around each document's mean"))
    for name, around in kinds:
        named = {"all": "all latents", "first_group": "first group", "frequency_matched": "the rest, as frequent"}
        sources = {named[group]: source for group, source in temporal["groups"].items() if group in named}
        sources |= {"x itself": temporal["x"]}
        curves, nulls, summaries = [], [], []
        for label, source in sources.items():
            curve = [np.nan if value is None else value for value in source["curves"][name]]
            null = source["measures"][name]["null"]
            curves.append(Series(label, range(1, len(curve) + 1), curve))
            if null is not None:
                nulls.append((null, f"null of {label}"))
                summaries.append(
                    f"{label}: {number(source['curves'][name][0])} at lag 1, "
                    f"{number(source['curves'][name][7])} at lag 8, null {null:.3g}"
                )
        labels = ("lag, in tokens", "autocorrelation")
        made.append(
            {
                "title": f"Autocorrelation {around}",
                "svg": lines(curves, labels, nulls[:1]),
                "summary": "; ".join(summaries),
            }
        )
    return made


def _group_table(groups: list[tuple[str, np.ndarray]], data: FeatureData) -> list[dict[str, Any]]:
    """Medians of each group; nothing where there is one group only."""
    if len(groups) == 1:
        return []
    rows = []
    for name, which in groups:
        medians = {}
        for measure in GROUP_MEASURES:
            values = data.measures[measure][which]
            values = values[np.isfinite(values)]
            medians[measure] = float(np.median(values)) if len(values) else None
        rows.append({"name": name, "n": len(which), "medians": medians})
    return rows


def _notable(data: FeatureData) -> list[dict[str, Any]]:
    """The latents at the far end of some measures, among those that fire in at least ten sequences."""
    often = np.nan_to_num(data.measures["sequences"]) >= 10
    made = []
    for title, name in NOTABLE:
        values = np.where(often, data.measures[name], np.nan)
        best = [int(latent) for latent in np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:N_NOTABLE]]
        notable = [(latent, float(values[latent])) for latent in best if np.isfinite(values[latent])]
        if notable:
            made.append({"title": title, "measure": name, "latents": notable})
    return made
