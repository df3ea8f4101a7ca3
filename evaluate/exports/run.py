"""Export of features: the SAE goes over a part of the store, and a folder is put in place when it is complete."""

from pathlib import Path
from typing import Literal

from tcsae.evaluate.batches import check_counted
from tcsae.evaluate.exports.delphi import LATENTS, TOKENIZER, write_delphi
from tcsae.evaluate.exports.feature_source import ExportRequest, feature_source
from tcsae.evaluate.exports.neuronpedia import SKIPPED, write_neuronpedia
from tcsae.shared.base.console import progress
from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import write_folder
from tcsae.shared.base.signals import stop_on_signals
from tcsae.shared.sae.folder import writing
from tcsae.shared.store.reader import Store

CURE = "Free some space, or give another --out."
NOTHING = "an export is written whole or not at all, nothing of this one is there"


FeatureForm = Literal["neuronpedia", "delphi"]


def export_features(store: Store, runs_path: Path, request: ExportRequest, form: FeatureForm, out: Path) -> str:
    """Write a run's features as `form` into `out`; returns a line on what is there.

    An earlier export there is replaced. Raises RunError if there is no such run, if it does not fit the store, or if
    `out` holds anything else; Stopped, with `out` as it was, on SIGINT or SIGTERM.
    """
    source = feature_source(store, runs_path, request)
    check_counted(source.part.split, source.part.rules, source.part.n_sequences)
    out = out.resolve()
    n_passes = 2 if form == "neuronpedia" else 1
    lines: list[str] = []
    _check_place(out, form)
    if form == "neuronpedia":
        _ = source.layer  # there is one, or this is where it ends
    with (
        stop_on_signals() as stop,
        writing(out, CURE),
        progress(f"{source.name} to {form}", n_passes * source.part.n_tokens) as advance,
    ):

        def after_batch(n_tokens: int) -> None:
            advance(n_tokens)
            stop.check(NOTHING)

        def fill(folder: Path) -> None:
            if form == "neuronpedia":
                n = write_neuronpedia(source, folder, after_batch)
                lines.append(f"{n:,} features; {source.sae.config.d_sae - n:,} never fire there and are in {SKIPPED}")
            else:
                made = write_delphi(source, folder, request.context_length, after_batch)
                lines.append(
                    f"{made.n_activations:,} activations in {made.n_contexts:,} contexts; {made.n_left_out:,} tokens "
                    "are beyond the last whole context of their sequence"
                )

        write_folder(out, fill)
    return f"{source.name} as {form}: {out} ({lines[0]})"


def _check_place(out: Path, form: str) -> None:
    """What is there is replaced, so it has to be an earlier export of this form."""
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out} is a file; an export goes into a new folder or over an earlier one. Give another --out.")
    others = sorted(path.name for path in out.iterdir() if not _is_ours(path.name, form))
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise RunError(
            f"{out} holds {others[0]}{more}; an export goes into a new folder or over an earlier one. Give another "
            "--out."
        )


def _is_ours(name: str, form: str) -> bool:
    if form == "delphi":
        return name in (LATENTS, TOKENIZER)
    return name == SKIPPED or (name.startswith("batch-") and name.endswith(".json"))
