"""`tcsae report`: one folder of pages that opens from disk, made of a store, its runs and their evaluations."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tcsae import __version__
from tcsae.evaluate.report import page_files
from tcsae.evaluate.report.feature_data import LABELS, OTHER_MEASURES, FeatureData, feature_data
from tcsae.evaluate.report.feature_pass import DEFINITION as LENS_DEFINITION
from tcsae.evaluate.report.feature_pass import MEASURES, Excerpt, Features, Lenses, collect_features
from tcsae.evaluate.report.overview import overview
from tcsae.evaluate.report.page_files import Excluded, Included, choose_runs
from tcsae.evaluate.report.sae_page import sae_page
from tcsae.evaluate.systems import sae_on
from tcsae.shared.base.console import progress
from tcsae.shared.base.files import file_digest, remove_dead_partials, write_folder
from tcsae.shared.base.signals import StopRequest, stop_on_signals
from tcsae.shared.lm.token_text import TokenTexts
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
        "version": page_files.VERSION,
        "tcsae": __version__,
        "content": store.content,
        "split": request.split,
        "max_tokens": request.max_tokens,
        "runs": {one.name: file_digest(one.loaded.run.path / EVALUATION) for one in included},
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
        self.lenses = Lenses(store, self._part(store.hook(), 0))
        self.shown: set[int] = set()
        self.needed: set[int] = set()

    def write(self, folder: Path, identity: dict[str, Any]) -> None:
        """Every file of it."""
        pages = page_files.Pages(folder)
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
        values = overview(self.store, self.included, self.excluded)
        pages.page("index.html", "overview.html", **values, generator=f"tcsae {__version__}")
        page_files.mark(folder, identity)

    def _part(self, hook: str, rules: CountingRules | int) -> Excerpt:
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
        tail = self.lenses.tail(one.hook)
        directions = one.loaded.sae.W_dec.detach() * features.contexts.maximum()[:, None]
        data = feature_data(features, one.loaded.sae, self.lenses.of(one.hook, directions), part.tokens)
        self.shown |= data.sequences
        self.needed |= data.tokens
        folder = f"runs/{one.name}"
        counted = {
            "split": self.request.split,
            "n_tokens": features.n_tokens,
            "n_together": features.firing.n_tokens,
            "skip_first": one.skip_first,
        }
        common = {"run": one, "counted": counted, "generator": f"tcsae {__version__}"}
        about = MEASURES | OTHER_MEASURES
        pages.page(f"{folder}/index.html", "sae.html", **common, **sae_page(one, features, data))
        pages.page(
            f"{folder}/features.html",
            "features.html",
            **common,
            no_lens=tail if isinstance(tail, str) else None,
            lens_definition=LENS_DEFINITION,
            measures=[{"name": name, "label": label, "about": about[name]} for name, label in LABELS.items()],
        )
        self._chunks(pages, folder, data)

    def _chunks(self, pages: page_files.Pages, folder: str, data: FeatureData) -> None:
        pages.data(f"{folder}/data/index.js", "index", data.listing | {"per_file": page_files.PER_FILE})
        for number, chunk in data.chunks.items():
            pages.data(f"{folder}/data/{number}.js", "features", chunk)

    def _shared(self, pages: page_files.Pages) -> None:
        """What the pages of all SAEs read: the sequences that are shown, and the text of tokens."""
        split, rows = self.split, {}
        for sequence in sorted(self.shown):
            tokens = split.tokens[sequence, : split.lengths[sequence]].tolist()
            rows[sequence] = [int(split.documents[sequence]), int(split.starts[sequence]), tokens]
            self.needed |= set(tokens)
        pages.sequences(rows)
        pages.data("sequences/vocabulary.js", "vocabulary", self.texts.table(self.needed))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
