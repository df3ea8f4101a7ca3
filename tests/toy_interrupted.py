"""Runs that are interrupted between checkpoints, and started again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import Result

from tcsae.train.trainer import Trainer


@contextmanager
def stopping_at(n_steps: int, monkeypatch, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Within, `error` is raised where a run would take the step after `n_steps`."""
    step = Trainer.step

    def stopped(trainer, batch):
        if trainer.progress.n_steps == n_steps:
            raise error
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        yield


def check_goes_on(preset: str, settings: list[str], train: Callable[..., Result], folder: Path, monkeypatch) -> None:
    """Train `preset` by `train(runs, *arguments)`, whole and interrupted at step 8 of 12; started again beside topk, it
    ends with the same bytes.
    """
    chosen = [f"--set={one}" for one in (*settings, "steps=12", "guard.checkpoint_steps=5")]
    assert train(folder / "whole", f"--preset={preset}", *chosen).exit_code == 0
    with stopping_at(8, monkeypatch):
        assert train(folder / "killed", f"--preset={preset}", *chosen).exit_code != 0
    again = train(folder / "killed", f"--preset={preset}", "--preset=topk", *chosen)
    assert again.exit_code == 0, again.output
    files = [next((folder / name).glob(f"{preset}-*/*.safetensors")).read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
