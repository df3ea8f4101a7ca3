"""What the stages return: runs, evaluations, a report; each shows itself in a notebook and as a pandas table."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tcsae.shared.base.console import legible
from tcsae.shared.base.errors import ConfigError, RunError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from tcsae.shared.sae.module import SparseAutoencoder


@dataclass(frozen=True)
class Run:
    """One trained SAE: its folder, and what is recorded there."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def record(self) -> dict[str, Any]:
        """tcsae.json: settings, store content, steps, tokens, versions. Raises RunError if it cannot be read."""
        from tcsae.shared.sae.folder import load_record

        return load_record(self.path)

    @cached_property
    def sae(self) -> "SparseAutoencoder":
        """The SAE, float32 on the CPU. Raises RunError if its files are damaged."""
        from tcsae.shared.sae.folder import load_sae

        return load_sae(self.path)

    def to_pandas(self) -> "pd.DataFrame":
        """The training curve: a row for each logged step."""
        import pandas as pd

        from tcsae.shared.sae.folder import read_metrics

        lines = [line for line in read_metrics(self.path) if "event" not in line]
        return pd.DataFrame(lines).set_index("step") if lines else pd.DataFrame()

    def __repr__(self) -> str:
        record = self.record
        return f"Run({legible(self.name)}: {record['sae']['d_sae']} latents, {record['steps']} steps, in {self.path})"


class Runs(Sequence[Run]):
    """Runs of one folder, by place or by name."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = tuple(runs)

    @property
    def folder(self) -> Path:
        """The folder that they lie in. Raises ConfigError for none, or several."""
        folders = {run.path.parent for run in self}
        if len(folders) != 1:
            raise ConfigError(f"{len(self)} runs in {len(folders)} folders: those of one folder go together.")
        return next(iter(folders))

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, which: int | str) -> Run: ...
    @overload
    def __getitem__(self, which: slice) -> "Runs": ...
    def __getitem__(self, which: int | str | slice) -> "Run | Runs":
        """Raises RunError for an unknown name."""
        if isinstance(which, slice):
            return Runs(self._runs[which])
        if isinstance(which, int):
            return self._runs[which]
        by_name = {run.name: run for run in self}
        if which not in by_name:
            raise RunError(unknown("run", which, by_name))
        return by_name[which]

    def to_pandas(self) -> "pd.DataFrame":
        """A row a run, with its last figures on training batches."""
        import pandas as pd

        rows = {}
        for run in self:
            curve = run.to_pandas()
            record = run.record
            about = {
                "latents": record["sae"]["d_sae"],
                "steps": record["steps"],
                "tokens": record["tokens"],
                "dead_fraction": record["dead_fraction"],
                "seconds": record["seconds"],
            }
            rows[run.name] = about | (curve.iloc[-1].to_dict() if len(curve) else {}) | {"seconds": record["seconds"]}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")

    def __repr__(self) -> str:
        return f"Runs({', '.join(legible(run.name) for run in self)})"

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html()


@dataclass(frozen=True, repr=False)
class Evaluation(Mapping[str, dict[str, Any]]):
    """Figures of several SAEs on one eval split; by name, what eval.json holds."""

    folder: Path
    """Of the runs."""
    evaluations: Sequence[dict[str, Any]]
    refused: Sequence[str] = ()
    """A line for each run that got no figures, and why."""
    _by_name: dict[str, dict[str, Any]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({one["name"]: one for one in self.evaluations})

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Raises RunError for an unknown name."""
        if name not in self._by_name:
            raise RunError(unknown("evaluation", name, self._by_name))
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def to_pandas(self, intervals: bool = False) -> "pd.DataFrame":
        """A row an SAE, a column a figure; temporal.NAME is a temporal measure, temporal.NAME.difference from its null.

        `intervals`: also FIGURE.low and FIGURE.high, 95% over documents.
        """
        import pandas as pd

        rows = {}
        for name, one in self.items():
            row = {figure: value for figure, value in one["metrics"].items() if not isinstance(value, dict | list)}
            bounds = dict(one.get("intervals") or {})
            groups = (one.get("temporal") or {}).get("groups", {})
            for measure, figures in groups.get("all", {}).get("measures", {}).items():
                row[f"temporal.{measure}"] = figures["value"]
                row[f"temporal.{measure}.difference"] = figures.get("difference")
                bounds[f"temporal.{measure}.difference"] = figures.get("interval")
            if intervals:
                for figure, both in bounds.items():
                    if both:
                        row |= {f"{figure}.low": both[0], f"{figure}.high": both[1]}
            rows[name] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")

    def __repr__(self) -> str:
        return f"Evaluation({', '.join(map(legible, self))})"

    def _repr_html_(self) -> str:
        return self.to_pandas().T.to_html()


@dataclass(frozen=True)
class Report:
    """A written report."""

    folder: Path
    included: tuple[str, ...]
    """Names of the runs in it."""
    excluded: dict[str, str]
    """Names of the others, and why they are left out."""
    is_new: bool
    """Whether it was written now; otherwise nothing had changed."""

    @property
    def page(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"

    def _repr_html_(self) -> str:
        address = html.escape(self.page.resolve().as_uri())
        return f'<a href="{address}">{html.escape(str(self.page))}</a>: {len(self.included)} SAEs'
