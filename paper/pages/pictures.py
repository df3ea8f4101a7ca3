"""Pictures of the results, as SVG files that a README can show."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.evaluate.report.pages.printed import PRINTED
from tcsae.paper.arms import (
    CONTRASTIVE,
    FEWER,
    FRONTIER,
    NAMES,
    PLAIN,
    RELATIVE,
    RUNGS,
    SMOOTHED,
    WINDOWS,
    Arm,
)
from tcsae.paper.results import Results
from tcsae.shared.base.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tcsae",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}
LAGS = (1, 2, 4, 8, 16, 32)
LEGACY = "explained_variance_legacy"


def draw(name: str, results: Results, path: Path) -> None:
    """Write the picture of this name to `path`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = PICTURES[name](results)
        with whole_file(path) as file:
            figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})


def frontier(results: Results) -> "Figure":
    """Relative change against explained variance and delta CE, a line a kind of term."""
    figure, axes = _panels(2)
    for ax, score, label in zip(
        axes, ("explained_variance", "delta_ce"), ("explained variance", "delta CE (nats)"), strict=True
    ):
        for marker, (kind, arms) in zip("osD", FRONTIER.items(), strict=True):
            _path(ax, results, [PLAIN, *arms], score, NAMES[kind], marker)
        _path(ax, results, [PLAIN, *FEWER], score, "fewer active latents", "x")
        ax.set_xlabel("relative change (left: slower)")
        ax.set_ylabel(label)
    axes[0].legend()
    return figure


def smoothing(results: Results) -> "Figure":
    """Explained variance against slowness: the contrastive term, and a plain SAE smoothed."""
    figure, (ax,) = _panels(1)
    _path(ax, results, [PLAIN, *FRONTIER["contrastive"]], "explained_variance", "contrastive, trained", "o")
    for marker, rule in zip("sD^v", ("ema", "ema-topk", "mean", "hysteresis"), strict=True):
        arms = [PLAIN, *(one for one in SMOOTHED if one.smooth.startswith(f"{rule}="))]
        _path(ax, results, arms, "explained_variance", f"smoothed after training: {rule}", marker)
    ax.set_xlabel("relative change (left: slower)")
    ax.set_ylabel("explained variance")
    ax.legend()
    return figure


def lags(results: Results) -> "Figure":
    """Autocorrelation within documents over lags, of windows and terms that see lag 1 or up to 7."""
    figure, (ax,) = _panels(1)
    for marker, arm in zip("osD^v", (PLAIN, RELATIVE, CONTRASTIVE, WINDOWS[1], WINDOWS[3]), strict=True):
        curve = results.curve(arm, "rho_1_within")
        shown = [lag for lag in LAGS if lag <= len(curve)]
        ax.plot(shown, [curve[lag - 1] for lag in shown], marker=marker, markersize=4, linewidth=1.2, label=arm.label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(LAGS, [str(lag) for lag in LAGS])
    ax.set_xlabel("lag (tokens)")
    ax.set_ylabel("autocorrelation within documents")
    ax.legend()
    return figure


def sparsity(results: Results) -> "Figure":
    """Legacy explained variance against L0, and the paper's runs."""
    figure, (ax,) = _panels(1)
    arms = sorted([CONTRASTIVE, *RUNGS], key=lambda arm: results.mean(arm, "l0"))
    xs = [results.mean(arm, "l0") for arm in arms]
    ax.plot(xs, [results.mean(arm, LEGACY) for arm in arms], marker="o", markersize=4, label="temporal-topk, trained")
    for name, marker in (("run2", "s"), ("run4", "D")):
        shown = {"run2": "paper, runs 2 and 3", "run4": "paper, run 4"}[name]
        ax.plot(PRINTED[name]["l0"], PRINTED[name][LEGACY], marker, markersize=5, label=shown)
    ax.axhline(0, color="#808080", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks((8, 16, 32, 64, 128, 256), ["8", "16", "32", "64", "128", "256"])
    ax.set_xlabel("L0")
    ax.set_ylabel("explained variance (legacy)")
    ax.legend()
    return figure


PICTURES: dict[str, Callable[[Results], "Figure"]] = {
    "frontier": frontier,
    "smoothing": smoothing,
    "lags": lags,
    "sparsity": sparsity,
}


def _panels(n: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * n, 3.2), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _path(ax: "Axes", results: Results, arms: Sequence[Arm], score: str, label: str, marker: str) -> None:
    """A line through arms, in their order, with the range of seeds at each."""
    xs, ys = ([results.values(arm, name) for arm in arms] for name in ("slowness_to_x", score))
    middle = [[sum(one) / len(one) for one in values] for values in (xs, ys)]
    bars: list[list[list[float]]] = [
        [[at - min(one) for at, one in zip(means, values, strict=True)],
         [max(one) - at for at, one in zip(means, values, strict=True)]]
        for means, values in zip(middle, (xs, ys), strict=True)
    ]  # fmt: skip
    ax.errorbar(
        middle[0], middle[1], xerr=bars[0], yerr=bars[1], marker=marker, markersize=4, linewidth=1.2, label=label
    )
