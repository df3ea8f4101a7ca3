"""Folders of arrays: .npy, .npz, .safetensors, and .pt as nnsight users save them. Only numbers are read, no code runs.

An array is known by its name: tokens (token_ids, input_ids), lengths or attention_mask, documents (document_ids);
every other is activations of a hook of that name. Where all .npy files end in a number (layer4_0.npy), it is a part's.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from tcsae.harvest.imports.cutting import Tokens
from tcsae.shared.base.errors import DataError

PARTS = {
    "tokens": "tokens",
    "token_ids": "tokens",
    "input_ids": "tokens",
    "lengths": "lengths",
    "attention_mask": "mask",
    "documents": "documents",
    "document_ids": "documents",
    "doc_ids": "documents",
}
NUMBERED = re.compile(r"(.+)[-_.](\d+)")
BLOCK_TOKENS = 1 << 15
"""Read at a time."""
VECTORS_PER_DOCUMENT = 256
"""Consecutive single vectors that lie in one split: neighbours are of one text, as far as anybody knows."""


class Lazy(NamedTuple):
    """An array that is read piece by piece."""

    shape: tuple[int, ...]
    read: Callable[[int, int], ndarray]
    """(start, stop) -> rows, as float32 or integers."""


Group = Mapping[str, Lazy]
"""Arrays that belong together, by name."""


def array_groups(path: Path, ending: str) -> list[tuple[str, Group]]:
    """The parts of a source in order, with their names: a file, or the files of a folder.

    Raises DataError if there is none of this kind, or one cannot be read.
    """
    endings = {"npy": (".npy", ".npz"), "safetensors": (".safetensors",), "nnsight": (".pt", ".pth")}[ending]
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = sorted((file for file in files if file.suffix in endings), key=natural)
    if not files:
        raise DataError(
            f"{path} holds no {' or '.join(endings)} file. Give a file or a folder of them, or another --from."
        )
    if ending != "npy" or files[0].suffix == ".npz":
        return [(file.name, _opened(file)) for file in files]
    groups: dict[str, dict[str, Lazy]] = {}
    matches = [NUMBERED.fullmatch(file.stem) for file in files]
    for file, match in zip(files, matches, strict=True):
        name, number = (match[1], match[2]) if match and all(matches) else (file.stem, "")
        groups.setdefault(f"{file.parent}/{number}", {})[name] = _opened(file)[""]
    return list(groups.items())


def natural(file: Path) -> list[Any]:
    """Order of file names with numbers in them: hs_2 before hs_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file))]


def _opened(file: Path) -> Group:
    try:
        if file.suffix == ".npy":
            return {"": _lazy(np.load(file, mmap_mode="r", allow_pickle=False))}
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: _lazy(archive[name]) for name in archive.files}
        if file.suffix == ".safetensors":
            return _safetensors(file)
        return _torch_file(file)
    except Exception as error:  # of four libraries, for whatever a file may hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{file} cannot be read ({reason}). Repair it, or leave it out.") from error


def _lazy(values: ndarray) -> Lazy:
    return Lazy(values.shape, lambda start, stop: _numbers(np.asarray(values[start:stop])))


def _numbers(values: ndarray) -> ndarray:
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _safetensors(file: Path) -> Group:
    from safetensors import safe_open

    def lazy(name: str) -> Lazy:
        with safe_open(file, "pt") as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())

        def read(start: int, stop: int) -> ndarray:
            with safe_open(file, "pt") as tensors:
                return tensor_numbers(tensors.get_slice(name)[start:stop])

        return Lazy(shape, read)

    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    return {name: lazy(name) for name in names}


def _torch_file(file: Path) -> Group:
    import torch

    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    named = loaded if isinstance(loaded, dict) else {"activations": loaded}
    tensors = {str(name): one for name, one in named.items() if isinstance(one, torch.Tensor)}
    if len(tensors) < len(named):
        raise ValueError("it holds other things than tensors by name")
    return {name: Lazy(tuple(one.shape), partial(_tensor_rows, one)) for name, one in tensors.items()}


def _tensor_rows(tensor: Any, start: int, stop: int) -> ndarray:
    return tensor_numbers(tensor[start:stop])


def tensor_numbers(tensor: Any) -> ndarray:
    """A tensor as NumPy has it: floats of any width as float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class Layout(NamedTuple):
    """What a source says of its tokens, for the statement that is printed."""

    has_sequences: bool
    has_documents: bool
    has_ids: bool
    length: int
    """Of the longest sequence that its arrays can hold."""


def hooks_of(group: Group) -> dict[str, Lazy]:
    """Its arrays of activations, by name."""
    return {name: one for name, one in group.items() if name not in PARTS and len(one.shape) in (2, 3)}


def layout_of(name: str, group: Group) -> Layout:
    """Raises DataError for a group without activations, or whose arrays do not fit each other."""
    parts = {PARTS[one]: lazy for one, lazy in group.items() if one in PARTS}
    hooks = hooks_of(group)
    if not hooks:
        shapes = ", ".join(f"{one} {list(lazy.shape)}" for one, lazy in group.items())
        raise DataError(f"{name} has no activations, [sequences, positions, width] or [tokens, width]: {shapes}.")
    outer = {lazy.shape[:-1] for lazy in hooks.values()}
    shape = next(iter(outer))
    rows = {"tokens": shape, "mask": shape, "lengths": shape[:1], "documents": shape[:1]}
    for one, lazy in [*hooks.items(), *parts.items()]:
        leading_shape = rows.get(one, shape)
        if (lazy.shape[:-1] if one in hooks else lazy.shape) != leading_shape:
            raise DataError(
                f"{name}: {one} has shape {list(lazy.shape)}, activations are of {list(shape)} tokens. Give arrays "
                "that belong together."
            )
    in_sequences = len(shape) == 2
    if "lengths" in parts and not in_sequences:
        raise DataError(
            f"{name}: lengths are of sequences, activations are of {list(shape)} tokens. Give documents or "
            "attention_mask in place of lengths."
        )
    return Layout(
        in_sequences or "documents" in parts, "documents" in parts, "tokens" in parts, shape[1] if in_sequences else 1
    )


def group_tokens(group: Group, first_run: int, first_document: int) -> Iterator[Tokens]:
    """The tokens of a group in order. Runs and documents that it does not number count on from the given ones."""
    hooks = hooks_of(group)
    shape = next(iter(hooks.values())).shape
    parts = {PARTS[one]: lazy for one, lazy in group.items() if one in PARTS}
    width = shape[1] if len(shape) == 3 else 1
    step = max(1, BLOCK_TOKENS // width)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        read = {one: lazy.read(start, stop) for one, lazy in parts.items()}
        x = {name: lazy.read(start, stop).reshape((stop - start) * width, -1) for name, lazy in hooks.items()}
        ids = read["tokens"].reshape(-1).astype(np.int64) if "tokens" in read else None
        yield _numbered(x, ids, read, (start, stop, width, len(shape)), (first_run, first_document))


def _numbered(
    x: dict[str, ndarray],
    ids: ndarray | None,
    read: Mapping[str, ndarray],
    place: tuple[int, int, int, int],
    first: tuple[int, int],
) -> Tokens:
    start, stop, width, n_axes = place
    row = np.repeat(np.arange(start, stop), width)
    documents = np.repeat(read["documents"].astype(np.int64), width) if "documents" in read else None
    if documents is None:
        text = row if n_axes == 3 else row // VECTORS_PER_DOCUMENT
        tokens = Tokens(x, first[0] + row, first[1] + text, ids)
    else:
        tokens = Tokens(x, first[0] + row if n_axes == 3 else documents, documents, ids)
    return tokens.part(_valid(read, stop - start, width))


def _valid(read: Mapping[str, ndarray], n: int, width: int) -> ndarray:
    """Which positions of rows hold a token."""
    if "lengths" in read:
        return (np.arange(width) < read["lengths"][:, None]).reshape(-1)
    if "mask" in read:
        return read["mask"].astype(bool).reshape(-1)
    return np.ones(n * width, bool)
