"""One latent, where it fires most."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.api.returned import Run
from tcsae.api.shading import ShadedText
from tcsae.evaluate.candidates import EvalRequest, candidate, load
from tcsae.evaluate.report.features.feature_pass import Excerpt, collect_features
from tcsae.shared.base.console import progress
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.store.reader import Store, open_store

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SHOWN = 8


@dataclass(frozen=True, repr=False)
class Feature:
    """A latent of a run, in text. Printed, or as a cell's value in a notebook: its contexts, shaded."""

    run: str
    latent: int
    density: float
    """Share of the counted tokens at which it is on."""
    maximum: float
    contexts: Sequence[ShadedText]
    """The sequences with the largest peaks first, then one at each of some quantiles of the peaks."""

    def __str__(self) -> str:
        return "\n".join([self._title(), *map(str, self.contexts[:SHOWN])])

    __repr__ = __str__

    def _title(self) -> str:
        return f"latent {self.latent} of {self.run}: on at {self.density:.3%} of tokens, at most {self.maximum:.3g}"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(self._title(), style="bold")
        yield from self.contexts[:SHOWN]

    def _repr_html_(self) -> str:
        import html

        shown = "".join(one._repr_html_() for one in self.contexts[:SHOWN])
        return f"<p>{html.escape(self._title())}</p>{shown}"


def feature(
    store: str | Path | Store, run: str | Path | Run, latent: int, *, split: str = "eval", max_tokens: int | None = None
) -> Feature:
    """A latent's contexts on the store, strongest first, without the language model.

    `run`: a Run, or its folder (also of an SAE in SAELens' layout). `max_tokens`: look at so many only.
    Raises RunError, StoreError; ConfigError for a latent that the SAE has not.
    """
    opened: Any = store if isinstance(store, Store) else open_store(store)
    path = run.path if isinstance(run, Run) else Path(run)
    candidate_run = candidate(opened, path, EvalRequest())
    sae = load(candidate_run).sae
    if not 0 <= latent < sae.config.d_sae:
        raise ConfigError(f"Latent {latent}: {path.name} has latents 0 to {sae.config.d_sae - 1}.")
    part = Excerpt(opened.split(split), candidate_run.options.hook, candidate_run.options.rules, max_tokens)
    with progress(f"feature {latent}", total=part.n_tokens) as advance:
        (features,) = collect_features(part, [sae], advance)
    largest, texts = float(features.contexts.maximum()[latent]), TokenTexts(opened)
    contexts = []
    for one in features.contexts.contexts(latent):
        n = int(part.split.lengths[one.sequence])
        tokens = [texts[int(token)] for token in part.split.tokens[one.sequence, :n]]
        shares = (one.activations[:n].clip(min=0) / (largest or 1.0)).tolist()
        which = "" if one.quantile is None else f", {100 * one.quantile:.0f}% quantile"
        contexts.append(ShadedText(tokens, shares, f"{one.activations.max():.3g}{which}"))
    density = int(features.contexts.n_active[latent]) / max(1, features.n_tokens)
    return Feature(path.name, latent, density, largest, contexts)
