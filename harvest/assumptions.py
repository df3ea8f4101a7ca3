"""What a harvest assumes of a language model, tested before it: what else is in a batch moves no valid position.

Sequences of a batch are padded to its longest and run without an attention mask, which is right where no position
looks at a later one. Encoders and bidirectional decoders do: for one of them padded activations were off by 1 and more.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.errors import ModelError

Activations = dict[str, Tensor]
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of two ways through one model, relative to the largest activation: rounding, and nothing else."""
N_SEQUENCES, LENGTH, CUT = 4, 12, 7
"""The probe: sequences, their positions, and the position from which on they are changed."""


def is_causal(
    run: Callable[[Int[ndarray, "n position"]], Activations], name: str, n_vocabulary: int, batch_size: int, dtype: str
) -> bool:
    """Whether later tokens, padding among them, leave the activations of earlier positions as they are.

    `run` gives [n, position, width] of every hook, in `dtype`, without stopping early. Raises ModelError for a model
    that gives a sequence other activations the second time, or next to other sequences.
    """
    ids = np.random.default_rng(1).integers(0, n_vocabulary, (N_SEQUENCES, LENGTH))
    expected = run(ids)
    if _moved(run(ids), expected, dtype):
        raise ModelError(f"{name} gives other activations the second time: something in it is random. Give another.")
    others = (ids + 1) % n_vocabulary
    half = N_SEQUENCES // 2
    beside = run(np.concatenate([ids[:half], others[half:]]))
    if batch_size > 1 and _moved(beside, expected, dtype, slice(0, half)):
        raise ModelError(
            f"Activations of {name} depend on the other sequences in the batch, so they are not those of a sequence. "
            "Give --batch-size 1."
        )
    padded = ids.copy()
    padded[:, CUT:] = 0
    later = np.concatenate([ids[:, :CUT], others[:, CUT:]], axis=1)
    return not any(_moved(run(changed), expected, dtype) for changed in (later, padded, ids[:, :CUT]))


def _moved(values: Activations, expected: Activations, dtype: str, rows: slice = slice(None)) -> bool:
    """Whether any of the first CUT positions of any hook differs in all `rows`.

    In one row alone it may be a near tie between experts, which rounding decides.
    """
    for hook, before in expected.items():
        a, b = values[hook][rows, :CUT].float(), before[rows, :CUT].float()
        allowed = TOLERANCE[dtype] * float(before.abs().max())
        differs = ~((a - b).abs().amax(-1) <= allowed)  # so that NaN counts
        if bool(torch.all(differs, dim=0).any()):
            return True
    return False
