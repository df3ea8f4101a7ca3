"""Titles of the options on each command's help page. Options that no title names come last."""

from collections.abc import Mapping, Sequence

GROUPS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "harvest": {
        "Model": ["--model", "--revision", "--trust-remote-code", "--hook", "--prepend-bos", "--control"],
        "Text": [
            "--dataset",
            "--dataset-revision",
            "--dataset-config",
            "--split",
            "--text-field",
            "--tokens-field",
            "--tokens",
            "--sequences",
            "--sequence-length",
            "--min-length",
            "--eval-every",
            "--seed",
            "--exact",
        ],
        "Storage": ["--codec", "--codec-error", "--fresh", "--force", "--dry-run"],
        "Machine": ["--device", "--lm-dtype", "--batch-size"],
    },
    "train": {
        "What to train": ["--preset", "--set", "--sweep", "--config", "--steps", "--seed", "--init-from"],
        "How": ["--device", "--tracker", "--dry-run", "--fresh"],
    },
    "eval": {
        "What to score": ["--run", "--smooth", "--baselines", "--temporal", "--skip-first", "--splice"],
        "What to print": ["--details", "--compare", "--with", "--json"],
        "How": ["--force"],
    },
    "compare": {
        "What to compare": ["--run", "--with"],
        "What to print": ["--details", "--json"],
    },
    "paper": {
        "What to run": ["--only", "--quick", "--model", "--dataset", "--tokens"],
        "Folders": ["--work", "--out"],
    },
}
