"""`tcsae.harvest`, `tcsae.train`, `tcsae.evaluate`, `tcsae.report`: the commands as functions that return objects.

They take the commands' settings by the same names and run the same code. What goes wrong is a TcsaeError; progress is
shown as the console shows it, in a notebook too.
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.api.keywords import documented, options_of
from tcsae.api.returned import Evaluation, Report, Run, Runs
from tcsae.evaluate.command import evaluate as evaluate_command
from tcsae.evaluate.report.command import report as report_command
from tcsae.harvest.command import harvest as harvest_command
from tcsae.shared.base.cli import Place
from tcsae.shared.base.errors import ConfigError, RunError
from tcsae.train.command import train as train_command

if TYPE_CHECKING:
    from tcsae.harvest.cost import Plan
    from tcsae.shared.store.reader import Store
    from tcsae.train.config import TrainConfig
    from tcsae.train.dry_run import TrainEstimate

STORE, RUNS = "data/activations.zarr", "data/runs"
PRINTED = ("details", "compare", "with", "json")
"""Options of `eval` that only say what is printed."""


@documented(harvest_command)
def harvest(store: "str | Path | Store" = STORE, **settings: Any) -> "Store | Plan":
    """Run a language model over text once and store its activations at `store`; returns the Store.

    A finished store of the same settings is opened as it is, an interrupted one is gone on with. With dry_run=True
    returns a Plan: what the store will hold, and what it will take.
    Raises ConfigError, ModelError, DataError or StoreError; Stopped at an interrupt, with what is done on disk.
    """
    from tcsae.harvest.command import config_of
    from tcsae.harvest.run import harvest as run
    from tcsae.harvest.run import plan_harvest

    options = options_of(harvest_command, settings)
    if settings.get("sequences") is not None and settings.get("tokens") is not None:
        raise ConfigError("tokens and sequences are two ways to say one thing. Give one.")
    config, fresh, exact = config_of(options), options["fresh"], options["exact"]
    if options["dry_run"]:
        return plan_harvest(_location(store), config, fresh=fresh, exact=exact)
    return run(_location(store), config, fresh=fresh, exact=exact, force=options["force"])


@documented(train_command)
def train(
    store: "str | Path | Store" = STORE,
    runs: str | Path | Runs = RUNS,
    *,
    config: "str | Path | TrainConfig | dict[str, TrainConfig] | None" = None,
    **settings: Any,
) -> "Runs | TrainEstimate":
    """Train sparse autoencoders from the store, all from one pass over it; returns the Runs, in the order asked for.

    With dry_run=True returns a TrainEstimate: passes, memory and time.

    Each is a folder below `runs`; those that are finished are reused. `config`: a TOML file; or a TrainConfig, or
    several by name, in place of presets. `set` and `sweep` take dictionaries: set={"sae.k": 16}, sweep={"sae.k": [8,
    16]}.
    Raises ConfigError, RunError or StoreError; Stopped at an interrupt, with a checkpoint on disk.
    """
    from tcsae.train.command import prepare, train_prepared
    from tcsae.train.dry_run import estimate
    from tcsae.train.plan import Run as Planned

    place, given = Place(_location(store), str(_folder(runs))), _train_configs(config)
    if given:
        if extra := settings.keys() & {"preset", "set", "sweep", "steps", "seed", "positions"}:
            raise ConfigError(f"{sorted(extra)[0]} and config=TrainConfig: the config says it all. Give one of them.")
        options = options_of(train_command, settings)
        prepared = prepare(place, options)
        for name, one in given.items():
            if one.sae.d_model != (d_model := prepared.store.d_model(prepared.store.hook(one.data.hook))):
                raise ConfigError(
                    f"{name}: sae.d_model={one.sae.d_model}, but the store's activations are {d_model} wide. Set it so."
                )
        planned = [Planned(name, "config", one, options["init_from"]) for name, one in given.items()]
        prepared = prepared._replace(runs=planned)
    else:
        options = options_of(train_command, settings | ({} if config is None else {"config": config}))
        prepared = prepare(place, options)
    if options["dry_run"]:
        return estimate(prepared.store, prepared.runs_path, prepared.runs, options["fresh"], prepared.device)
    records = train_prepared(prepared, options)
    return Runs([Run(Path(place.runs) / record["name"]) for record in records])


@documented(evaluate_command, without=PRINTED)
def evaluate(
    store: "str | Path | Store" = STORE, runs: "str | Path | Run | Runs" = RUNS, **settings: Any
) -> Evaluation:
    """Score trained SAEs on the store's eval split, without the language model; returns the Evaluation of all of them.

    `runs`: a folder of runs, or Runs that `train` returned. What is evaluated already, with these settings, is read.
    Raises RunError if no run can be scored (`Evaluation.refused` names those that could not), ConfigError, StoreError.
    """
    from tcsae.evaluate.candidates import EvalRequest
    from tcsae.evaluate.command import evaluate_as_asked

    options = options_of(evaluate_command, _naming(settings, runs), PRINTED)
    request = EvalRequest(**{one.name: options[one.name] for one in fields(EvalRequest) if one.name in options})
    place = Place(_location(store), str(_folder(runs)))
    evaluated = evaluate_as_asked(place, request, options["device"], options["precision"])
    if evaluated.refused and not evaluated.evaluations:
        raise RunError(evaluated.refused[-1])
    return Evaluation(_folder(runs), evaluated.evaluations, evaluated.refused)


@documented(report_command, without=("tracker",))
def report(store: "str | Path | Store" = STORE, runs: "str | Path | Run | Runs" = RUNS, **settings: Any) -> Report:
    """Write the report, one folder of pages that opens from disk; returns where it is and what it holds.

    Raises RunError if no run is evaluated, or the folder is something else.
    """
    from tcsae.evaluate.report.command import write_as_asked

    options = options_of(report_command, _naming(settings, runs), ("tracker",))
    options.pop("tracker", None)
    written = write_as_asked(Place(_location(store), str(_folder(runs))), options)
    excluded = {one.name: one.why for one in written.excluded}
    return Report(written.folder, tuple(one.name for one in written.included), excluded, written.is_new)


def _location(store: "str | Path | Store") -> str:
    return str(getattr(store, "location", store))


def _folder(runs: "str | Path | Run | Runs") -> Path:
    """The folder of runs. Raises ConfigError for runs of several folders."""
    if isinstance(runs, Run):
        return runs.path.parent
    return runs.folder if isinstance(runs, Runs) else Path(runs)


def _naming(settings: dict[str, Any], runs: "str | Path | Run | Runs") -> dict[str, Any]:
    """Runs given as objects are those that are meant."""
    if "run" in settings or not isinstance(runs, Run | Runs):
        return settings
    return settings | {"run": [runs.name] if isinstance(runs, Run) else [one.name for one in runs]}


def _train_configs(config: Any) -> "dict[str, TrainConfig]":
    """Configs by the names of their runs; none where `config` is a file or nothing."""
    if config is None or isinstance(config, str | Path):
        return {}
    from tcsae.train.config import TrainConfig
    from tcsae.train.plan import check_run_name

    given = {"config": config} if isinstance(config, TrainConfig) else config
    if not isinstance(given, dict) or not given or not all(isinstance(one, TrainConfig) for one in given.values()):
        raise ConfigError(f"config={config!r:.80}: a TOML file, a TrainConfig, or a dictionary of name: TrainConfig.")
    for name in given:
        check_run_name("config", name)
    return given
