"""What a harvest assumes of a language model, tested before it: what else is in a batch moves no valid position.

Sequences of a batch are padded to its longest and run without an attention mask, which is right where no position
looks at a later one. Encoders and bidirectional decoders do: for one of them padded activations were off by 1 and more.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from tcsae.shared.base.errors import ModelError

# Padding that rows of token ids name themselves, by an attention mask or by labels, left out of the document.

MASK, LABELS = "attention_mask", "labels"
IGNORED = -100
"""The label of a token that no loss is computed on: padding, but also a prompt."""


def companion_columns(field: str) -> list[str]:
    """Names of the columns beside token ids in `field` that say what is padding, the surest first.

    Those of `chosen_input_ids` are `chosen_attention_mask` and `chosen_labels`.
    """
    return [field.replace("input_ids", name) if "input_ids" in field else name for name in (MASK, LABELS)]


def without_padding(ids: list[int], mask: object, labels: object, pad_id: int | None = None) -> list[int]:
    """`ids` without the padding at both ends; all of them where neither mask nor labels are lists.

    Raises ValueError, saying why, for a mask that is no mask of these ids.
    """
    if isinstance(mask, list):
        start, stop = _unmasked(ids, mask)
    elif isinstance(labels, list) and len(labels) == len(ids):  # other lengths: the labels of an encoder-decoder
        start, stop = _labelled(ids, labels, pad_id)
    else:
        return ids
    return ids[start:stop]


def _unmasked(ids: Sequence[int], mask: Sequence[int]) -> tuple[int, int]:
    if len(mask) != len(ids):
        raise ValueError(f"{len(mask)} values for {len(ids)} token ids")
    if other := [value for value in mask if value not in (0, 1)]:
        raise ValueError(f"it holds {other[0]}, and only 0 and 1 are known")
    if not any(mask):
        return 0, 0
    start = list(mask).index(1)
    stop = start + sum(mask)
    if not all(mask[start:stop]):
        raise ValueError("it has a 0 between two 1")
    return start, stop


def _labelled(ids: Sequence[int], labels: Sequence[int], pad_id: int | None) -> tuple[int, int]:
    """Padding is a run of one id at an end that no loss is computed on.

    A run of length 1 may also be a masked BOS, or the last token of labels that are shifted by one: it is padding if
    it is the pad id, or at the end of labels that are not shifted.
    """
    n = len(ids)
    start, stop = 0, n
    while stop and labels[stop - 1] == IGNORED and ids[stop - 1] == ids[-1]:
        stop -= 1
    while start < stop and labels[start] == IGNORED and ids[start] == ids[0]:
        start += 1
    in_place = all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    if n - stop == 1 and ids[-1] != pad_id and not (in_place and any(label != IGNORED for label in labels)):
        stop = n
    if start == 1 and ids[0] != pad_id:
        start = 0
    return start, stop


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
