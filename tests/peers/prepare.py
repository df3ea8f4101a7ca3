"""A small store, runs of four kinds, their exports in every form, and what we make of them: for tests/peers/look.py."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner

from tcsae.shared.commands.group import cli
from tcsae.shared.sae.folder import load_sae
from tcsae.shared.store.reader import open_store

RUNS = {"topk": "topk", "relu": "relu-l1", "batchtopk": "batchtopk", "jumprelu": "jumprelu"}
FORMS = {
    "topk": ("saelens", "dictionary_learning", "sparsify", "neuronpedia", "delphi"),
    "relu": ("saelens", "dictionary_learning", "sparsify"),
    "batchtopk": ("saelens", "dictionary_learning"),
    "jumprelu": ("saelens", "dictionary_learning"),
}
N_SEQUENCES = 16


def tcsae(folder: Path, *arguments: str) -> None:
    place = ("--store", str(folder / "a.zarr"), "--runs", str(folder / "runs"))
    done = CliRunner().invoke(cli, [*place, *arguments])
    if done.exit_code:
        sys.exit(f"tcsae {' '.join(arguments)}: {done.output} {done.exception!r}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "a.zarr").exists():
        tcsae(folder, "harvest", "--tokens", "60K")
    small = ("--steps", "200", "--set", "sae.d_sae=256", "--set", "sae.k=16")
    result = {}
    for name, preset in RUNS.items():
        if not list(folder.glob(f"runs/{preset}-*")):
            tcsae(folder, "train", "--preset", preset, *small, "eval")
        (path,) = folder.glob(f"runs/{preset}-*")
        result[name] = path
        for form in FORMS[name]:
            tcsae(folder, "export", "--to", form, "--run", path.name, "--out", str(folder / "exports" / form / name))
    store = open_store(folder / "a.zarr")
    split, hook = store.eval, store.hook()
    full = np.flatnonzero(split.lengths == store.sequence_length)[:N_SEQUENCES]
    x = np.concatenate([split.read(hook, int(i), int(i) + 1)[0, 1:] for i in full])
    arrays = {"x": x, "tokens": split.tokens[full]}
    for name, path in result.items():
        sae = load_sae(path)
        with torch.no_grad():
            code = sae.encode(torch.from_numpy(x))
            arrays |= {f"{name}.code": code.numpy(), f"{name}.x_hat": sae.decode(code, torch.from_numpy(x)).numpy()}
    np.savez(folder / "expected.npz", **arrays)
    about = {"hook": hook, "runs": {name: str(path) for name, path in result.items()}}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
