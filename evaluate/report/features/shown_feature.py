"""What is shown of one latent, from the files of a report or computed anew. Loads no torch and no Zarr."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.shared.base.errors import RunError
from tcsae.shared.base.files import file_digest

LABELS = {
    "density": "density",
    "dwell": "dwell",
    "rho_1": "autocorrelation",
    "rho_1_within": "autocorr. within doc.",
    "rho_8_within": "persistence",
    "slowness": "slowness",
    "position_share": "position share",
    "document_share": "document share",
    "token_share": "token share",
    "max": "largest activation",
    "mean": "mean activation",
    "sequences": "sequences",
    "decoder_cosine": "nearest decoder cosine",
}
"""Every measure that the browser sorts and filters by, and what it is called there."""
MARK, FORMAT, VERSION = "report.json", "tcsae-report", 2
EVALUATION, WEIGHTS, STORE = "eval.json", "sae_weights.safetensors", "zarr.json"


class ShownFeature(NamedTuple):
    """One latent of one SAE."""

    run: str
    latent: int
    split: str
    n_tokens: int
    """Counted tokens that were looked at."""
    measures: Mapping[str, float | None]
    """By the names of LABELS."""
    fires: list[int]
    """Tokens that stand for it."""
    feature: Mapping[str, Any] | None
    """As a report's chunk has it; None: it never fires."""
    sequences: Mapping[int, list[Any]]
    """[document, first token, tokens] of each sequence that is shown."""
    text: Callable[[int], str]
    no_lens: str | None


def check_latent(name: str, latent: int, n_latents: int) -> None:
    """Raises RunError for a number that no latent has."""
    if latent >= n_latents:
        raise RunError(f"Latent {latent}: {name} has latents 0 to {n_latents - 1}.")


class FeatureRequest(NamedTuple):
    """What is asked for on the command line."""

    name: str | None
    """A run; None: the only one."""
    latent: int
    split: str = "eval"
    max_tokens: int | None = None


def feature_of_report(store: str, runs_path: Path, report: Path, request: FeatureRequest) -> ShownFeature | None:
    """The latent as the report has it; None if the report does not have it, or is of other figures, weights or text.

    Raises RunError for a number that no latent has.
    """
    try:
        name = request.name or _only_run(runs_path)
        if name is None or not _is_current(store, runs_path / name, report, request):
            return None
        folder = report / "runs" / name / "data"
        index = _data(folder / "index.js")
        check_latent(name, request.latent, index["n_latents"])
        return _shown(report, folder, index, name, request)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # it is computed anew, and that says what is damaged


def _shown(report: Path, folder: Path, index: dict[str, Any], name: str, request: FeatureRequest) -> ShownFeature:
    latent, feature, sequences, measures, fires = request.latent, None, {}, {}, []
    if latent in index["latents"]:
        at = index["latents"].index(latent)
        measures = {column: values[at] for column, values in index["columns"].items()}
        fires = index["fires"][at]
        feature = _data(folder / f"{latent // index['per_chunk']}.js")[str(latent)]
        for number in {context[0] for context in feature["contexts"]}:
            file = report / "sequences" / f"{number // index['per_file']}.js"
            sequences[number] = _data(file)[str(number)]
    texts = _data(report / "sequences" / "vocabulary.js")
    return ShownFeature(
        name,
        latent,
        request.split,
        index["n_tokens"],
        measures,
        fires,
        feature,
        sequences,
        lambda token: texts[str(token)],
        index["no_lens"],
    )


def _only_run(runs_path: Path) -> str | None:
    names = [path.name for path in runs_path.iterdir() if path.is_dir()]
    return names[0] if len(names) == 1 else None


def _is_current(store: str, run: Path, report: Path, request: FeatureRequest) -> bool:
    """Whether the report is of this store's content, this text, and the run's figures and weights as they lie there."""
    mark = json.loads((report / MARK).read_text(encoding="utf-8"))
    made_of = mark["made_of"]
    manifest = json.loads((Path(store) / STORE).read_text(encoding="utf-8"))["attributes"]["tcsae"]
    evaluation = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
    return (
        (mark["format"], mark["version"]) == (FORMAT, VERSION)
        and (made_of["content"], made_of["split"]) == (manifest["content"], request.split)
        and made_of["max_tokens"] == request.max_tokens
        and made_of["runs"][run.name] == file_digest(run / EVALUATION)
        and evaluation["weights"] == file_digest(run / WEIGHTS)
    )


def _data(file: Path) -> Any:
    """What a data script hands to the page."""
    text = file.read_text(encoding="ascii")
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])
