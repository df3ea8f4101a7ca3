"""Promise: `make gpu` runs as far as that can be shown without one, and docs/results/gpu.md says whether it was run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RUN = [sys.executable, str(ROOT / "tests" / "gpu" / "run.py")]


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line_and_no_failure():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(RUN, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("No GPU here: nothing was run.")


def test_the_page_says_whether_it_was_run():
    first = (ROOT / "docs" / "results" / "gpu.md").read_text().splitlines()[0]
    assert first.startswith(("Not yet run on a GPU.", "# On a GPU"))


@pytest.mark.slow
def test_the_same_code_writes_the_page_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.md"
    command = [*RUN, "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert "| NO |" not in text and text.count("\n## ") == 7
