"""The commands' lines in `tcsae --help`, and the titles of their options. Options that no title names come last."""

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
            "--chat-template",
            "--messages-field",
            "--roles",
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
        "What to train": [
            "--preset",
            "--set",
            "--sweep",
            "--config",
            "--steps",
            "--seed",
            "--positions",
            "--init-from",
        ],
        "How": ["--device", "--precision", "--compile", "--tracker", "--dry-run", "--fresh"],
    },
    "eval": {
        "What to score": [
            "--run",
            "--documents",
            "--positions",
            "--skip-first",
            "--ce-tokens",
            "--smooth",
            "--baselines",
            "--temporal",
            "--splice",
        ],
        "What to print": ["--details", "--compare", "--with", "--json"],
        "How": ["--device", "--precision", "--force"],
    },
    "compare": {
        "What to compare": ["--run", "--with"],
        "What to print": ["--details", "--json"],
    },
    "paper": {
        "What to run": ["--only", "--quick", "--model", "--dataset", "--tokens"],
        "Folders": ["--work", "--out"],
        "How": ["--device"],
    },
    "probe": {
        "What to probe": ["--run", "--labels", "--quick", "--null", "--null-runs"],
        "What to print": ["--details", "--json"],
    },
    "latents": {
        "What to measure": [
            "--run",
            "--part",
            "--latents",
            "--sample",
            "--widest",
            "--tokens",
            "--tail-tokens",
            "--quick",
        ],
        "What to print": ["--details", "--json"],
        "How": ["--force"],
    },
    "stability": {
        "What to compare": ["--run"],
        "What to print": ["--pairs", "--json"],
    },
    "synthetic": {
        "What to plant": ["--size", "--tokens", "--seed", "--still", "--set", "--list"],
        "How": ["--fresh"],
    },
    "planted": {
        "What to run": ["--quick"],
        "Folders": ["--work", "--out"],
    },
    "methods": {
        "What to run": ["--quick", "--model", "--dataset", "--tokens"],
        "Folders": ["--work", "--out"],
        "How": ["--device"],
    },
    "real-lm": {
        "What to run": ["--quick", "--model", "--layer", "--dataset", "--tokens"],
        "Folders": ["--work", "--out"],
    },
}

LINES = {
    "harvest": "Run a language model over text, store its activations",
    "import": "Make a store of what another program saved",
    "train": "Train sparse autoencoders from the store",
    "eval": "Score them on the eval split, without the language model",
    "probe": "Probe latents with labels that text and corpus give",
    "latents": "Measure latents: use, redundancy, what text says",
    "compare": "Compare a run with others on the same documents",
    "stability": "See what runs' decoders repeat, and what they share",
    "report": "Write pages with results and every feature",
    "feature": "Show one feature in the terminal",
    "convert": "Make another kind of SAE of a trained one",
    "serve": "Browse the report live, with the language model",
    "presets": "List the presets of train",
    "inspect": "Show what the store and the runs hold",
    "verify": "Check every byte of the store",
    "copy": "Copy the store to another place or codec",
    "export": "Write an SAE in another library's format",
    "push": "Put SAEs or the store on the Hugging Face Hub",
    "pull": "Bring SAEs or a store from the Hugging Face Hub",
    "paper": "Reproduce the paper and test its claim",
    "methods": "Train every temporal method, print one table",
    "real-lm": "Choose the default preset on a real language model",
    "synthetic": "Plant known features in a store, to see what is found",
    "planted": "See which planted features are recovered, by whom",
    "completion": "Print the completion script of a shell",
}
"""At most 57 characters: a line of 80 columns holds them whole."""
