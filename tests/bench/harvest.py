"""Tokens a second from a language model to a sealed store, against the bare forward pass.

    python tests/bench/harvest.py [--rounds 5] [--sequences 128]

One core. Pythia-70m's exact shape with random weights, random token ids, whole sequences of 128, the output of block 4.
Ours is phase 2 and the seal; the first yardstick is the plain Hugging Face model cut after the hook, nothing written.
The bars: at least 0.92 of its speed (0.97 hoped for), and 2.6 times that of a full forward pass with logits.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from alternate import alternate, one_core, report
from peers_harvest import BATCH, LENGTH, N_BLOCKS, VOCABULARY, Contestant, bare, ours, save_model

from tcsae.harvest import capture
from tcsae.harvest.language_model import find_model, load_plain


def full(model: Path, tokens: np.ndarray) -> Contestant:
    """All blocks and the logits."""
    plain = load_plain(find_model(str(model)))
    ids = torch.from_numpy(tokens).long()

    def run(_: Path) -> torch.Tensor:
        with torch.inference_mode():
            for part in ids.split(BATCH):
                logits = plain(input_ids=part, use_cache=False).logits
            return logits

    return run


def through_bridge(model: Path, tokens: np.ndarray) -> Contestant:
    """Ours where a hook lies inside a module, so that TransformerLens' bridge has to run."""
    places, capture.module_places = capture.module_places, lambda *_: None
    try:
        return ours(model, tokens)
    finally:
        capture.module_places = places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=256)
    asked = parser.parse_args()
    one_core()
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (asked.sequences, LENGTH))
    with tempfile.TemporaryDirectory() as temporary:
        model = save_model(Path(temporary) / "model")
        contestants = {
            f"bare forward, {N_BLOCKS} blocks": bare(model, tokens),
            "harvest": ours(model, tokens),
            "harvest, bridge": through_bridge(model, tokens),
            "full forward": full(model, tokens),
        }
        numbers = itertools.count()

        def timed(run: Contestant) -> Callable[[], int]:
            def once() -> int:
                folder = Path(temporary) / f"out-{next(numbers)}"
                folder.mkdir()
                run(folder)
                shutil.rmtree(folder)
                return tokens.size

            return once

        times = alternate({name: timed(run) for name, run in contestants.items()}, asked.rounds)
    base = next(iter(contestants))
    times.show("token", base)
    share, faster = times.ratio(base, "harvest"), times.ratio("full forward", "harvest")
    print(f"harvest: {share} of the bare forward's speed (bar 0.92), {faster} times a full forward's (bar 2.6)")
    report("harvest", times, base, n_tokens=tokens.size, share=share._asdict(), of_full=faster._asdict())


if __name__ == "__main__":
    main()
