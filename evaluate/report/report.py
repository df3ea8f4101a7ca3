"""`tcsae report`: one folder of pages that opens from disk, made of a store, its runs and their evaluations."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch

from tcsae import __version__
from tcsae.evaluate.report.features.decoder_map import OPPOSITE_FROM, decoder_map
from tcsae.evaluate.report.features.feature_data import OTHER_MEASURES, FeatureData, feature_data
from tcsae.evaluate.report.features.feature_pass import MEASURES, Excerpt, Features, collect_features
from tcsae.evaluate.report.features.lens import DEFINITION as LENS_DEFINITION
from tcsae.evaluate.report.features.lens import Lenses
from tcsae.evaluate.report.features.shown_feature import LABELS, VERSION
from tcsae.evaluate.report.pages import page_files
from tcsae.evaluate.report.pages.latents_section import latents_looked_at, latents_tables, measured_parts
from tcsae.evaluate.report.pages.matched_saes import MAX_SAES, matched_latents
from tcsae.evaluate.report.pages.overview import overview
from tcsae.evaluate.report.pages.page_files import Excluded, Included, choose_runs
from tcsae.evaluate.report.pages.sae_page import sae_page
from tcsae.evaluate.systems import sae_on
from tcsae.shared.base.console import progress
from tcsae.shared.base.files import file_digest, json_digest, remove_dead_partials, write_folder
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.crosscoder import decoder_rows
from tcsae.shared.sae.folder import EVALUATION, writing
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Store

UNWRITTEN = "the report that was there, if any, stays"
PASS_LATENTS = 65_536
"""Latents of all SAEs that go through the store together: some 40 KB each at sequences of 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRequest:
    """What is asked for on the command line."""

    names: Collection[str] = ()
    """Runs; none: all."""
    split: str = "eval"
    """Where the features' sequences and measures are from."""
    max_tokens: int | None = None
    """About how many tokens of it are looked at; None: all."""
    force: bool = False
    device: str = "cpu"
    """Where SAEs encode."""


class Written(NamedTuple):
    """What a report holds."""

    folder: Path
    included: list[Included]
    excluded: list[Excluded]
    is_new: bool


def write_report(store: Store, runs_path: Path, out: Path, request: ReportRequest | None = None) -> Written:
    """Write the report of the runs asked for to `out`, whole or not at all; nothing is done if it is there already.

    Raises RunError if `out` is something else or cannot be written, or no run has figures; Stopped for a signal.
    """
    request = request or ReportRequest()
    before = page_files.made_of(out)
    remove_dead_partials(out)
    store.n_bytes()  # shown at the end: what is missing is named before the work
    included, excluded = choose_runs(store, runs_path, request.names)
    identity = _identity(store, request, included, excluded)
    if before == identity and not request.force:
        return Written(out, included, excluded, False)
    with stop_on_signals() as stop, writing(out, page_files.CURE):
        write_folder(out, lambda folder: _Report(store, request, included, excluded, stop).write(folder, identity))
    return Written(out, included, excluded, True)


def _identity(
    store: Store, request: ReportRequest, included: Sequence[Included], excluded: Sequence[Excluded]
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "tcsae": __version__,
        "content": store.content,
        "split": request.split,
        "max_tokens": request.max_tokens,
        "runs": {one.name: file_digest(one.loaded.run.path / EVALUATION) for one in included},
        "latents": {one.name: json_digest(measured_parts(one)) for one in included},
        "excluded": {one.name: one.why for one in excluded},
    }


class _Report:
    """One report in the making."""

    def __init__(
        self,
        store: Store,
        request: ReportRequest,
        included: list[Included],
        excluded: list[Excluded],
        stop: StopRequest,
    ) -> None:
        self.store, self.request, self.stop = store, request, stop
        self.split = store.split(request.split)
        self.included, self.excluded = included, excluded
        self.texts = TokenTexts(store)
        self.lenses = Lenses(store, self._part(store.hook(), CountingRules()))
        self.shown: set[int] = set()
        self.needed: set[int] = set()
        self.alive: dict[int, torch.Tensor] = {}
        """By number of the run: its latents that are alive."""

    def write(self, folder: Path, identity: dict[str, Any]) -> None:
        """Every file of it."""
        comparable = self._comparable()
        generator = f"tcsae {__version__}"
        pages = page_files.Pages(folder, generator=generator, comparable=bool(comparable), measures=_measures())
        passes = self._passes()
        with progress("report", total=sum(self._part(one.hook, one.rules).n_tokens for one, *_ in passes)) as advance:

            def after_batch(n_tokens: int) -> None:
                advance(n_tokens)
                self.stop.check(UNWRITTEN)

            for runs in passes:
                part = self._part(runs[0].hook, runs[0].rules)
                saes = [sae_on(one.loaded.sae, self.request.device) for one in runs]
                features = collect_features(part, saes, after_batch)
                for one in runs:
                    self.stop.check(UNWRITTEN)
                    self._sae(pages, one, part, features.pop(0))
        self._shared(pages)
        if comparable:
            self._compare(pages, comparable)
        tables = latents_tables(self.included)
        pages.page("index.html", "overview.html", **overview(self.store, self.included, self.excluded), latents=tables)
        pages.page("glossary.html", "glossary.html", entries=pages.glossary.entries)
        page_files.mark(folder, identity)

    def _part(self, hook: str, rules: CountingRules) -> Excerpt:
        return Excerpt(self.split, hook, rules, self.request.max_tokens)

    def _passes(self) -> list[list[Included]]:
        """Runs that can share a pass: of one hook and one set of counted positions, and not too many latents."""
        passes: list[list[Included]] = []
        for one in self.included:
            for runs in passes:
                latents = sum(other.loaded.sae.config.d_sae for other in [*runs, one])
                alike = runs[0].rules == one.rules
                if alike and latents <= PASS_LATENTS:
                    runs.append(one)
                    break
            else:
                passes.append([one])
        return passes

    def _sae(self, pages: page_files.Pages, one: Included, part: Excerpt, features: Features) -> None:
        """The pages and data of one SAE."""
        tail, sae, alive = self.lenses.tail(one.hook), one.loaded.sae, features.alive
        rows = sae.window_rows[alive] * features.contexts.maximum()[alive, None, None]
        latents = alive.nonzero().squeeze(1).tolist()
        data = feature_data(features, sae, self.lenses.of(one.hook, rows), part.tokens, latents)
        places = decoder_map(sae.W_dec, alive, data.opposite)
        self.shown |= data.sequences
        self.needed |= data.tokens
        self.alive[one.number] = alive
        folder, no_lens = f"runs/{one.name}", tail if isinstance(tail, str) else None
        counted = {
            "split": self.request.split,
            "n_tokens": features.n_tokens,
            "n_joint": features.firing.n_tokens,
            "skip_first": one.skip_first,
        }
        common = {"run": one, "counted": counted}
        looked_at = latents_looked_at(one)
        pages.page(f"{folder}/index.html", "sae.html", **common, **sae_page(one, features, data), latents=looked_at)
        pages.page(
            f"{folder}/features.html", "features.html", **common, no_lens=no_lens, lens_definition=LENS_DEFINITION
        )
        pages.page(f"{folder}/map.html", "map.html", **common, places=places, opposite_from=OPPOSITE_FROM)
        rounded = {name: np.round(points, 4).tolist() for name, points in places.places.items()}
        pages.data(f"{folder}/data/map.js", "map", {"places": rounded, "pairs": places.pairs})
        about = {"run": one.name, "weights": one.evaluation["weights"], "no_lens": no_lens, "x_rho": _rho_of_x(one)}
        self._chunks(pages, folder, data, about)

    def _chunks(self, pages: page_files.Pages, folder: str, data: FeatureData, about: dict[str, Any]) -> None:
        pages.data(f"{folder}/data/index.js", "index", data.listing | about | {"per_file": page_files.PER_FILE})
        for number, chunk in data.chunks.items():
            pages.data(f"{folder}/data/{number}.js", "features", chunk)

    def _comparable(self) -> list[Included]:
        """The first MAX_SAES of each hook that has two or more."""
        by_hook: dict[str, list[Included]] = {}
        for one in self.included:
            by_hook.setdefault(one.hook, []).append(one)
        return [one for runs in by_hook.values() if len(runs) > 1 for one in runs[:MAX_SAES]]

    def _compare(self, pages: page_files.Pages, runs: list[Included]) -> None:
        """The page of pairs, and a file for each pair of one hook."""
        listing = [
            {"number": one.number, "name": one.name, "path": quote(one.name, safe=""), "group": one.hook}
            for one in runs
        ]
        left_out = [one.name for one in self.included if one not in runs]
        pages.page("compare.html", "compare.html", left_out=left_out, max_saes=MAX_SAES)
        pages.data("compare/runs.js", "runs", listing)
        for a, b in itertools.combinations(runs, 2):
            if a.hook == b.hook:
                self.stop.check(UNWRITTEN)
                of_a, of_b = (torch.from_numpy(decoder_rows(one.loaded.sae)) for one in (a, b))
                pairs = matched_latents(of_a, of_b, self.alive[a.number], self.alive[b.number])
                pages.data(f"compare/{a.number}-{b.number}.js", "pair", f"{a.number}-{b.number}", pairs)

    def _shared(self, pages: page_files.Pages) -> None:
        """What the pages of all SAEs read: the sequences that are shown, and the text of tokens."""
        split, rows = self.split, {}
        for sequence in sorted(self.shown):
            tokens = split.tokens[sequence, : split.lengths[sequence]].tolist()
            rows[sequence] = [int(split.documents[sequence]), int(split.starts[sequence]), tokens]
            self.needed |= set(tokens)
        pages.sequences(rows)
        pages.data("sequences/vocabulary.js", "vocabulary", self.texts.table(self.needed))


def _measures() -> list[dict[str, str]]:
    """What the pages call each measure of a latent, and what it is."""
    about = MEASURES | OTHER_MEASURES
    return [{"name": name, "label": label, "about": about[name]} for name, label in LABELS.items()]


def _rho_of_x(one: Included) -> list[float | None] | None:
    """The autocorrelation of x itself within documents, over lags; None if its evaluation has none."""
    curves = ((one.evaluation.get("temporal") or {}).get("x") or {}).get("curves", {})
    curve = curves.get("rho_1_within")
    return None if curve is None else [None if value is None else round(value, 4) for value in curve]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
