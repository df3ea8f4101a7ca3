"""The paper's printed figures, and what they are: those of untrained networks, which have a closed form."""

import math
from typing import Any, NamedTuple

COLUMNS = {
    "explained_variance_legacy": "EV (legacy)",
    "cossim": "cosine",
    "l2_ratio": "L2 ratio",
    "relative_reconstruction_bias": "rel. bias",
    "l0": "L0",
    "l1": "L1",
    "ce_loss_score": "CE score",
}
"""The figures that the paper prints, by our names; its EV is the legacy one."""
PRINTED: dict[str, dict[str, float]] = {
    "run0": {"explained_variance_legacy": -0.785, "l0": 0.0, "l1": 0.0, "ce_loss_score": -0.586},
    "run1": {},
    "run2": {
        "explained_variance_legacy": -1.76,
        "cossim": 0.003,
        "l2_ratio": 0.68,
        "l0": 249.06,
        "l1": 143.48,
        "ce_loss_score": -0.18,
    },
    "run4": {
        "explained_variance_legacy": -2.74,
        "l2_ratio": 0.99,
        "relative_reconstruction_bias": 92.64,
        "l0": 248.90,
        "l1": 195.00,
        "ce_loss_score": -0.21,
    },
}
PRINTED["run3"] = PRINTED["run2"]  # printed as equal
ABOUT = {
    "run0": "baseline without the temporal term",
    "run1": "temporal term, before Xavier and clipping; 0 steps",
    "run2": "Xavier initialisation, clipping",
    "run3": "lambda_2 = 0.01, cosine decay",
    "run4": "layer norm",
}
LOGGED, WRITTEN = "logged-", "written-"


class Row(NamedTuple):
    """One line of the table."""

    label: str
    figures: dict[str, float | None]
    run: str | None = None
    """The SAE that it is of, if it is one of ours."""


class Block(NamedTuple):
    """What the paper calls one run."""

    name: str
    about: str
    rows: list[Row]


def closed_form(d_model: int, d_sae: int, norm: float, spread: float, normed: bool = False) -> dict[str, float]:
    """Expected figures of an untrained Xavier network with relu and zero biases, for Gaussian pre-activations.

    `norm` is mean |x|, `spread` is E[|x|^2 / |x - mu|^2]. With a layer norm before the encoder (`normed`) the code is
    that of |x| = sqrt(d_model). sigma^2 = 2 |x|^2 / (d + F); L0 = F / 2; L1 = F sigma / sqrt(2 pi);
    |xhat| / |x| = sqrt(2 d F) / (d + F); cosine 0; EV = 1 - (1 + ratio^2) spread.
    """
    read = math.sqrt(d_model) if normed else norm
    deviation = read * math.sqrt(2 / (d_model + d_sae))
    ratio = math.sqrt(2 * d_model * d_sae) / (d_model + d_sae) * read / norm
    return {
        "explained_variance_legacy": 1 - (1 + ratio**2) * spread,
        "cossim": 0.0,
        "l2_ratio": ratio,
        "l0": d_sae / 2,
        "l1": d_sae * deviation / math.sqrt(2 * math.pi),
    }


def paper_blocks(evaluations: list[dict[str, Any]]) -> list[Block]:
    """For each of the paper's runs whose presets are among the evaluations: printed, closed form, ours. Else none."""
    blocks = []
    for name, printed in sorted(PRINTED.items()):
        ours = [one for one in evaluations if one["preset"] in (LOGGED + name, WRITTEN + name)]
        if not ours:
            continue
        rows = [Row("printed in the paper", dict(printed))]
        logged = [one for one in ours if one["preset"].startswith(LOGGED)]
        if logged and name != "run0":
            rows.append(Row("closed form for this store", dict(_expected(logged[0]))))
        for one in sorted(ours, key=lambda one: one["preset"]):
            kind = "no step, as logged" if one["preset"].startswith(LOGGED) else f"trained, {one['steps']:,} steps"
            figures = {column: one["metrics"][column] for column in COLUMNS}
            rows.append(Row(f"here: {kind}", figures, one["name"]))
        blocks.append(Block(name.replace("run", "Run "), ABOUT[name], rows))
    return blocks


def _expected(evaluation: dict[str, Any]) -> dict[str, float]:
    sae, metrics = evaluation["sae"], evaluation["metrics"]
    # A zero output has EV 1 - E[|x|^2 / |x - mu|^2].
    spread = 1 - evaluation["baselines"]["zero_output"]["explained_variance_legacy"]
    normed = sae["layer_norm"] != "none"
    return closed_form(sae["d_model"], sae["d_sae"], metrics["l2_norm_in"], spread, normed)
