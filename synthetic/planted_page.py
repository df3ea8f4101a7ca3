"""docs/results/planted.md: predictions and what came of them, the identifiability diagram, the table of methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.shared.base.files import write_atomic, write_json
from tcsae.shared.sae.folder import EVALUATION, load_evaluation, writing
from tcsae.shared.store.reader import open_store
from tcsae.synthetic.experiment import AGAIN, METHODS, Place, grid_of, runs_of, table_cells
from tcsae.synthetic.identifiability import ARMS, PLAIN, PREDICTIONS, TEMPORAL, Grid, Size

FIGURE, NUMBERS, PAGE = "planted.svg", "planted.json", "planted.md"
CLASSES_SHOWN = ("slow_rare", "slow_dense", "fast", "position", "parent", "child")


def write_planted_page(place: Place, size: Size, out: Path) -> Path:
    """Write page, figure and numbers from what is on disk; returns the page's path."""
    grid = grid_of(place, size, open_store)
    methods = method_figures(place, size)
    verdicts = [prediction.judge(grid) for prediction in PREDICTIONS]
    numbers = {
        "durations": grid.durations,
        "signal_to_noise": grid.snr.round(4).tolist(),
        **{name: {arm: getattr(grid, name)[arm].round(4).tolist() for arm in ARMS} for name in ("slow", "recovered")},
        "fast": {arm: grid.fast[arm].round(4).tolist() for arm in ARMS},
        "methods": methods,
        "verdicts": [one._asdict() for one in verdicts],
    }
    with writing(out, AGAIN):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / NUMBERS, numbers)
        write_atomic(out / FIGURE, diagram(grid))
        write_atomic(out / PAGE, _page(size, grid, methods, verdicts).encode())
    return out / PAGE


def method_figures(place: Place, size: Size) -> dict[str, list[dict[str, Any]]]:
    """Of each preset, for every seed: EV, L0, and the recovery overall and by class."""
    by_preset: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for cell in table_cells(size):
        store = open_store(place.store(cell.name))
        for run in runs_of(store, size, cell):
            evaluation = load_evaluation(place.runs(cell.name) / run.name, store.content, EVALUATION)
            assert evaluation is not None, "made before"
            measures = evaluation["measures"]
            figures = {"EV": evaluation["metrics"]["explained_variance"], "L0": evaluation["metrics"]["l0"]}
            figures |= measures["planted"]["figures"]
            figures |= {f"F1 {one}": measures[f"planted_{one}"]["figures"]["f1"] for one in CLASSES_SHOWN}
            slow = measures["planted_slow_rare"]["figures"]
            by_preset[run.preset].append(figures | {one: slow[one] for one in ("onset_distance", "offset_distance")})
    return by_preset


def diagram(grid: Grid) -> bytes:
    """Recovered share over duration and signal to noise: both methods, and their difference. SVG."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "planted", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        parts = [grid.recovered[arm].mean(0) for arm in (PLAIN, TEMPORAL)]
        titles = [PLAIN, TEMPORAL, "difference"]
        for i, (values, title) in enumerate(zip([*parts, parts[1] - parts[0]], titles, strict=True)):
            axes = figure.add_subplot(1, 3, i + 1)
            style: dict[str, Any] = (
                {"cmap": "RdBu", "vmin": -1, "vmax": 1} if i == 2 else {"cmap": "viridis", "vmin": 0, "vmax": 1}
            )
            image = axes.imshow(values.T, origin="lower", aspect="auto", **style)
            axes.set_xticks(range(len(grid.durations)), [str(one) for one in grid.durations])
            axes.set_yticks(range(len(grid.snr)), [f"{one:.2g}" for one in grid.snr])
            axes.set(title=title, xlabel="duration, tokens", ylabel="signal to noise")
            for (x, y), value in np.ndenumerate(values):
                dark = i < 2 and value < 0.6
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
            figure.colorbar(image, ax=axes, shrink=0.8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _page(size: Size, grid: Grid, methods: dict[str, list[dict[str, Any]]], verdicts: Sequence[Any]) -> str:
    lines = [
        "# Planted features: what is recovered of a known truth",
        "",
        f"Written by `tcsae planted{size.name}` (`make planted`). `tcsae synthetic` plants features whose truth is "
        "known; durations change nothing about a single token, so a method that looks at one token at a time must "
        f"score the same at every duration. {size.n_seeds} seeds, each of store, weights and data order; "
        f"{size.steps} steps.",
        "",
        "## What was predicted, and what would refute it",
        "",
        "The sentences stood in `synthetic/identifiability.py` before the runs were made.",
        "",
        "| prediction | refuted if | figure | verdict |",
        "|---|---|---|---|",
    ]
    for prediction, verdict in zip(PREDICTIONS, verdicts, strict=True):
        word = "held" if verdict.held else "**refuted**"
        lines.append(f"| {prediction.sentence} | {prediction.refuted_if} | {verdict.figure} | {word} |")
    lines += [
        "",
        "## What can be identified",
        "",
        f"![Recovered share over duration and signal to noise]({FIGURE})",
        "",
        "Share of rare features recovered (F1 of the matched latent at least 0.5, cosine at least 0.7), mean over "
        "seeds. Signal to noise: amplitude over the standard deviation of all else along the feature's direction.",
        "",
        "F1 of slow features, mean over seeds and signal to noise:",
        "",
        "| duration | " + " | ".join(ARMS) + " |",
        "|---" * (len(ARMS) + 1) + "|",
        *(
            f"| {duration} | " + " | ".join(f"{grid.slow[arm][:, i].mean():.3f}" for arm in ARMS) + " |"
            for i, duration in enumerate(grid.durations)
        ),
        "",
        "## Methods on the default store",
        "",
        "Mean over seeds, and the largest distance of a seed from it. Definitions: `measures` of each eval.json.",
        "Presets as they are, with learning rates that were not tuned (T-SAE's and TFA's are for longer runs), "
        f"and {size.k} active latents: of a crosscoder for a window of 3, a third of what the others have a token.",
        "",
        *_method_rows(methods),
        "",
    ]
    return "\n".join(lines)


def _method_rows(methods: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Figures down, presets across."""
    names = list(methods)
    figures = [key for key in next(iter(methods.values()))[0] if key not in ("precision", "recall")]
    rows = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key in figures:
        cells = []
        for name in names:
            values = [one[key] for one in methods[name] if one[key] is not None]
            far = max((abs(one - np.mean(values)) for one in values), default=0.0)
            cells.append(f"{np.mean(values):.3g} ±{far:.2g}" if values else "-")
        rows.append(f"| {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return rows
