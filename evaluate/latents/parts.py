"""The parts of `tcsae latents`: rows of figures (the SAE's and its nulls') and columns for single latents."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse import csr_array

from tcsae.evaluate.dictionary.cofiring import COFIRING, cofiring, shifted
from tcsae.evaluate.dictionary.similarity import REDUNDANCY, redundancy
from tcsae.evaluate.latents import ablation, code_length, predictability, steering, token_absorption
from tcsae.evaluate.latents.intruder import intruder
from tcsae.evaluate.latents.material import Coded
from tcsae.evaluate.latents.settings_of_latents import BITS, EFFECTS, REPEATS, SAE, TEXT, TOKENS, Budget
from tcsae.evaluate.latents.shared_inputs import Chosen, SharedInputs

WIDEST, RANDOM = "the widest 1% at once", "random directions"
N_RANDOM = 4
"""Random directions that are steered along."""
N_NULL = 16
"""Latents whose firings are shifted for the null of predictability."""

EFFECT_FIGURES = {
    "ev_lost": ablation.DEFINITIONS["ev_lost"] + "; median over live latents",
    "harmful": "share of live latents without which explained variance would be higher",
    "ce_lost": ablation.DEFINITIONS["ce_lost"] + "; from some of the sequences in which it is on, "
    "scaled up to all (sequences_seen); median over the latents drawn",
    "ce_lost_per_firing": ablation.DEFINITIONS["ce_lost_per_firing"] + "; median",
    "kl_after": f"KL divergence at a token and the {ablation.LAGS} after it, summed, in nats, with a latent that is on "
    "taken from x at that token alone; median over the latents drawn",
    "kl_after_span": "the same with it taken away wherever it is on at those tokens",
    "later_share": "share of kl_after that lies after the token itself; median",
    **{name: text for name, text in steering.DEFINITIONS.items() if name.startswith("steer")},
}
DEFINITIONS: dict[str, Mapping[str, str]] = {
    EFFECTS: EFFECT_FIGURES,
    BITS: code_length.DEFINITIONS,
    REPEATS: REDUNDANCY | COFIRING,
    TOKENS: token_absorption.DEFINITIONS,
    TEXT: predictability.DEFINITIONS,
}
"""{part: {figure: what it is}}."""
MEANS = ("intruder", "readable")
OF_DRAWN = (*EFFECT_FIGURES, *predictability.DEFINITIONS)
"""Figures over the latents drawn; ev_lost is over all live ones, and has no column here."""
MIN_LATENTS, N_DRAWS = 8, 1000

Rows = dict[str, dict[str, float | None]]


def effects(shared: SharedInputs, coded: Coded, chosen: Chosen) -> dict[str, Any]:
    """Ablation and steering; without a tail what reconstruction loses alone."""
    lost = ablation.ev_lost(coded)
    live = coded.live
    figures: dict[str, float | None] = dict.fromkeys(EFFECT_FIGURES)
    figures["ev_lost"], figures["harmful"] = median(lost[live]), mean(lost[live] < 0)
    latents = chosen.all
    share = coded.widths / max(coded.widths.sum(), 1e-30)
    columns: dict[str, Any] = {
        "latent": latents.tolist(),
        "is_sample": [True] * len(chosen.sample) + [False] * len(chosen.wide),
        "density": (coded.n_firings[latents] / coded.code.shape[0]).tolist(),
        "width_share": share[latents].tolist(),
        "ev_lost": lost[latents].tolist(),
    }
    if shared.tail is None or not len(latents):
        return {"rows": {SAE: figures}, "columns": columns, "note": shared.no_tail or "No latent is live."}
    before = shared.tail.n_tokens
    rows, more, curves = _through_the_tail(shared, coded, chosen)
    return {
        "rows": {SAE: figures | rows.pop(SAE), **rows},
        "intervals": intervals(more, chosen),
        "columns": columns | more,
        "kl_by_lag": curves,
        "note": None,
        "tail_tokens": shared.tail.n_tokens - before,
    }


def _through_the_tail(
    shared: SharedInputs, coded: Coded, chosen: Chosen
) -> tuple[Rows, dict[str, Any], dict[str, list[float | None]]]:
    """Rows and columns of ablation and of steering, and curves of ablation."""
    n_latents, length = len(chosen.all), coded.sequences.whole.shape[1]
    budget = shared.request.budget.within(n_latents + N_RANDOM, length)
    rows, columns, curves = _ablation(shared, coded, chosen, budget)
    of_steering, more = _steering(shared, coded, chosen, budget)
    for name, figures in of_steering.items():
        rows[name] |= figures
    return rows, columns | more, curves


def _ablation(
    shared: SharedInputs, coded: Coded, chosen: Chosen, budget: Budget
) -> tuple[Rows, dict[str, Any], dict[str, list[float | None]]]:
    """Rows, columns, and the KL at each lag after an ablation."""
    assert shared.tail is not None
    items = [*([one] for one in chosen.all.tolist()), chosen.widest.tolist()]
    everywhere = ablation.ablated(coded, shared.tail, items, budget.sequences)
    kl = ablation.kl_after(coded, shared.tail, items, budget.events, shared.request.seed)
    later, after = ablation.later_share(kl), np.nansum(kl, -1)
    after[np.isnan(kl).all(-1)] = np.nan
    one, span, random = (ablation.KINDS.index(kind) for kind in (ablation.ONE, ablation.SPAN, ablation.RANDOM))

    def figures(which: slice) -> dict[str, float | None]:
        return {
            "ce_lost": median(everywhere.ce[which]),
            "ce_lost_per_firing": median(everywhere.ce_per_firing[which]),
            "kl_after": median(after[which, one]),
            "kl_after_span": median(after[which, span]),
            "later_share": median(later[which, one]),
        }

    sample, widest = slice(0, len(chosen.sample)), slice(len(items) - 1, None)
    null = {"kl_after": median(after[sample, random]), "later_share": median(later[sample, random])}
    columns = {
        "ce_lost": everywhere.ce,
        "ce_lost_per_firing": everywhere.ce_per_firing,
        "kl": everywhere.kl,
        "sequences_seen": everywhere.n_seen,
        "sequences": everywhere.n_sequences,
        "later_share": later[:, one],
        "kl_after": after[:, one],
        "kl_after_span": after[:, span],
        **{f"kl_{kind}": kl[:, i] for i, kind in enumerate(ablation.KINDS)},
    }
    rows: Rows = {SAE: figures(sample), WIDEST: figures(widest), RANDOM: null}
    curves = {
        name: _median_curve(kl[which, i])
        for name, (which, i) in {
            "one latent": (sample, one),
            "one latent, throughout": (sample, span),
            "widest 1%": (widest, one),
            "widest 1%, throughout": (widest, span),
            "random direction": (sample, random),
        }.items()
    }
    return rows, {name: plain(values[:-1]) for name, values in columns.items()}, curves


def _median_curve(kl: Float[ndarray, "n_items lags_plus_1"]) -> list[float | None]:
    """Median over items at each lag, to five digits."""
    return [None if (middle := median(one)) is None else float(f"{middle:.5g}") for one in kl.T]


def _steering(shared: SharedInputs, coded: Coded, chosen: Chosen, budget: Budget) -> tuple[Rows, dict[str, Any]]:
    """Nothing where no sequence is long enough."""
    seed, latents = shared.request.seed, chosen.all
    at = steering.places(coded.sequences, budget.places, seed)
    if not at:
        return {}, {}
    assert shared.tail is not None
    random = np.random.default_rng(seed).standard_normal((N_RANDOM, coded.rows.shape[1]), np.float32)
    directions = np.concatenate([coded.rows[latents], random])
    steered = steering.steered(coded.sequences, shared.tail, directions, at)
    figures = {
        "steer_strength": steered.strength,
        "steer_later_share": ablation.later_share(steered.kl),
        "steer_side_effect": steered.side_effect,
        "steer_kl": steered.kl[:, 0],
    }
    rows: Rows = {
        SAE: {name: median(values[: len(chosen.sample)]) for name, values in figures.items()},
        RANDOM: {name: median(values[len(latents) :]) for name, values in figures.items()},
    }
    columns: dict[str, Any] = {name: plain(values[: len(latents)]) for name, values in figures.items()}
    for i, name in enumerate(("promoted", "promoted_after")):
        columns[name] = [shared.token_text(one) for one in steered.promoted[: len(latents), i]]
    return rows, columns


def bits(shared: SharedInputs, coded: Coded, chosen: Chosen) -> dict[str, Any]:  # noqa: ARG001
    """Description length."""
    return {"rows": {SAE: code_length.code_length(coded)}, "columns": {}, "note": None}


def repeats(shared: SharedInputs, coded: Coded, chosen: Chosen) -> dict[str, Any]:  # noqa: ARG001
    """Redundancy of decoder and code."""
    null = cofiring(shifted(coded.code, shared.request.seed))
    rows = {SAE: redundancy(coded.rows) | cofiring(coded.code), "shifted in time": null}
    return {"rows": rows, "columns": {}, "note": None}


def of_tokens(shared: SharedInputs, coded: Coded, chosen: Chosen) -> dict[str, Any]:  # noqa: ARG001
    """Splitting and absorption."""
    if shared.texts is None:
        return {"rows": {}, "columns": {}, "note": "The store keeps no tokenizer: what its ids spell is not known."}
    labels, ids = token_absorption.id_labels(shared.texts), shared.sequences.tokens.ids
    rows, held = {}, {}
    for name, of_id in ((SAE, labels), ("ids permuted", token_absorption.permuted_ids(labels, shared.request.seed))):
        frequent = token_absorption.token_labels(ids, of_id, shared.train)
        measured = token_absorption.splitting(coded, frequent, shared.train)
        rows[name] = measured["figures"]
        held[name] = measured["labels"]
    note = None if held[SAE] else "No label of token ids has enough tokens in each half of the documents."
    return {"rows": rows, "columns": {}, "labels": held[SAE], "note": note}


def of_text(shared: SharedInputs, coded: Coded, chosen: Chosen) -> dict[str, Any]:
    """Predictability and intruders, of the latents, of the same shifted in time, and of dimensions of x."""
    documents = shared.sequences.tokens.documents
    firings = {
        SAE: csr_array(coded.code[:, chosen.all]),
        "shifted in time": shifted(csr_array(coded.code[:, chosen.sample[:N_NULL]]), shared.request.seed),
        "dimensions of x": shared.x_firings,
    }
    rows: Rows = {}
    columns: dict[str, Any] = {"latent": chosen.all.tolist()}
    for name, on in firings.items():
        if name in shared.rows_of_x:
            rows[name] = shared.rows_of_x[name]
            continue
        aucs, shares = predictability.predicted(shared.contexts, on), intruder(shared.vectors, on, documents)
        n = len(chosen.sample) if name == SAE else on.shape[1]
        few = predictability.Predicted(*(one[:n] for one in aucs))
        rows[name] = predictability.summary(few) | {"intruder": mean(shares[:n])}
        if name == SAE:
            columns |= {f"auc_{key}": plain(values) for key, values in aucs._asdict().items()}
            columns["intruder"] = plain(shares)
    shared.rows_of_x["dimensions of x"] = rows["dimensions of x"]
    return {"rows": rows, "intervals": intervals(columns, chosen), "columns": columns, "note": None}


WORK: dict[str, Callable[[SharedInputs, Coded, Chosen], dict[str, Any]]] = {
    EFFECTS: effects,
    BITS: bits,
    REPEATS: repeats,
    TOKENS: of_tokens,
    TEXT: of_text,
}


def intervals(columns: Mapping[str, Any], chosen: Chosen) -> dict[str, list[float]]:
    """95% intervals over resampled latents of the figures that are medians or shares of the latents drawn.

    None of them where latents are given, or fewer than MIN_LATENTS are known.
    """
    drawn = {name: np.array(columns[name][: len(chosen.sample)], np.float64) for name in OF_DRAWN if name in columns}
    if "auc_text" in drawn:
        text = drawn["auc_text"]
        drawn["readable"] = np.where(np.isnan(text), np.nan, text > predictability.NAMED)
    bounds = {}
    for name, values in drawn.items():
        known = values[np.isfinite(values)]
        if chosen.are_drawn and len(known) >= MIN_LATENTS:
            draws = known[np.random.default_rng(0).integers(0, len(known), (N_DRAWS, len(known)))]
            figures = draws.mean(1) if name in MEANS else np.median(draws, 1)
            bounds[name] = [float(f"{one:.5g}") for one in np.quantile(figures, [0.025, 0.975])]
    return bounds


def median(values: Float[ndarray, " n"]) -> float | None:
    """Of those that are known; None without any."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def mean(values: ndarray) -> float | None:
    """The same of the mean."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def plain(values: ndarray) -> list[Any]:
    """As JSON has it: None for what is not finite, five digits."""
    if values.dtype.kind == "i":
        return values.tolist()
    if values.ndim > 1:
        return [plain(one) for one in values]
    return [None if not np.isfinite(one) else float(f"{one:.5g}") for one in values.tolist()]
