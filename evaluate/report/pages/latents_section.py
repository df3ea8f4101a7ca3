"""What a report shows of `tcsae latents`: a table a part for all SAEs, and for each SAE the latents looked at."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tcsae.evaluate.latents.latents_file import load_latents
from tcsae.evaluate.latents.settings_of_latents import EFFECTS, MEANINGS, SAE, TEXT, TITLES
from tcsae.evaluate.report.pages.page_files import Included, number
from tcsae.evaluate.report.pages.plots import Series, lines

OF_LATENT = (
    "density",
    "ev_lost",
    "ce_lost",
    "ce_lost_per_firing",
    "later_share",
    "steer_strength",
    "steer_side_effect",
)
OF_TEXT = ("auc_token", "auc_text", "intruder")
N_WORDS = 4


def measured_parts(one: Included) -> dict[str, Any]:
    """The parts of a run's latents.json; none if it is not there or of something else."""
    held = load_latents(one.loaded.run.path, one.evaluation["store"]["content"])
    return held["parts"] if held else {}


def latents_tables(included: Sequence[Included]) -> list[dict[str, Any]]:
    """A table for each part that any SAE has: its figures, and the rows of SAEs and of what they are compared with."""
    of_run = {one.number: measured_parts(one) for one in included}
    tables = []
    for part, title in TITLES.items():
        having = [one for one in included if of_run[one.number].get(part, {}).get("rows")]
        if not having:
            continue
        definitions = of_run[having[0].number][part]["definitions"]
        rows = [
            {
                "run": one,
                "label": "" if name == SAE else name,
                "values": {key: figures.get(key) for key in definitions},
                "intervals": of_run[one.number][part].get("intervals", {}) if name == SAE else {},
            }
            for one in having
            for name, figures in of_run[one.number][part]["rows"].items()
        ]
        labels = {name: name.replace("_", " ") for name in definitions}
        tables.append({"title": title, "meaning": MEANINGS[part], "columns": labels, "rows": rows})
    return tables


def latents_looked_at(one: Included) -> dict[str, Any]:
    """The single latents of a run, those whose firing the language model would miss most first; empty without any."""
    parts = measured_parts(one)
    effects, text = (parts.get(part, {}).get("columns", {}) for part in (EFFECTS, TEXT))
    latents = effects.get("latent", [])
    if not latents:
        return {}
    of_text = {latent: i for i, latent in enumerate(text.get("latent", []))}
    names = [name for name in OF_LATENT if name in effects]
    text_names = [name for name in OF_TEXT if name in text]
    rows = []
    for i, latent in enumerate(latents):
        at = of_text.get(latent)
        values = [effects[name][i] for name in names]
        values += [None if at is None else text[name][at] for name in text_names]
        words = effects["promoted"][i][:N_WORDS] if "promoted" in effects else []
        rows.append({"latent": latent, "is_sample": effects["is_sample"][i], "values": values, "promoted": words})
    key = "ce_lost_per_firing" if "ce_lost_per_firing" in names else "ev_lost"
    rows.sort(key=lambda row: -(row["values"][names.index(key)] or 0))
    labels = {name: name.replace("_", " ") for name in (*names, *text_names)}
    return {"columns": labels, "rows": rows, "promoted": "promoted" in effects, "figures": _kl_by_lag(parts[EFFECTS])}


def _kl_by_lag(effects: dict[str, Any]) -> list[dict[str, str]]:
    """Curves over the tokens after an ablation; none without a tail."""
    curves, summaries = [], []
    for label, values in effects.get("kl_by_lag", {}).items():
        known = [value or np.nan for value in values]  # of 0 there is no logarithm
        if np.isfinite(known).any():
            curves.append(Series(label, range(len(known)), np.log10(known).tolist()))
            summaries.append(f"{label}: {number(values[0])} at the token, {number(values[1])} at the next")
    if not curves:
        return []
    svg = lines(curves, ("tokens after the ablation", "log10 of KL, in nats"))
    return [{"title": "KL after an ablation at one token, or throughout", "svg": svg, "summary": "; ".join(summaries)}]
