"""How fast each stage is on a device, beside what the device can do."""

import itertools
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import tcsae
import tcsae.shared.base.device as device_module
from tcsae.evaluate.batches import Settings
from tcsae.evaluate.measures.temporal_run import TemporalObserver
from tcsae.evaluate.one_pass import measure
from tcsae.evaluate.run import train_mean
from tcsae.evaluate.systems import SaeOutput
from tcsae.harvest.capture import Capture
from tcsae.harvest.language_model import find_model
from tcsae.shared.base.settings import with_settings
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Store
from tcsae.train.batch import Batch, Text
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

LENGTH, K = 16, 32


class Sizes(NamedTuple):
    widths: tuple[int, ...]
    latents: tuple[int, ...]
    tokens: int
    """Of a training batch."""
    parity_tokens: int
    sequences: int
    """Of 128 tokens, in a harvest or a store."""
    seconds: float
    """That each figure is measured for."""
    pythia: bool


FULL = Sizes((512, 2304), (16_384, 65_536), 4096, 1024, 512, 2.0, True)
TINY = Sizes((16,), (64,), 64, 128, 16, 0.01, False)

HARVEST = ("model", "dtype", "tokens/s", "share of the bare forward", "memory, GB")
STEP = ("preset", "d_model", "d_sae", "precision", "steps/s", "tokens/s", "MFU", "memory, GB", "waits a step")
LOADER = ("d_model", "codec", "tokens/s", "GB/s to the device")
EVAL = ("d_model", "d_sae", "measures", "tokens/s")
ABOUT = """- Harvest: `Capture.run`, tokens on the host to float32 activations there; bare: the forward passes alone.
- MFU: the step's products that no implementation can do without (encoder, and for the k active latents of a token the
  decoder, its two gradients and the encoder's) over the measured rate of a large product in the same precision.
- Waits: warnings of `torch.cuda.set_sync_debug_mode` in a step, after the first two; the guard's late read is an event
  and none of them.
- Loader: batches on the device, from chunks that the page cache holds.
- Peers: `tests/bench/peers_step.py` in an environment that has them."""


def number(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(run: Callable[[], int], device: torch.device, seconds: float) -> float:
    """Units a second, after a warm-up."""
    for _ in range(3):
        run()
    synchronize(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        n += run()
        if device.type == "cuda" and n % 8 == 0:  # the host must not run ahead of the clock
            synchronize(device)
    synchronize(device)
    return n / (time.perf_counter() - start)


def memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def batches(d_model: int, n: int, device: torch.device, n_batches: int) -> list[Batch]:
    """Sparse mixtures, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(1024, d_model, generator=generator), dim=1)
    result = []
    for _ in range(n_batches):
        code = torch.zeros(n, 1024)
        code.scatter_(1, torch.randint(0, 1024, (n, 24), generator=generator), torch.rand(n, 24, generator=generator))
        x = code @ directions + 0.02 * torch.randn(n, d_model, generator=generator)
        lengths = np.full(n // LENGTH, LENGTH)
        text, documents = Text(np.arange(n) % 97, np.arange(n)), np.arange(len(lengths)) // 2
        result.append(Batch(x.to(device), lengths, np.zeros(len(lengths), np.int64), documents, text=text))
    return result


def store(folder: Path, size: Sizes, d_model: int, codec: str = "float16") -> Store:
    """A store of sparse mixtures, made once."""
    path = folder / f"{d_model}-{codec}.zarr"
    if not path.exists():
        x = batches(d_model, size.sequences * 128, torch.device("cpu"), 1)[0].x.view(-1, 128, d_model).numpy()
        with tcsae.create_store(path, hooks={"h": d_model}, sequence_length=128, codec=codec) as creation:
            creation.append("train", {"h": x})
            creation.append("eval", {"h": x[: max(8, len(x) // 4)]})
    return tcsae.open_store(path)


PRODUCTS = ("float32", "tf32", "bf16")


def product_rate(device: torch.device, size: Sizes, precision: str) -> float:
    """FLOP/s of a large product."""
    n = 8192 if size.pythia else 64
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    def run() -> int:
        a @ b
        return 1

    result = rate(run, device, size.seconds / 4) * 2 * n**3
    torch.set_float32_matmul_precision("highest")
    return result


def limits(device: torch.device, size: Sizes) -> list[tuple]:
    rows: list[tuple] = [(f"product in {name}, TFLOP/s", product_rate(device, size, name) / 1e12) for name in PRODUCTS]
    big = torch.empty((1 << 28) if size.pythia else 1 << 12, dtype=torch.uint8, device=device)
    host = torch.empty(big.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy() -> int:
        big.clone()
        return 2 * len(big)

    def upload() -> int:
        big.copy_(host, non_blocking=True)
        return len(big)

    return [
        *rows,
        ("memory read and written, GB/s", rate(copy, device, size.seconds / 4) / 1e9),
        ("from pinned memory, GB/s", rate(upload, device, size.seconds / 4) / 1e9),
    ]


def pythia(folder: Path) -> str:
    """A folder with a model of Pythia-70m's shape, its weights random."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    path = folder / "pythia-shape"
    config = GPTNeoXConfig(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304
    )
    GPTNeoXForCausalLM(config).save_pretrained(path)
    for file in Path(find_model("embedded").source).glob("tokenizer*"):
        shutil.copy(file, path)
    return str(path)


def harvest(device: torch.device, size: Sizes, folder: Path) -> list[tuple]:
    rows = []
    models = ["embedded", *([pythia(folder)] if size.pythia else [])]
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    for model, dtype in itertools.product(models, dtypes):
        reset(device)
        capture = Capture(find_model(model), ["blocks.4.hook_resid_post"], 32, device.type, dtype)
        tokens = np.random.default_rng(0).integers(0, 4000, (size.sequences, 128)).astype(np.int32)
        lengths, ids = np.full(size.sequences, 128), torch.from_numpy(tokens[:32]).long().to(device)

        def bare(capture: Capture = capture, ids: torch.Tensor = ids) -> int:
            capture._forward(ids)
            return ids.numel()

        def whole(capture: Capture = capture, tokens: np.ndarray = tokens, lengths: np.ndarray = lengths) -> int:
            capture.run(tokens, lengths)
            return tokens.size

        ours, theirs = rate(whole, device, size.seconds), rate(bare, device, size.seconds)
        rows.append((Path(model).name, dtype, ours, ours / theirs, memory(device)))
    return rows


def step_flops(n: int, d_model: int, d_sae: int) -> float:
    return 2.0 * n * d_model * (d_sae + 4 * K)


def waits(step: Callable[[], int], device: torch.device) -> float:
    """A step, by torch's own account."""
    if device.type != "cuda":
        return float("nan")
    synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught) / 10


def steps(device: torch.device, size: Sizes) -> list[tuple]:
    rows = []
    precisions = PRODUCTS if device.type == "cuda" else ("float32",)
    peak = {name: product_rate(device, size, name) for name in precisions}
    for d_model, d_sae in itertools.product(size.widths, size.latents):
        data = batches(d_model, size.tokens, device, 2)
        for name, precision in itertools.product(("topk", "temporal-topk", "batchtopk"), precisions):
            reset(device)
            k = min(K, d_sae // 8)
            settings = [f"sae.d_sae={d_sae}", f"sae.k={k}", "steps=1M", f"data.segment_length={LENGTH}"]
            trainer, turn = Trainer(with_settings(preset(name, d_model), settings), data[0].x), itertools.cycle(data)
            if device.type == "cuda":
                device_module.set_precision(precision, device)

            def step(trainer: Trainer = trainer, turn: itertools.cycle = turn) -> int:
                trainer.step(next(turn))
                return 1

            result = rate(step, device, size.seconds)
            mfu = result * step_flops(size.tokens, d_model, d_sae) / peak[precision]
            about = (name, d_model, d_sae, precision)
            rows.append((*about, result, result * size.tokens, mfu, memory(device), waits(step, device)))
            device_module.set_precision("float32", device)
    return rows


def loader(device: torch.device, size: Sizes, folder: Path) -> list[tuple]:
    rows = []
    for d_model, codec in itertools.product(size.widths, ("float16", "bfloat16", "compact")):
        config = DataConfig(n_segments=max(4, size.tokens // LENGTH), segment_length=LENGTH, buffer_sequences=256)
        turn = iter(SegmentLoader(store(folder, size, d_model, codec), config, device=device))

        def batch(turn=turn) -> int:
            return len(next(turn).x)

        tokens = rate(batch, device, size.seconds)
        rows.append((d_model, codec, tokens, tokens * d_model * 2 / 1e9))
    return rows


def evaluation(device: torch.device, size: Sizes, folder: Path) -> list[tuple]:
    rows = []
    for d_model, temporal in itertools.product(size.widths, (False, True)):
        held, d_sae = store(folder, size, d_model), size.latents[0]
        config = SaeConfig(d_model=d_model, d_sae=d_sae, k=min(K, d_sae // 8))
        sae = SparseAutoencoder(config)
        for weight in sae.parameters():
            torch.nn.init.normal_(weight, std=d_model**-0.5)
        mean = train_mean(held, "h")
        settings = Settings(hook="h", rules=CountingRules(skip_first=1), splice_all=False, mean=mean, device=device)

        sae = sae.to(device)

        def whole(held=held, settings=settings, sae=sae, temporal=temporal) -> int:
            observers = [TemporalObserver(held.eval, settings.rules, settings.mean, 1, device)] if temporal else []
            measure(held.eval, settings, [SaeOutput(sae)], None, None, observers, lambda _: None)
            return held.eval.n_tokens

        names = "reconstruction, sparsity" + (", temporal" if temporal else "")
        rows.append((d_model, d_sae, names, rate(whole, device, size.seconds)))
    return rows
