"""From what was asked on the command line to the runs to train."""

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.reader import Store
from tcsae.train.config import TrainConfig
from tcsae.train.losses import temporal_term
from tcsae.train.presets import DEFAULT, preset

UNNAMED = ("steps", "log_every", "guard.")
"""Settings that a run's name leaves out; and data.seed, where it is 0, and data.hook, where it is the store's first."""


class Run(NamedTuple):
    """One SAE to train, and the folder name it gets."""

    name: str
    preset: str
    config: TrainConfig
    init_from: str | None = None
    """Name of the run whose weights it starts from."""


class Request(NamedTuple):
    """What `tcsae train` was asked for."""

    presets: Sequence[str] = ()
    settings: Sequence[str] = ()
    """ "key=value" each, for every run."""
    sweeps: Sequence[str] = ()
    """ "key=v1,v2" each: one run for every combination."""
    config_file: Path | None = None
    init_from: str | None = None
    options: Mapping[str, object] = {}
    """Settings that options of their own gave (--steps); None where one was not given."""


def plan_runs(store: Store, request: Request) -> list[Run]:
    """One run for each preset (without any, the default one) and each point of the sweep's grid.

    Raises ConfigError for an unknown preset or setting, with the nearest name; StoreError for an unknown hook.
    """
    base, from_file, presets = "", [], list(request.presets)
    options = _checked_options(request)
    check_run_name("--init-from", request.init_from)
    if request.config_file is not None:
        values = read_config_file(request.config_file)
        base = request.config_file.stem
        if "preset" in values and presets:
            raise ConfigError(f"{request.config_file} names a preset and so does --preset. Keep one of them.")
        presets = presets or [values.pop("preset", DEFAULT)]
        if not isinstance(presets[0], str):
            raise ConfigError(f"{request.config_file}: preset={presets[0]!r} must be a name in quotes.")
        from_file = list(_flat_settings(values))
    runs = []
    for name, point in itertools.product(presets or (DEFAULT,), _grid(request.sweeps)):
        given = [*request.settings, *options, *point]
        settings = [*from_file, *given]
        hook = next((one.partition("=")[2] for one in reversed(settings) if one.startswith("data.hook=")), "none")
        d_model = store.d_model(store.hook(None if hook == "none" else hook))
        config = with_settings(preset(name, d_model), settings)
        temporal_term(config.temporal.kind)
        if config.sae.d_model != d_model:
            raise ConfigError(
                f"sae.d_model={config.sae.d_model}: the store's activations are {d_model} wide. Leave it out."
            )
        first = ("none", store.hook(None))
        named = [one for one in given if not (one.startswith("data.hook=") and one.partition("=")[2] in first)]
        label = run_name(base or name, named) + (f"-from-{request.init_from}" if request.init_from else "")
        runs.append(Run(label, name, config, request.init_from))
    return runs


def _checked_options(request: Request) -> list[str]:
    """The options' settings. Raises ConfigError where one was also given as a setting: neither is a default."""
    given = {one.partition("=")[0].strip(): f"--set {one}" for one in request.settings}
    given |= {one.partition("=")[0].strip(): f"--sweep {one}" for one in request.sweeps}
    options = {key: value for key, value in request.options.items() if value is not None}
    for key, value in options.items():
        if key in given:
            option = f"--{key.rpartition('.')[2]}"
            raise ConfigError(f"{option} {value} and {given[key]} are the same setting. Give it once.")
    return [f"{key}={value}" for key, value in options.items()]


def check_run_name(option: str, name: str | None) -> None:
    """Raises ConfigError for what is no name of a run below --runs but a path."""
    if name is not None and (name in ("", ".", "..") or any(sign in name for sign in "/\\\0")):
        raise ConfigError(f"{option} {name!r}: takes the name of a run below --runs, not a path.")


def run_name(base: str, settings: Sequence[str]) -> str:
    """The preset's (or file's) name and what was set beyond it: topk-d_sae1024-k16, topk-4.hook_mlp_out."""
    named = [one for one in settings if not one.startswith(UNNAMED) and one != "data.seed=0"]
    parts = [
        value.removeprefix("blocks.") if key == "data.hook" else key.rpartition(".")[2] + value
        for key, _, value in (one.partition("=") for one in named)
    ]
    return re.sub(r"[^\w.,=+-]", "_", "-".join([base, *parts]))


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings from a TOML file: a `preset` and any of its settings, nested as tables. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path} ({error.strerror}). Give --config a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from error


def _flat_settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat_settings(value, f"{prefix}{key}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}={text}"


def _grid(sweeps: Sequence[str]) -> Iterator[tuple[str, ...]]:
    axes = []
    for sweep in sweeps:
        key, sign, values = sweep.partition("=")
        if not sign or not values:
            raise ConfigError(f"--sweep {sweep!r} has no values. Write key=v1,v2, for example sae.k=16,32.")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return itertools.product(*axes)
