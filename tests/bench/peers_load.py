"""Do SAELens and dictionary_learning make of our SAEs what we make of them? On activations of a store.

    peers/bin/python tests/bench/peers_load.py --store data/activations.zarr --runs /tmp/peers-runs

(the environment: see peers.py beside this file). Trains one small SAE of each kind below --runs unless it is there,
loads its folder with `sae_lens.SAE.load_from_disk` and its export with `dictionary_learning.utils.load_dictionary`,
and compares codes and reconstructions on the eval split. Differences are relative to the root mean square of the
activations. Where a pre-activation lies within that tolerance of the threshold, or of another one at the edge of a
top-k, rounding decides who fires: such tokens are counted as ties, every other difference counts. Exit code 1 if any
exceeds the tolerance.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from alternate import report
from peers import eval_tokens, our_runs, versions
from torch import Tensor

from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.export import export_run
from tcsae.shared.sae.folder import load_sae
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.store.reader import open_store
from tcsae.train.run import train_runs

PRESETS = ("relu-l1", "topk", "jumprelu", "batchtopk")
WITHOUT_FORM = ("written-run3", "written-run4")
TOLERANCE = 1e-5


class Loaded(NamedTuple):
    """What the other library read: its class, and its own encode and decode."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def from_saelens(path: Path) -> Loaded:
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    rescales = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    if rescales:
        raise SystemExit(f"{path}: SAELens reads rescale_acts_by_decoder_norm as {rescales}.")
    return Loaded(f"SAELens {type(sae).__name__}", sae.encode, sae.decode)


def from_dictionary_learning(path: Path) -> Loaded:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(export_run(path, "dictionary_learning")), device="cpu")
    return Loaded(f"dictionary_learning {type(dictionary).__name__}", dictionary.encode, dictionary.decode)


@torch.no_grad()
def compare(sae: SparseAutoencoder, theirs: Loaded, x: Tensor) -> dict[str, Any]:
    """Largest differences over the scale of x, apart from ties; how many ties, and how far from the edge the worst."""
    scale = float(x.double().square().mean().sqrt())
    code, x_hat = sae.encode(x), sae(x)
    their_code = theirs.encode(x)
    their_x_hat = theirs.decode(their_code)
    differs = (code > 0) != (their_code > 0)
    tied = torch.zeros(len(x), dtype=torch.bool)
    worst = 0.0
    if sae.config.activation != "relu":  # a relu is continuous: who fires does not matter
        tied = differs.any(1)
        worst = float(_distance_from_edge(sae, x[tied], differs[tied]).max()) / scale if tied.any() else 0.0
    return {
        "code": float((code - their_code)[~tied].abs().max()) / scale,
        "reconstruction": float((x_hat - their_x_hat)[~tied].abs().max()) / scale,
        "ties": int(tied.sum()),
        "worst_tie": worst,
        "l0": float((code > 0).sum(1).double().mean()),
    }


def _distance_from_edge(sae: SparseAutoencoder, x: Tensor, differs: Tensor) -> Tensor:
    """[n_tied]: how far apart what fires on one side only is from the threshold, or from each other in a top-k."""
    pre = sae.pre_activations(x)
    if sae.config.activation == "topk":
        highest = pre.masked_fill(~differs, -torch.inf).amax(1)
        return highest - pre.masked_fill(~differs, torch.inf).amin(1)
    return (pre - sae.threshold).abs().masked_fill(~differs, 0).amax(1)


def is_refused(path: Path, load: Callable[[Path], Loaded]) -> str:
    """What the library, or our export, says about an SAE that has no form there; "" if it loads."""
    try:
        load(path)
    except (RunError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=20_000, help="Eval tokens compared.")
    asked = parser.parse_args()
    store = open_store(asked.store)
    runs = our_runs(store, PRESETS, ["sae.d_sae=1024", "sae.k=16", f"steps={asked.steps}"])
    refused = our_runs(store, WITHOUT_FORM, ["steps=2"])
    train_runs(store, asked.runs, runs + refused)
    x = eval_tokens(store, asked.tokens, skip_first=0)

    rows, good = {}, True
    print(f"{'run':24s} {'read as':38s} {'code':>9s} {'reconstr.':>9s} {'ties':>5s} {'worst tie':>9s} {'L0':>7s}")
    for run in runs:
        for load in (from_saelens, from_dictionary_learning):
            path = asked.runs / run.name
            theirs = load(path)
            result = compare(load_sae(path), theirs, x)
            good &= max(result["code"], result["reconstruction"], result["worst_tie"]) <= TOLERANCE
            rows[f"{run.name}, {theirs.name}"] = result
            figures = "{code:9.1e} {reconstruction:9.1e} {ties:5d} {worst_tie:9.1e} {l0:7.1f}".format(**result)
            print(f"{run.name:24s} {theirs.name:38s} {figures}")
    for run in refused:
        for load in (from_saelens, from_dictionary_learning):
            said = is_refused(asked.runs / run.name, load)
            good &= bool(said)
            print(f"{run.name:24s} {said or 'LOADED, though it has no form there'}")
    print("all within" if good else "NOT all within", TOLERANCE)
    report("peers_load", n_tokens=len(x), tolerance=TOLERANCE, good=good, figures=rows, versions=versions())
    sys.exit(not good)


if __name__ == "__main__":
    main()
