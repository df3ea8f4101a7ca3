"""Probing of runs: from a store and folders to figures, a file and tables."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tcsae.evaluate.candidates import Loaded, sparse_runs
from tcsae.evaluate.probing.given_labels import read_labels
from tcsae.evaluate.probing.suite import (
    ALL,
    LATENTS,
    QUICK_LATENTS,
    QUICK_TOKENS,
    Label,
    Probe,
    choose_tokens,
    free_labels,
    given,
    halves,
    means,
    sparse_code,
)
from tcsae.shared.base.console import duration, echo, progress, say, table
from tcsae.shared.base.errors import DataError, RunError
from tcsae.shared.base.files import write_json
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store

FILE = "probes.json"
SHOWN = ("1", "5", ALL)
"""Columns of the tables; probes.json has every k."""
AGAIN = "Start the same command again once it can."
X = "x"
SMOOTHED = ", smoothed"


def probe_runs(
    store: Store, runs_path: Path, names: Collection[str], labels: Path | None = None, quick: bool = False
) -> dict[str, Any]:
    """Figures of x and of each run that fits the store, written to probes.json below `runs_path`.

    Raises RunError if there is no run, or none with a sparse code; DataError for a file of labels that does not fit,
    or if no label has enough tokens.
    """
    start = time.monotonic(), time.process_time()
    runs, refused = sparse_runs(store, runs_path, names, _why_not)
    hook, skip_first = runs[0].run.options.hook, runs[0].run.options.skip_first
    tokens = choose_tokens(store, hook, skip_first, QUICK_TOKENS if quick else None)
    asked, groups, has_corpus = free_labels(store, tokens)
    if labels is not None:
        asked = given(read_labels(labels, store.eval.lengths, store.eval.documents), tokens)
    elif not has_corpus:
        say("The corpus is not at hand as a file: labels of documents (package, language) are left out.")
    probe = Probe(tokens, asked, halves(groups), QUICK_LATENTS if quick else LATENTS)
    if not probe.labels:
        raise DataError(
            f"None of {len(asked)} labels has 50 tokens with it and 50 without in each half of the documents"
            f"{f' ({labels})' if labels else ''}. Give other labels, or harvest more tokens."
        )
    x, figures = tokens.x(), {}
    with progress("probe", 2 + 2 * len(runs), "codes") as advance:
        figures[X] = probe.of_x(x)
        advance(1)
        figures[X + SMOOTHED] = probe.of_x(tokens.smooth(x))
        advance(1)
        for loaded in runs:
            code = sparse_code(loaded.sae, x, tokens)
            for smooth in (False, True):
                figures[loaded.run.name + SMOOTHED * smooth] = probe.of_code(code, smooth)
                advance(1)
    result = {
        "store": {"location": store.location, "content": store.content},
        "hook": hook,
        "skip_first": skip_first,
        "quick": quick,
        "n_tokens": len(tokens.ids),
        "weights": {loaded.run.name: loaded.weights for loaded in runs},
        "labels": {one.name: {"kind": one.kind, "rate": _rate(one)} for one in probe.labels},
        "left_out": probe.left_out,
        "refused": refused,
        "figures": figures,
        "seconds": round(time.monotonic() - start[0], 2),
        "processor_seconds": round(time.process_time() - start[1], 2),
    }
    with writing(runs_path, AGAIN):
        write_json(runs_path / FILE, result)
    return result


def _why_not(loaded: Loaded, before: Sequence[Loaded]) -> str:
    """All are probed on the same activations: those of the first."""
    options = loaded.run.options
    first = before[0].run.options if before else options
    if (options.hook, options.skip_first) == (first.hook, first.skip_first):
        return ""
    return f"it reads {options.hook} from position {options.skip_first} on. Name it alone."


def _rate(label: Label) -> float:
    known = label.values[label.values >= 0]
    return round(float(known.mean()), 6)


def difference(text: dict[str, Any], null: dict[str, Any]) -> dict[str, Any]:
    """Differences in differences: what a code has over x on the text's store, minus the same on a null of it.

    Of the runs that both have by name, over the labels that both have. Raises RunError if there is no such run.
    """
    names = [name for name in text["figures"] if name in null["figures"] and not name.startswith(X)]
    if not names:
        ours, theirs = (", ".join(one["weights"]) for one in (text, null))
        raise RunError(f"No run of --null-runs ({theirs}) has the name of one of --runs ({ours}). Train them alike.")
    labels = [one for one in text["labels"] if one in null["labels"]]
    made: dict[str, Any] = {}
    for name in names:
        base = X + SMOOTHED if name.endswith(SMOOTHED) else X
        made[name] = {}
        for label in labels:
            at = {k: one for k, one in text["figures"][name][label].items() if k in null["figures"][name][label]}
            made[name][label] = {
                k: {key: _gain(text, name, base, (label, k, key), null) for key in ("auroc", "within")} for k in at
            }
    return made


def _gain(text: dict[str, Any], name: str, base: str, at: tuple[str, str, str], null: dict[str, Any]) -> float | None:
    label, k, key = at
    values = [
        one["figures"][row][label][column][key] for one in (text, null) for row, column in ((name, k), (base, ALL))
    ]
    return None if None in values else (values[0] - values[1]) - (values[2] - values[3])


def show(result: dict[str, Any], details: bool) -> None:
    """Means over the labels of each kind; with `details` every label."""
    of_kind = {name: one["kind"] for name, one in result["labels"].items()}
    kinds = list(dict.fromkeys(of_kind.values()))
    ks = SHOWN
    for key, title in (("auroc", "AUROC"), ("within", "AUROC within equal tokens")):
        rows = []
        for name, figures in result["figures"].items():
            by_k = {k: means(figures, of_kind, k, key) for k in ks}
            rows.append([name, *(_digits(by_k[k][kind]) for kind in kinds for k in ks)])
        n = Counter(of_kind.values())
        columns = ("", *(f"{kind} ({n[kind]}) k={k}" if k != ALL else f"{kind} all" for kind in kinds for k in ks))
        table(f"{title}, mean over labels, {result['n_tokens']:,} eval tokens", columns, rows)
    if details:
        _show_labels(result, ks[0])
    echo(
        "k latents chosen, and a regression fitted, on half of the documents; scored on the other. x has no latents: "
        "k=1 is the direction between its class means,\nall is Fisher's discriminant. Smoothed: an exponential memory "
        "of 0.8 along each sequence. Within equal tokens: only pairs of one token id count."
    )
    if result["left_out"]:
        echo(f"Left out, as they are too rare or too frequent: {', '.join(result['left_out'])}.")
    spent = f"{duration(result['seconds'])} ({result['processor_seconds']:.0f} s of processor time)"
    echo(f"It took {spent}; {len(of_kind)} labels, {len(result['weights'])} SAEs.")


def _show_labels(result: dict[str, Any], k: str) -> None:
    names = list(result["figures"])
    for key, title in (("auroc", "AUROC"), ("within", "within equal tokens")):
        rows = [
            [label, about["kind"], about["rate"], *(_digits(result["figures"][name][label][k][key]) for name in names)]
            for label, about in result["labels"].items()
        ]
        table(f"{title}, k = {k}", ("label", "kind", "rate", *names), rows)


def show_difference(figures_of: dict[str, Any], labels: dict[str, Any]) -> None:
    """Means over the labels of each kind."""
    kind_of = {name: labels[name]["kind"] for name in next(iter(figures_of.values()))}
    kinds = list(dict.fromkeys(kind_of.values()))
    ks = list(next(iter(next(iter(figures_of.values())).values())))
    rows: list[Sequence[object]] = [
        [name, *(_digits(means(one, kind_of, k, "auroc")[kind]) for kind in kinds for k in ks)]
        for name, one in figures_of.items()
    ]
    columns = ("", *(f"{kind} k={k}" for kind in kinds for k in ks))
    table("(code - x) here, minus (code - x) on the null, AUROC", columns, rows)


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
