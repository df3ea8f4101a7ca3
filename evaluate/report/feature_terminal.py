"""`tcsae feature`: one latent in the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tcsae.evaluate.candidates import Candidate, EvalRequest, candidate, evaluable, load
from tcsae.evaluate.measures.temporal_figures import FAR
from tcsae.evaluate.report.contexts import Context
from tcsae.evaluate.report.feature_data import LABELS, label_tokens, latent_measures, token_rarity
from tcsae.evaluate.report.feature_pass import Excerpt, Features, Lenses, Nearest, collect_features, nearest_by_decoder
from tcsae.shared.base.console import legible, progress, say, sparkline
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.folder import CONFIG
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.reader import Split, Store

BARS = " ▁▂▃▄▅▆▇█"
SHADES = ("", "on #4a3608", "on #6b4a06", "on #8f6000", "on #b87a00")
"""Backgrounds of active tokens, from weak to strong; the text on them is near white."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRequest:
    """What is asked for on the command line."""

    name: str | None
    """A run; None: the only one."""
    latent: int
    split: str = "eval"
    max_tokens: int | None = None


class FoundLatent(NamedTuple):
    """One SAE's features, and the latent of them that is asked for."""

    run: Candidate
    sae: SparseAutoencoder
    latent: int
    part: Excerpt
    features: Features

    @property
    def split(self) -> Split:
        return self.part.split


def find_feature(store: Store, runs_path: Path, request: FeatureRequest) -> FoundLatent:
    """Run the SAE over the split. Raises RunError if there is no such run or latent, or several runs and no name."""
    folders = evaluable(runs_path, [request.name] if request.name else [])
    if len(folders) > 1:
        raise RunError(f"{runs_path} has {len(folders)} runs. Name one: --run {folders[0].name}")
    run = candidate(store, folders[0], EvalRequest())
    sae = load(run).sae
    if request.latent >= sae.config.d_sae:
        raise RunError(f"Latent {request.latent}: {folders[0].name} has latents 0 to {sae.config.d_sae - 1}.")
    split = store.split(request.split)
    part = Excerpt(split, run.options.hook, run.options.rules, request.max_tokens)
    with stop_on_signals() as stop, progress(f"feature {request.latent}", total=part.n_tokens) as advance:

        def after_batch(n_tokens: int) -> None:
            advance(n_tokens)
            stop.check("nothing is shown yet")

        (features,) = collect_features(part, [sae], after_batch)
    for difference in run.differences:
        say(f"{run.name}: {CONFIG} says {difference}.")
    return FoundLatent(run, sae, request.latent, part, features)


def show_feature(store: Store, found: FoundLatent, n_contexts: int) -> None:
    """Print it."""
    from rich.console import Console
    from rich.text import Text

    console, texts, latent = Console(highlight=False), TokenTexts(store), found.latent
    features = found.features
    console.print(Text(f"Latent {latent} of {legible(found.run.path.name)}", style="bold"))
    if not features.alive[latent]:
        console.print(f"It is active at none of the {features.n_tokens:,} counted {found.split.name} tokens.")
        return
    console.print(_measures(found))
    console.print(_persistence(features, latent), soft_wrap=True)
    tokens = label_tokens(features.contexts.kept(latent), found.part.tokens, token_rarity(found.part.tokens))
    console.print(_chips("fires on", [(texts[token], None) for token in tokens]), soft_wrap=True)
    for line in _lens(store, found, texts):
        console.print(line, soft_wrap=True)
    alive = features.alive
    near, together = nearest_by_decoder(found.sae.W_dec, alive), features.firing.nearest(alive)
    for title, nearest in (("near, by decoder", near), ("fires together", together)):
        console.print(_chips(title, _alike(nearest, latent)), soft_wrap=True)
    for one in features.contexts.contexts(latent)[:n_contexts]:
        console.print()
        for line in _context(one, found, texts, console.is_terminal):
            console.print(line, soft_wrap=True)


def _persistence(features: Features, latent: int) -> str:
    """The autocorrelation over lags; a dash where no pair of tokens tells it."""
    rho, null = features.figures.rho[:, latent].tolist(), float(features.figures.rho_null[latent])
    shown = [f"{value:.3f}" if np.isfinite(value) else "-" for value in (rho[0], rho[FAR - 1], null)]
    known = [max(0.0, value) for value in rho if np.isfinite(value)]
    curve = f"{sparkline([*known, 0.0], len(known) + 1)[:-1]} " if known else ""
    return (
        f"persistence       {curve}autocorrelation within documents, lags 1 to {len(rho)}: "
        f"{shown[0]}, {shown[1]} at {FAR}; permuted {shown[2]}"
    )


def _measures(found: FoundLatent) -> str:
    measures = latent_measures(found.features, found.sae)
    shown = [f"{LABELS[name]} {_figure(values[found.latent])}" for name, values in measures.items()]
    return f"on {found.features.n_tokens:,} counted {found.split.name} tokens: {', '.join(shown)}"


def _figure(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.3g}"


def _lens(store: Store, found: FoundLatent, texts: TokenTexts) -> list[Any]:
    from rich.text import Text

    hook, latent = found.run.options.hook, found.latent
    lenses = Lenses(store, found.part)
    peaks = found.features.contexts.maximum()
    one = lenses.of(hook, found.sae.W_dec.detach()[latent : latent + 1] * peaks[latent])
    if one is None:
        return [Text(f"no logit lens: {lenses.tail(hook)}")]
    rows = (("promotes", one.promoted, one.gains), ("suppresses", one.suppressed, one.losses))
    return [
        _chips(title, [(texts[token], f"{change:+.1f}") for token, change in zip(*row, strict=True)])
        for title, *both in rows
        for row in [[side[0].tolist() for side in both]]
    ]


def _alike(nearest: Nearest, latent: int) -> list[tuple[str, str | None]]:
    pairs = zip(nearest.latents[latent].tolist(), nearest.likeness[latent].tolist(), strict=True)
    return [(str(other), f"{likeness:.2f}") for other, likeness in pairs if likeness > 0]


def _chips(title: str, values: list[tuple[str, str | None]]) -> Any:
    from rich.text import Text

    line = Text(f"{title:<18}")
    for i, (value, note) in enumerate(values):
        line.append("  " if i else "")
        line.append(value.replace(" ", "␣"), style="bold")
        line.append(f" {note}" if note else "", style="dim")
    return line


def _context(one: Context, found: FoundLatent, texts: TokenTexts, shaded: bool) -> list[Any]:
    """Where it is from; the text; a bar a token."""
    from rich.text import Text

    split, n = found.split, int(found.split.lengths[one.sequence])
    largest = float(found.features.contexts.maximum()[found.latent])
    shares, peak = one.activations[:n] / largest, int(one.activations.argmax())
    which = "one of the strongest" if one.quantile is None else f"around the {100 * one.quantile:.0f}% quantile"
    place = f"document {split.documents[one.sequence]}, from token {split.starts[one.sequence]}"
    text, was_active = Text(), False
    for position, share in enumerate(shares.tolist()):
        token, active = texts[int(split.tokens[one.sequence, position])], share > 0
        if shaded:
            style = f"#f4f4f0 {SHADES[min(4, 1 + int(share * 4))]}" if active else ""
            text.append(token, style=f"{style} bold underline" if position == peak else style)
        else:  # a pair of brackets around each run
            text.append(("" if active == was_active else "⟦" if active else "⟧") + token)
        was_active = active
    if was_active and not shaded:
        text.append("⟧")
    bars = "".join(BARS[min(8, int(np.ceil(share * 8)))] for share in shares.tolist())
    header = Text(f"{which}: peak {one.activations.max():.3g}, {place}", style="dim")
    return [header, text, Text(f"▕{bars}▏", style="dim")]
