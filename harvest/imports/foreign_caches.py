"""Caches in a form of their own: SAELens' cached activations, vLLM's hidden states."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tcsae.harvest.imports.array_files import BLOCK_TOKENS, Layout, natural, tensor_numbers
from tcsae.harvest.imports.cutting import Tokens
from tcsae.shared.base.errors import DataError

SHARDS = ".tmp_shards"
"""Of a cache that SAELens has not finished: it joins them at the end."""
TOKEN_IDS = "token_ids"
VLLM_ENDINGS = (".safetensors", ".safetensors.zst")


class SaelensCache:
    """A folder that `CacheActivationsRunner` wrote: a row a context, [context_size, d_in] in a column a hook."""

    def __init__(self, path: Path) -> None:
        import datasets

        if (path / SHARDS).exists() or not (path / "state.json").is_file():
            why = "is unfinished" if (path / SHARDS).exists() else "is no dataset as SAELens saves it (no state.json)"
            raise DataError(f"{path} {why}. Give the folder of new_cached_activations_path, once it is written.")
        try:
            self._rows: Any = datasets.load_from_disk(str(path)).with_format("numpy")
        except Exception as error:  # Arrow's and datasets' own
            raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}). Cache it again.") from error
        names = [name for name, one in self._rows.features.items() if len(getattr(one, "shape", ())) == 2]
        if not names:
            raise DataError(f"{path} has no column of activations; it has {', '.join(self._rows.column_names)}.")
        self.shapes = {name: tuple(self._rows.features[name].shape) for name in names}
        self.has_ids = TOKEN_IDS in self._rows.column_names
        length = next(iter(self.shapes.values()))[0]
        self.layout = Layout(has_sequences=True, has_documents=False, has_ids=self.has_ids, length=length)
        self.n_tokens = len(self._rows) * length
        self.widths = {name: shape[1] for name, shape in self.shapes.items()}

    def tokens(self) -> Iterator[Tokens]:
        length, row = self.layout.length, 0
        for batch in self._rows.iter(batch_size=max(1, BLOCK_TOKENS // length)):
            x = {name: np.asarray(batch[name], np.float32).reshape(-1, self.widths[name]) for name in self.widths}
            n = len(batch[next(iter(self.widths))])
            ids = np.asarray(batch[TOKEN_IDS], np.int64).reshape(-1) if self.has_ids else None
            run = np.repeat(np.arange(row, row + n), length)
            row += n
            yield Tokens(x, run, run, ids)


class VllmStates:
    """A folder of hidden states that vLLM's `extract_hidden_states` saved: a file a request.

    hidden_states [n_tokens, n_layers, width], token_ids [n_tokens]; packed with zstd by its online connector.
    """

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else list(path.rglob("*"))
        self.files = sorted((file for file in files if file.name.endswith(VLLM_ENDINGS)), key=natural)
        if not self.files:
            raise DataError(f"{path} holds no .safetensors file. Give the folder of shared_storage_path.")
        first = self._loaded(self.files[0])
        _, self._n_layers, width = first["hidden_states"].shape
        self.widths = {f"layer_{i}": width for i in range(self._n_layers)}
        self.n_tokens = sum(map(_n_tokens, self.files))
        self.layout = Layout(has_sequences=True, has_documents=True, has_ids=True, length=0)

    def tokens(self) -> Iterator[Tokens]:
        for number, file in enumerate(self.files):
            loaded = self._loaded(file)
            states, ids = loaded["hidden_states"], loaded["token_ids"].reshape(-1)
            if states.shape[1:] != (self._n_layers, self.widths["layer_0"]) or len(ids) != len(states):
                raise DataError(
                    f"{file} has hidden_states {list(states.shape)} and {len(ids)} token_ids; the first file has "
                    f"{self._n_layers} layers of width {self.widths['layer_0']}. Leave it out."
                )
            run = np.full(len(ids), number)
            yield Tokens({f"layer_{i}": states[:, i] for i in range(self._n_layers)}, run, run, ids.astype(np.int64))

    @staticmethod
    def _loaded(file: Path) -> dict[str, Any]:
        import safetensors.torch

        try:
            tensors = safetensors.torch.load(_unpacked(file))
            if missing := {"hidden_states", "token_ids"} - tensors.keys():
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
            if tensors["hidden_states"].ndim != 3:
                raise ValueError(f"hidden_states has shape {list(tensors['hidden_states'].shape)}, not three axes")
        except Exception as error:  # safetensors', zstandard's, the disk's
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{file} is no file of vLLM's hidden states ({reason}). Leave it out.") from error
        return {name: tensor_numbers(one) for name, one in tensors.items()}


def _unpacked(file: Path) -> bytes:
    if file.suffix != ".zst":
        return file.read_bytes()
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())


def _n_tokens(file: Path) -> int:
    """From the header alone, where it is not packed."""
    if file.suffix == ".zst":
        return len(VllmStates._loaded(file)["token_ids"])
    with file.open("rb") as opened:
        n = int.from_bytes(opened.read(8), "little")
        if n > file.stat().st_size:
            raise DataError(f"{file} is no file of vLLM's hidden states (its header is cut off). Leave it out.")
        try:
            return int(json.loads(opened.read(n))["hidden_states"]["shape"][0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{file} is no file of vLLM's hidden states ({error}). Leave it out.") from error
