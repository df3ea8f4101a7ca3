"""Settings of a contrastive kind's pairs for short segments, for tests that go through all presets."""

from collections.abc import Sequence

from tcsae.train.presets import preset
from tcsae.train.settings.temporal_settings import CONTRASTIVE


def pair_settings(name: str, settings: Sequence[str] = (), **values: int) -> list[str]:
    """Those of `temporal.contrast.*` that the preset's kind reads, or the settings': the others are refused."""
    kinds = [one.partition("=")[2] for one in settings if one.startswith("temporal.kind=")]
    read = CONTRASTIVE.get((kinds or [preset(name, 8).temporal.kind])[-1], ())
    return [f"temporal.contrast.{key}={value}" for key, value in values.items() if key in read]
