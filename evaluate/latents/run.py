"""`tcsae latents`: from a store and run folders to figures of their latents and a file in each folder."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.evaluate.candidates import Loaded, sparse_runs
from tcsae.evaluate.latents.latents_file import LATENTS_VERSION, load_latents, save_latents
from tcsae.evaluate.latents.material import MIN_FIRINGS, Coded
from tcsae.evaluate.latents.parts import DEFINITIONS, WORK
from tcsae.evaluate.latents.settings_of_latents import EFFECTS, LatentsRequest
from tcsae.evaluate.latents.shared_inputs import SharedInputs, choose_latents
from tcsae.shared.base.console import progress
from tcsae.shared.base.files import remove_dead_partials_in
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.store.reader import Store

NONE = {"none": ""}
UNWRITTEN = "the parts that were finished are in each run's folder"


class MeasuredLatents(NamedTuple):
    """What `measure_latents` has to say."""

    runs: dict[str, dict[str, Any]]
    """What each run's latents.json holds."""
    refused: list[str]
    """A line for each run without figures."""
    processor_s: float
    """Processor time that this call took."""


def measure_latents(store: Store, runs_path: Path, request: LatentsRequest | None = None) -> MeasuredLatents:
    """Measure the latents of the runs asked for; latents.json in each one's folder is written after every part.

    A part that is there, of the same weights, store and options, is not done again unless forced.
    Raises RunError if there is no run, or none that can be measured; ConfigError for a latent that no SAE has;
    StoreError if the eval split has no position to count.
    """
    request, start = request or LatentsRequest(), time.process_time()
    runs, refused = sparse_runs(store, runs_path, request.names, _why_not)
    measured, shared_of = {}, {}
    with stop_on_signals() as stop, progress("latents", len(runs) * len(request.parts), "parts") as advance:
        for loaded in runs:
            remove_dead_partials_in(loaded.run.path)
            options = loaded.run.options
            held = _begun(store, loaded)
            left = [part for part in request.parts if request.force or not _is_done(store, held, part, request)]
            advance(len(request.parts) - len(left))
            if left:
                key = options.hook, options.skip_first
                if key not in shared_of:
                    shared_of[key] = SharedInputs(store, *key, request)
                for after_part in _measure(shared_of[key], loaded, left, held):
                    held = after_part
                    advance(1)
                    stop.check(UNWRITTEN)
            measured[loaded.run.name] = held | {"name": loaded.run.name}
    return MeasuredLatents(measured, refused, time.process_time() - start)


def _measure(
    shared: SharedInputs, loaded: Loaded, parts: Sequence[str], held: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the file holds after each part."""
    request = shared.request
    coded = Coded(shared.sequences, loaded.sae)
    chosen = choose_latents(coded, request)
    counts = {"n_tokens": len(shared.sequences.sequence), "n_latents": len(coded.widths), "n_live": len(coded.live)}
    for part in parts:
        start = time.process_time()
        measured = WORK[part](shared, coded, chosen) | counts
        measured |= {"options": request.options(), "definitions": dict(DEFINITIONS[part])}
        measured["processor_seconds"] = round(time.process_time() - start, 2)
        parts_so_far = held["parts"] | {part: measured}
        in_order = {name: parts_so_far[name] for name in WORK if name in parts_so_far}
        held = save_latents(loaded.run.path, held | {"parts": in_order})
        yield held


def _begun(store: Store, loaded: Loaded) -> dict[str, Any]:
    """What the folder holds already, or the head of a new file."""
    options = loaded.run.options
    head = {
        "version": LATENTS_VERSION,
        "store": {"location": store.location, "content": store.content},
        "weights": loaded.weights,
        "hook": options.hook,
        "skip_first": options.skip_first,
        "min_firings": MIN_FIRINGS,
        "parts": {},
    }
    held = load_latents(loaded.run.path, store.content)
    same = held is not None and all(held.get(name) == head[name] for name in ("hook", "skip_first"))
    return held if held is not None and same else head


def _is_done(store: Store, held: dict[str, Any], part: str, request: LatentsRequest) -> bool:
    measured = held["parts"].get(part, {})
    # A tail that could not be read may have been put back.
    tail_is_back = (
        part == EFFECTS and measured.get("note") and "none" not in store.manifest.tails.get(held["hook"], NONE)
    )
    return measured.get("options") == request.options() and not tail_is_back


def _why_not(loaded: Loaded, _: Sequence[Loaded]) -> str:
    window = loaded.sae.config.window
    return f"its latents write to {window} positions at once (a crosscoder)." if window > 1 else ""
