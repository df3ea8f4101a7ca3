"""A store of hostile text, runs of several kinds and their evaluations, all made by the command line: what tests of
the report share. No test itself; loaded by path, as nothing below tests/ is a package.
"""

import json
import random
import shutil
from pathlib import Path

from click.testing import CliRunner, Result

from tcsae.shared.commands.group import cli

HOSTILE = "</script><script>hacked=1</script><img/> \u2028 \u202eab\x1b[31m \t é שלום"
ODD_NAME = "<img src=x onerror=hack()> #1 100%"
"""A run's folder may be called anything that a folder can be."""
LATENTS = 64
"""Of the paper's logged runs, in place of 512: their codes are dense, and each latent has a page of contexts."""
SMALL = ("--set", "sae.d_sae=48", "--set", "sae.k=4", "--set", "data.n_segments=4", "--set", "data.segment_length=16")


def write_corpus(path: Path) -> Path:
    """80 documents of words, each with the hostile text in it."""
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "model",
        "stream",
        "reads",
        "writes",
        "each",
        "token",
        "of",
        "one",
        "sequence",
        "and",
        "window",
    ]
    texts = [" ".join([HOSTILE, *rng.choices(words, k=rng.randint(20, 40)), str(i)]) for i in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def call(place: Path, *arguments: str) -> Result:
    """`tcsae` on the store and the runs below `place`."""
    return CliRunner().invoke(cli, ["--store", str(place / "a.zarr"), "--runs", str(place / "runs"), *arguments])


def make(place: Path, model: Path) -> Path:
    """Harvest, train and evaluate below `place`; one run is unfinished, one was never trained, one has an odd name."""
    corpus = write_corpus(place / "corpus.jsonl")
    source = ("--model", str(model), "--dataset", str(corpus), "--hook", "blocks.2.hook_resid_post")
    steps = [
        ("harvest", *source, "--tokens", "8K", "--sequence-length", "64", "--eval-every", "3"),
        (
            "train",
            "--preset",
            "topk",
            "--preset",
            "temporal-matryoshka",
            "--steps",
            "60",
            "--set",
            "log_every=5",
            *SMALL,
        ),
        ("train", "--preset", "logged-run2", "--preset", "logged-run4", "--set", f"sae.d_sae={LATENTS}"),
        ("train", "--preset", "relu-l1", "--steps", "0", *SMALL[:2]),
    ]
    for arguments in steps:
        done = call(place, *arguments)
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    runs = place / "runs"
    names = {path.name for path in runs.iterdir() if path.is_dir()}
    shutil.copytree(runs / next(name for name in names if name.startswith("topk")), runs / ODD_NAME)
    unfinished = runs / "unfinished"
    unfinished.mkdir()
    done = call(place, "eval")
    assert "0 optimiser steps" in done.stderr
    done = call(place, "eval", "--run", f"logged-run4-d_sae{LATENTS}", "--no-temporal", "--force")
    assert done.exit_code == 0, done.output
    return place
