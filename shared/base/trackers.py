"""TensorBoard and Weights & Biases: a run's figures passed on, as one run however often training is interrupted."""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.shared.base.console import say
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.base.files import write_json

TRACKERS = ("tensorboard", "wandb")
TRACKED = "tracker.json"
"""Of a run's folder: its id at Weights & Biases."""
PROJECT = "tcsae"


class Tracker(NamedTuple):
    """Somebody else's record of a run."""

    log: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


def open_tracker(kind: str | None, folder: Path, config: dict[str, Any], n_steps: int = 0) -> Tracker | None:
    """What passes lines of metrics on to TensorBoard or Weights & Biases, or None without a tracker.

    A run that goes on at step `n_steps` goes on there, too: under its id, without what was logged beyond that step.
    Raises ConfigError if the tracker is unknown or not installed.
    """
    if kind is None:
        return None
    check_tracker(kind)
    try:
        return _tensorboard(folder, n_steps) if kind == "tensorboard" else _wandb(folder, config)
    except ImportError as error:
        raise _missing(kind, error) from error


def check_tracker(kind: str) -> None:
    """Raises ConfigError for a tracker that is not known."""
    if kind not in TRACKERS:
        raise ConfigError(unknown("tracker", kind, TRACKERS))


def log_results(kind: str, folder: Path, figures: Mapping[str, float], report: Path) -> None:
    """Add an evaluation's figures, and the report (pages, plots and all) as an artefact, to a run's record.

    Raises ConfigError if the tracker is unknown or not installed.
    """
    check_tracker(kind)
    try:
        if kind == "tensorboard":
            _tensorboard_results(folder, figures, report)
        else:
            _wandb_results(folder, figures, report)
    except ImportError as error:
        raise _missing(kind, error) from error


def _missing(kind: str, error: ImportError) -> ConfigError:
    return ConfigError(f"--tracker {kind} needs a package that is not there ({error}): pip install {kind}")


def _tensorboard(folder: Path, n_steps: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted training logged beyond its checkpoint is logged again.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=n_steps + 1 if n_steps else None)

    def log(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return Tracker(log, writer.close)


def _tensorboard_results(folder: Path, figures: Mapping[str, float], report: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    for name, value in figures.items():
        writer.add_scalar(f"eval/{name}", value)
    writer.add_text("report", str(report.resolve() / "index.html"))
    writer.close()


def _wandb(folder: Path, config: dict[str, Any] | None) -> Tracker:
    run = _wandb_run(folder, config)

    def log(line: dict[str, Any]) -> None:
        # Steps that it has already are dropped there: a run that goes on logs the same again.
        run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    return Tracker(log, run.finish)


def _wandb_run(folder: Path, config: dict[str, Any] | None) -> Any:
    import wandb

    try:
        return wandb.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            config=config,
            reinit="create_new",
            id=wandb_id(folder),
            resume="allow",
        )
    except wandb.errors.Error as error:  # no login, no network
        raise ConfigError(
            f"--tracker wandb: {' '.join(str(error).split())} Log in with `wandb login`, or set WANDB_MODE=offline and "
            "send the run later with `wandb sync`."
        ) from error


def wandb_id(folder: Path) -> str:
    """The run's id there: drawn once, then kept in its folder."""
    file = folder / TRACKED
    try:
        stored = json.loads(file.read_text(encoding="utf8"))["wandb"]
        if isinstance(stored, str) and stored:
            return stored
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{file} cannot be read ({error}): the tracker begins a new run.")
    drawn = uuid.uuid4().hex[:12]
    write_json(file, {"wandb": drawn})
    return drawn


def _wandb_results(folder: Path, figures: Mapping[str, float], report: Path) -> None:
    import wandb

    run = _wandb_run(folder, None)
    try:
        run.summary.update({f"eval/{name}": value for name, value in figures.items()})
        artifact = wandb.Artifact(f"report-{run.id}", type="report")
        artifact.add_dir(str(report))
        run.log_artifact(artifact)
    finally:
        run.finish()
