"""Every stage on a GPU: the same as on the CPU, and how fast, into docs/results/gpu.md.

    python tests/gpu/run.py [--device cuda] [--tiny] [--out docs/results/gpu.md]

`make gpu` runs it; where no GPU is it says so in one line and ends well. Under 10 minutes: each figure is measured for
SECONDS. With --device cpu --tiny the same code runs on the CPU at sizes that mean nothing, which tests this file.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import figures  # the folder is no package
import parity


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} of {platform.machine()}: sizes and figures mean nothing"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"


def table(columns: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(figures.number(cell) for cell in line)} |" for line in lines)


def page(device: torch.device, size: figures.Sizes, folder: Path) -> tuple[str, bool]:
    """The page, and whether all is the same as on the CPU."""
    sections: list[tuple[str, tuple[str, ...], Callable[[], list[tuple]]]] = [
        ("Same as on the CPU", parity.COLUMNS, lambda: parity.rows(device, size, folder)),
        ("The device's limits", ("what", "measured"), lambda: figures.limits(device, size)),
        ("Harvest", figures.HARVEST, lambda: figures.harvest(device, size, folder)),
        ("Training step", figures.STEP, lambda: figures.steps(device, size)),
        ("Loader", figures.LOADER, lambda: figures.loader(device, size, folder)),
        ("Evaluation", figures.EVAL, lambda: figures.evaluation(device, size, folder)),
    ]
    text = [f"# On a GPU\n\n{machine(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}.\n"]
    same = True
    for title, columns, rows in sections:
        print(title, flush=True)
        result = rows()
        if columns is parity.COLUMNS:
            same = all(row[-1] == "yes" for row in result)
        text.append(f"## {title}\n\n{table(columns, result)}\n")
    text.append(f"## What the columns are\n\n{figures.ABOUT}\n")
    return "\n".join(text), same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "results" / "gpu.md")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No GPU here: nothing was run. docs/results/gpu.md says what was run where.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        text, same = page(device, figures.TINY if arguments.tiny else figures.FULL, Path(folder))
    arguments.out.write_text(text)
    print(f"Written: {arguments.out}. {'All' if same else 'NOT all'} is the same as on the CPU.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
