"""A training step against the matrix products it cannot do without.

    python tests/bench/step.py [--d-sae 4096] [--rounds 5] [--malloc]

One core, float32, batches of 4096 tokens in segments of 16, d_model 512, k = 32. A step is all of it: forward and
backward pass, clipping, schedule, fused Adam, unit decoder, dead latents. Bases: one encoder matmul + torch.topk
for the sparse activations, the five dense matmuls for the others. --malloc tunes glibc for both sides.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from alternate import alternate, one_core, report, tune_malloc
from torch.nn import functional as F

from tcsae.shared.base.settings import with_settings
from tcsae.train.batch import Batch
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

N, D_MODEL, K, LENGTH = 4096, 512, 32, 16


def batches(n_batches: int = 4, length: int = LENGTH) -> list[Batch]:
    """Sparse mixtures with slow factors, as a language model's activations have structure."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(2048, D_MODEL, generator=generator), dim=1)
    result = []
    for _ in range(n_batches):
        code = torch.zeros(N, 2048)
        code.scatter_(
            1, torch.randint(0, 2048, (N, 24), generator=generator), torch.rand(N, 24, generator=generator) * 2
        )
        x = code @ directions + 0.02 * torch.randn(N, D_MODEL, generator=generator)
        n_segments = N // length
        result.append(
            Batch(x, np.full(n_segments, length), np.zeros(n_segments, np.int64), np.arange(n_segments, dtype=np.int64))
        )
    return result


def ours(name: str, data: list[Batch], *settings: str) -> tuple[Callable[[], int], Trainer]:
    """A step of a preset's trainer, in the middle of a long run."""
    config = with_settings(
        preset(name, D_MODEL), [f"sae.k={K}", "steps=1M", f"data.segment_length={data[0].lengths[0]}", *settings]
    )
    window = config.sae.window
    trainer = Trainer(config, data[0].x if window == 1 else data[0].windows(window, 0).x)
    state = {"i": 0}

    def step() -> int:
        state["i"] += 1
        trainer.step(data[state["i"] % len(data)])
        return N

    return step, trainer


def bare(data: list[Batch], d_sae: int) -> dict[str, Callable[[], int]]:
    """What no implementation can do without."""
    x = data[0].x
    W_enc, W_dec = torch.randn(d_sae, D_MODEL) / D_MODEL**0.5, torch.randn(d_sae, D_MODEL)
    bias, code, other = torch.zeros(d_sae), torch.empty(N, d_sae), torch.empty(N, d_sae)
    out, grad_a, grad_b = torch.empty(N, D_MODEL), torch.empty(d_sae, D_MODEL), torch.empty(d_sae, D_MODEL)

    def encoder_topk() -> int:
        torch.addmm(bias, x, W_enc.T, out=code)
        code.topk(K, dim=-1, sorted=False)
        return N

    def five_matmuls() -> int:
        torch.mm(x, W_enc.T, out=code)
        torch.mm(code, W_dec, out=out)
        torch.mm(code.T, out, out=grad_a)
        torch.mm(out, W_dec.T, out=other)
        torch.mm(other.T, x, out=grad_b)
        return N

    return {"encoder matmul + topk": encoder_topk, "five matmuls": five_matmuls}


def bare_windows(x: torch.Tensor, d_sae: int, window: int) -> Callable[[], int]:
    """A crosscoder's own products, on windows side by side: encoder matmul and topk; by torch's sparse kernels, of a
    given code, the reconstruction, the gradients of its entries and of both weights."""
    windows = x[: N // window * window].view(-1, window * D_MODEL)
    n, k = len(windows), window * K
    W_enc, bias = torch.randn(d_sae, window * D_MODEL) / D_MODEL**0.5, torch.zeros(d_sae)
    W_dec, pre = torch.randn(d_sae, window * D_MODEL), torch.empty(n, d_sae)
    latents = torch.rand(n, d_sae).topk(k, dim=-1).indices.sort(-1).values
    values, offsets = torch.rand(n * k), torch.arange(0, n * k + 1, k)
    code = torch.sparse_csr_tensor(offsets, latents.flatten(), values, size=(n, d_sae))
    by_latent, zeros = code.to_dense().T.to_sparse_csr(), torch.zeros(d_sae, window * D_MODEL)
    at_entries = torch.sparse_csr_tensor(offsets, latents.flatten(), torch.zeros_like(values), size=(n, d_sae))

    def products() -> int:
        torch.addmm(bias, windows, W_enc.T, out=pre)
        pre.topk(k, dim=-1, sorted=False)
        x_hat = F.embedding_bag(latents, W_dec, per_sample_weights=values.view(n, k), mode="sum")
        torch.sparse.sampled_addmm(at_entries, x_hat, W_dec.T, beta=0.0)
        torch.addmm(zeros, by_latent, x_hat)
        torch.addmm(zeros, by_latent, windows)
        return N

    return products


def bare_attention(x: torch.Tensor, d_sae: int) -> Callable[[], int]:
    """The matrix products of temporal feature analysis, one layer: two encodings, four projections and two decodings,
    each with two more of its size in the backward pass; the attention itself is left out."""
    D, square = torch.randn(d_sae, D_MODEL), torch.randn(d_sae, d_sae)
    code, out, wide = torch.empty(N, d_sae), torch.empty(N, D_MODEL), torch.empty(N, d_sae)

    def matmuls() -> int:
        for _ in range(3):
            for _ in range(2):
                torch.mm(x, D.T, out=code)
                torch.mm(code, D, out=out)
            for _ in range(4):
                torch.mm(code, square, out=wide)
        return N

    return matmuls


def bare_states(x: torch.Tensor, d_sae: int) -> Callable[[], int]:
    """A persistent SAE's encoder matmul and topk, and the decoder's three products with dense states."""
    W, bias, code, grad = torch.randn(d_sae, D_MODEL), torch.zeros(d_sae), torch.rand(N, d_sae), torch.empty(N, d_sae)
    out, grad_W = torch.empty(N, D_MODEL), torch.empty(d_sae, D_MODEL)

    def matmuls() -> int:
        torch.addmm(bias, x, W.T, out=grad)
        grad.topk(K, dim=-1, sorted=False)
        torch.mm(code, W, out=out)
        torch.mm(out, W.T, out=grad)
        torch.mm(code.T, out, out=grad_W)
        return N

    return matmuls


TFA_D_SAE = 1024
OWN_BASES = {
    "crosscoder, 3 positions": "window matmul, topk, sparse products",
    "tfa, 1024 latents": "tfa's matmuls",
    "persistent, segments of 128": "its topk and four matmuls",
}
"""Methods whose unavoidable products are others."""


def contestants(d_sae: int) -> dict[str, Callable[[], int]]:
    data = batches()
    width = f"sae.d_sae={d_sae}"
    result = bare(data, d_sae)
    plain = {
        "topk": ("topk", ()),
        "batchtopk": ("batchtopk", ()),
        "relu-l1, dense code": ("relu-l1", ("sparsity.l1=0",)),
        "written-run3 (gelu)": ("written-run3", ("temporal.weight=0",)),
        "topk + eq. 3": ("topk", ("temporal.weight=0.01",)),
        "relu-l1, dense code + eq. 3": ("relu-l1", ("sparsity.l1=0", "temporal.weight=0.01")),
        "topk + relative slowness": ("topk", ("temporal.weight=1", "temporal.kind=relative")),
        "topk + contrast": ("topk", ("temporal.weight=1", "temporal.kind=contrastive")),
        "matryoshka batchtopk": ("batchtopk", ("sae.groups=0.2,0.8", "group_weights=0.2,0.8")),
    }
    for name, (chosen, settings) in plain.items():
        result[name], _ = ours(chosen, data, width, *settings)
    whole = batches(length=128)
    for kind in ("local", "direction"):
        settings = ("temporal.weight=1", f"temporal.kind={kind}")
        result[f"topk + {kind}, segments of 128"], _ = ours("topk", whole, width, *settings)
    result["crosscoder, 3 positions"], _ = ours("topk", data, width, "sae.window=3", f"sae.k={3 * K}")
    result["window matmul, topk, sparse products"] = bare_windows(data[0].x, d_sae, 3)
    result["tfa, 1024 latents"], _ = ours("tfa", whole, f"sae.d_sae={TFA_D_SAE}")
    result["tfa's matmuls"] = bare_attention(data[0].x, TFA_D_SAE)
    result["persistent, segments of 128"], _ = ours("persistent", whole, width)
    result["its topk and four matmuls"] = bare_states(data[0].x, d_sae)
    pairs = batches(length=2)
    result["t-sae, 2048 pairs"], _ = ours("t-sae", pairs, width)
    result["batchtopk, 10% dead + AuxK"], dying = ours("batchtopk", data, width)
    with torch.no_grad():
        dead = torch.arange(d_sae) % 10 == 0
        dying.sae.b_enc[dead] = -100.0
    forward = dying.gradients

    def with_dead(batch: Batch) -> object:
        dying.tokens_since_fired[dead] = 10**9
        return forward(batch)

    dying.gradients = with_dead  # type: ignore[method-assign]
    for name, chosen in (("relu-l1, 2% active", "relu-l1"), ("jumprelu, 2% active", "jumprelu")):
        settings = ("sparsity.l1=0",) if chosen == "relu-l1" else ("sparsity.l0=0",)
        result[name], sparse = ours(chosen, data, width, *settings)
        with torch.no_grad():  # a threshold at the quantile, in place of a long training
            pre = sparse.sae.pre_activations(data[0].x[:512] * sparse.scale)
            limit = pre.flatten().kthvalue(int(0.98 * pre.numel())).values
            if chosen == "relu-l1":
                sparse.sae.b_enc.sub_(limit)
            else:
                sparse.sae.threshold.fill_(limit)
    return result


SPARSE = ("topk", "batchtopk", "matryoshka", "jumprelu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--malloc", action="store_true")
    parser.add_argument("--only", default="", help="Names that contain this, and the bases.")
    arguments = parser.parse_args()
    one_core()
    if arguments.malloc:
        tune_malloc()
    result = contestants(arguments.d_sae)
    bases = list(result)[:2]
    chosen = {
        name: run
        for name, run in result.items()
        if name in bases or name in OWN_BASES.values() or arguments.only in name
    }
    times = alternate(chosen, arguments.rounds)
    for base in bases:
        times.show("token", base=base)
    for name in ("topk", "relu-l1, dense code"):
        if name in chosen and f"{name} + eq. 3" in chosen:
            print(f"eq. 3 on {name}: {times.ratio(f'{name} + eq. 3', name)}")
    for name in result:
        if name.startswith("topk + ") and name in chosen and "topk" in chosen:
            print(f"{name}, to topk: {times.ratio(name, 'topk')}")
    for name, base in OWN_BASES.items():
        if name in chosen and base in chosen:
            print(f"{name}, to {base}: {times.ratio(name, base)}")
    report("step", times, base=bases[0], d_sae=arguments.d_sae, malloc=arguments.malloc)


if __name__ == "__main__":
    main()
