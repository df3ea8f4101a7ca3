"""How much variance SAELens', dictionary_learning's and our TopK and BatchTopK explain after the same tokens.

    peers/bin/python tests/bench/peers_train.py --store data/activations.zarr --runs /tmp/peers-train

(the environment: see peers.py beside this file). Each peer trains with its own trainer, on batches of 4096 single
tokens from the store's train split, shuffled by our loader, and is scored as its own library saves and loads it. Once
with its defaults as they are; then scaled as its authors recommend, with a warm-up of a twentieth and a decay over the
last fifth, at several learning rates: the best of these counts. Ours are the presets, trained on no more tokens.
The score: centred explained variance of the eval split from position 1 on. BatchTopK infers with a threshold, and so at
another L0 than k: the last column, which is compared, has the score with the threshold moved until L0 is k. What is
done is kept below --runs, so that an interrupted comparison goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from alternate import one_core, report
from peers import Shape, dictionary_settings, eval_tokens, our_runs, quiet, saelens_trainer, versions
from torch import Tensor

from tcsae.shared.base.files import write_json
from tcsae.shared.sae.folder import load_record, load_sae
from tcsae.shared.store.reader import Store, open_store
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader, iterate_tokens
from tcsae.train.run import train_runs

ACTIVATIONS = ("topk", "batchtopk")
BATCH = 4096
RATES = (4e-3, 8e-3, 1.6e-2)


@torch.no_grad()
def explained(sae: Any, x: Tensor) -> tuple[float, float]:
    """Centred explained variance, pooled over tokens in float64 (as `tcsae eval` has it), and L0."""
    error = active = 0.0
    for part in x.split(BATCH):
        code = sae.encode(part)
        error += float((part.double() - sae.decode(code).double()).square().sum())
        active += float((code > 0).sum())
    total = float((x.double() - x.double().mean(0)).square().sum())
    return 1 - error / total, active / len(x)


def score(sae: Any, activation: str, k: int, x: Tensor) -> dict[str, float]:
    """As the library infers; and, for BatchTopK, with the threshold moved until L0 is k."""
    variance, l0 = explained(sae, x)
    result = {"explained_variance": variance, "l0": l0, "at_k": variance}
    if activation == "batchtopk":
        some, low, high = x[:: max(1, len(x) // 8192)], 0.0, 10 * float(x.norm(dim=1).mean())
        for _ in range(24):
            sae.threshold.data.fill_((low + high) / 2)
            more = explained(sae, some)[1] > k
            low, high = ((low + high) / 2, high) if more else (low, (low + high) / 2)
        result["at_k"] = explained(sae, x)[0]
    return result


def train_saelens(store: Store, activation: str, shape: Shape, n_steps: int, lr: float | None) -> Any:
    """By SAETrainer.fit; None: its default learning rate, constant, inputs as they are."""
    from sae_lens import SAE

    settings: dict[str, Any] = {"total_training_samples": n_steps * BATCH, "train_batch_size_samples": BATCH}
    if lr is None:
        settings |= {"lr_end": 3e-5}
    else:
        settings |= {"lr": lr, "lr_end": lr / 10, "lr_warm_up_steps": n_steps // 20, "lr_decay_steps": n_steps // 5}
    normalize = "none" if lr is None else "expected_average_only_in"
    torch.manual_seed(0)
    data = iterate_tokens(store, batch_tokens=BATCH)
    with quiet():
        sae = saelens_trainer(activation, shape, data, normalize=normalize, **settings).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def train_dictionary_learning(store: Store, activation: str, shape: Shape, n_steps: int, lr: float | None) -> Any:
    """By trainSAE, which scales inputs; None: its learning rate for this width, its warm-up of 1000 steps, no decay."""
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    own = {} if lr is None else {"lr": lr, "warmup_steps": n_steps // 20, "decay_start": n_steps * 4 // 5}
    if n_steps <= 1000:  # a trial run: the thresholds start at step 1000
        own |= {"warmup_steps": n_steps // 20, "threshold_start_step": n_steps // 2}
    config = dictionary_settings(activation, shape, steps=n_steps, seed=0, **own)
    data = iterate_tokens(store, batch_tokens=BATCH)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainSAE(data, [config], n_steps, save_dir=folder, normalize_activations=True, device="cpu")
        dictionary, _ = load_dictionary(f"{folder}/trainer_0", device="cpu")
    return dictionary


PEERS = {"SAELens": train_saelens, "dictionary_learning": train_dictionary_learning}


def ours(store: Store, runs: Path, shape: Shape, n_tokens: int) -> dict[str, Any]:
    """Our presets, trained on at most `n_tokens`."""
    loader = SegmentLoader(store, DataConfig())
    per_step = loader.n_tokens / loader.n_segments * loader.config.n_segments
    settings = [f"sae.d_sae={shape.d_sae}", f"sae.k={shape.k}", f"steps={int(n_tokens / per_step)}"]
    train_runs(store, runs, our_runs(store, ACTIVATIONS, settings))
    return {name: load_sae(runs / name) for name in ACTIVATIONS}


def compare(store: Store, asked: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """One row for each training, ours first."""
    x = eval_tokens(store, asked.eval_tokens, skip_first=1)
    rows = []
    for activation, sae in ours(store, asked.runs, shape, asked.tokens).items():
        n_tokens = load_record(asked.runs / activation)["tokens"]
        rows.append({"library": "tcsae", "activation": activation, "lr": None, "tokens": n_tokens})
        rows[-1] |= score(sae, activation, shape.k, x)
        show(rows[-1])
    n_steps = asked.tokens // BATCH
    for library in asked.libraries:
        train = PEERS[library]
        for activation in ACTIVATIONS:
            for lr in (None, *asked.rates):
                kept = asked.runs / f"{library}-{activation}-{lr}-{n_steps}.json"
                row = {"library": library, "activation": activation, "lr": lr, "tokens": n_steps * BATCH}
                if not kept.exists():
                    write_json(kept, row | score(train(store, activation, shape, n_steps, lr), activation, shape.k, x))
                rows.append(json.loads(kept.read_text()))
                show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    lr = "default" if row["lr"] is None else f"{row['lr']:g}"
    figures = "{tokens:10,d} {explained_variance:8.4f} {l0:7.2f} {at_k:8.4f}".format(**row)
    print(f"{row['library']:20s} {row['activation']:10s} {lr:>8s} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=5_000_000, help="Token visits of each training, at most.")
    parser.add_argument("--eval-tokens", type=int, default=10**9)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Peak learning rates of the peers.")
    parser.add_argument("--libraries", nargs="+", choices=list(PEERS), default=list(PEERS))
    asked = parser.parse_args()
    one_core()
    store = open_store(asked.store)
    shape = Shape(store.d_model(store.hook()), 1024, 16)
    print(f"{'library':20s} {'trainer':10s} {'lr':>8s} {'tokens':>10s} {'EV':>8s} {'L0':>7s} {'EV at k':>8s}")
    rows = compare(store, asked, shape)
    best = {
        f"{library} {activation}": max(
            row["at_k"] for row in rows if (row["library"], row["activation"]) == (library, activation)
        )
        for library in ("tcsae", *asked.libraries)
        for activation in ACTIVATIONS
    }
    print("best at k: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    report("peers_train", shape=shape._asdict(), best=best, rows=rows, versions=versions())


if __name__ == "__main__":
    main()
