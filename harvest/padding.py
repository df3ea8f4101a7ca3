"""Padding that rows of token ids name themselves, by an attention mask or by labels, left out of the document."""

from collections.abc import Sequence

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
