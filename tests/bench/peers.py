"""What the peers_*.py scripts share: other libraries' own trainers, built by their own constructors.

The scripts run in an environment of their own, since SAELens wants an older transformer-lens than tcsae:

    python -m venv peers
    echo torch==2.13.0 > constraints.txt          # a newer torch brings several GB of CUDA
    peers/bin/pip install -c constraints.txt sae-lens dictionary-learning eai-sparsify "zarr>=3.1.2" numcodecs
    peers/bin/pip uninstall -y torchvision        # comes with nnsight; does not fit a torch for CPUs
    peers/bin/pip install --no-deps .             # tcsae, from a checkout without a build folder
"""

import importlib.metadata
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.reader import Store
from tcsae.train.plan import Run
from tcsae.train.presets import preset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")


def eval_tokens(store: Store, n_tokens: int, skip_first: int) -> Tensor:
    """float32 [n, d_model]: the eval split's first `n_tokens` tokens (or all) at positions from `skip_first` on."""
    split, hook = store.eval, store.hook()
    result, n_found, step = [], 0, store.sequences_per_chunk
    for first in range(0, split.n_sequences, step):
        block = split.read(hook, first, min(first + step, split.n_sequences))
        positions = np.arange(store.sequence_length)
        lengths = split.lengths[first : first + step]
        result.append(block[(positions < lengths[:, None]) & (positions >= skip_first)])
        n_found += len(result[-1])
        if n_found >= n_tokens:
            break
    return torch.from_numpy(np.concatenate(result)[:n_tokens]).float()


def our_runs(store: Store, presets: Sequence[str], settings: Sequence[str]) -> list[Run]:
    """Presets of ours with settings applied, each named after its preset."""
    d_model = store.d_model(store.hook())
    return [Run(name, name, with_settings(preset(name, d_model), settings)) for name in presets]


class Shape(NamedTuple):
    """Of an SAE."""

    d_model: int
    d_sae: int
    k: int


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def versions() -> dict[str, str]:
    """Of the libraries compared."""
    names = ("sae-lens", "dictionary-learning", "eai-sparsify", "torch")
    return {name: importlib.metadata.version(name) for name in names}


def saelens_trainer(
    activation: str, shape: Shape, data: Iterator[Tensor], *, normalize: str = "none", sae: Any = None, **settings: Any
) -> Any:
    """SAELens' SAETrainer (`fit` trains to the end, `step` once); `settings` as in its SAETrainerConfig."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {"relu": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}[activation]
    own = {"l1_coefficient": 1.0} if activation == "relu" else {"k": shape.k, **(sae or {})}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=shape.d_model, d_sae=shape.d_sae, normalize_activations=normalize, **own
    )
    trainer = SAETrainerConfig(**{"n_batches_for_norm_estimate": 100, **settings})
    return SAETrainer(cfg=trainer, sae=getattr(sae_lens, f"{kind}TrainingSAE")(config), data_provider=data)


def dictionary_settings(activation: str, shape: Shape, **settings: Any) -> dict[str, Any]:
    """A dictionary_learning trainer's class ("trainer") and arguments, as its `trainSAE` takes them."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    return {
        "trainer": {"relu": StandardTrainer, "topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[activation],
        "activation_dim": shape.d_model,
        "dict_size": shape.d_sae,
        "layer": 4,
        "lm_name": "none",
        "device": "cpu",
        **({} if activation == "relu" else {"k": shape.k}),
        **settings,
    }


def sparsify_step(shape: Shape, optimizer: str) -> Callable[[Tensor], None]:
    """The body of sparsify's Trainer.fit for one batch (loss fvu, no AuxK: its defaults), without the language model.

    `optimizer`: "signum", its default, or "adam".
    """
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k))
    if optimizer == "signum":
        wrapped = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=1e-3), momentum=0.95)
        wrapped.train()
    else:
        wrapped = torch.optim.Adam(sae.parameters(), lr=1e-3)
    since_fired = torch.zeros(shape.d_sae, dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=None, total_variance=total_variance)
        fired = torch.zeros(shape.d_sae, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        wrapped.step()
        wrapped.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[fired] = 0

    return step
