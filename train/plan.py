"""From what was asked on the command line to the runs to train."""

from collections.abc import Sequence
from typing import NamedTuple

from tcsae.shared.config import with_settings
from tcsae.shared.store import Store
from tcsae.train.config import TrainConfig
from tcsae.train.presets import DEFAULT, preset

UNNAMED = ("steps", "data.seed=0")
"""Settings that a run's name leaves out."""


class Run(NamedTuple):
    """One SAE to train, and the folder name it gets."""

    name: str
    preset: str
    config: TrainConfig
    init_from: str | None = None
    """Name of the run whose weights it starts from."""


def plan_runs(store: Store, presets: Sequence[str], settings: Sequence[str]) -> list[Run]:
    """One run for each preset (the recommended one without any), with the settings applied.

    Raises ConfigError for an unknown preset or setting, with the nearest name, and StoreError for an unknown hook.
    """
    runs = []
    for name in presets or (DEFAULT,):
        hook = next((one.partition("=")[2] for one in settings if one.startswith("data.hook=")), None)
        config = with_settings(preset(name, store.d_model(store.hook(hook))), settings)
        runs.append(Run(run_name(name, settings), name, config))
    return runs


def run_name(preset_name: str, settings: Sequence[str]) -> str:
    """The preset's name and what was set beyond it: topk-d_sae1024-k16."""
    named = [one for one in settings if not one.startswith(UNNAMED)]
    parts = [key.rpartition(".")[2] + value for key, _, value in (one.partition("=") for one in named)]
    return "-".join([preset_name, *parts]).replace("/", "_")
