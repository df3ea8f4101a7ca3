"""Decoders of runs, each alone and any two together."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.evaluate.candidates import evaluable
from tcsae.evaluate.dictionary.similarity import AGREEMENT, REDUNDANCY, null_cosine, pair, redundancy
from tcsae.shared.base.console import echo, table
from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.crosscoder import decoder_rows
from tcsae.shared.sae.folder import load_sae
from tcsae.shared.sae.saelens import is_foreign, load_foreign


def compared(runs_path: str, names: Collection[str]) -> dict[str, Any]:
    """{"runs": {name: figures}, "pairs": [{"run", "with", figures, "matched"}], "definitions"}.

    `matched` lists [latent of run, latent of with, cosine], the most alike first. Runs of another d_model than the
    first are left out of pairs with it. Raises RunError if there is no run.
    """
    rows: dict[str, np.ndarray] = {}
    for path in evaluable(Path(runs_path), names):
        rows[path.name] = decoder_rows(load_foreign(path) if is_foreign(path) else load_sae(path))
    pairs: list[dict[str, Any]] = []
    for first, second in itertools.combinations(rows, 2):
        if rows[first].shape[1] != rows[second].shape[1]:
            continue
        pairing = pair(rows[first], rows[second])
        matched = zip(pairing.first.tolist(), pairing.second.tolist(), pairing.cosine.round(4).tolist(), strict=True)
        about = {"run": first, "with": second, **pairing.figures()}
        about["null_cosine"] = null_cosine(rows[first], len(rows[second]))
        pairs.append(about | {"matched": [list(one) for one in matched]})
    if names and len(rows) > 1 and not pairs:
        widths = ", ".join(f"{name} {one.shape[1]}" for name, one in rows.items())
        raise RunError(f"No two of these runs have the same d_model ({widths}). Name runs of one hook.")
    return {
        "runs": {name: redundancy(one) for name, one in rows.items()},
        "pairs": pairs,
        "definitions": REDUNDANCY | AGREEMENT,
    }


def show(result: dict[str, Any]) -> None:
    columns = [name.replace("_", " ") for name in REDUNDANCY]
    table("Redundancy", ("", *columns), [[name, *one.values()] for name, one in result["runs"].items()])
    if result["pairs"]:
        rows = [[one["run"], one["with"], *(one[name] for name in AGREEMENT)] for one in result["pairs"]]
        table("Latents shared", ("run", "with", *(name.replace("_", " ") for name in AGREEMENT)), rows)
    for one in result["pairs"]:
        if one.get("shown"):
            table(f"{one['run']} and {one['with']}", ("latent", "latent", "cosine"), one["shown"])
    for name, text in result["definitions"].items():
        echo(f"{name.replace('_', ' ')}: {text}.")
