"""Promise: data/README.md is enough to read a store of any representation, with nothing but zarr and numpy.

The reader below was written from that page, and imports nothing of ours.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr

GOLDEN = Path(__file__).parent / "golden"


def read(path, split: str, hook: str) -> np.ndarray:
    """Activations [n_sequences, sequence_length, d_model], zero beyond a length, as the page says."""
    group = zarr.open_group(path, mode="r")
    codec = group.attrs["tcsae"]["recipe"]["codec"]
    stored = group[f"{split}/activations/{hook}"][:]
    valid = np.arange(stored.shape[1]) < group[f"{split}/lengths"][:][:, None]
    if stored.dtype.kind == "f":
        x = stored.astype(np.float32)
    elif codec == "bfloat16":
        x = (stored.astype(np.uint32) << 16).view(np.float32)
    elif codec == "int8":
        mean, scale = (group[f"codec/{hook}/{name}"][:] for name in ("mean", "scale"))
        x = stored[..., :-4] * stored[..., -4:].copy().view("<f4") * scale + mean
    else:
        assert codec == "compact"
        mean, basis, step = (group[f"codec/{hook}/{name}"][:] for name in ("mean", "basis", "step"))
        u = stored.astype(np.int64)
        x = np.where(u % 2, -(u + 1) // 2, u // 2) * step @ basis + mean
    return np.where(valid[..., None], x, 0)


@pytest.mark.parametrize("codec", ["float16", "float32", "bfloat16", "int8", "compact"])
def test_a_reader_from_the_page_reads_what_was_put_in(tmp_path, codec):
    import tcsae

    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 9) ** -1.0
    x = {split: (rng.normal(size=(n, 5, 8)) * spectrum).astype("f4") + 2 for split, n in (("train", 300), ("eval", 9))}
    lengths = {split: rng.integers(1, 6, len(values)) for split, values in x.items()}
    with tcsae.create_store(tmp_path / "a.zarr", hooks={"h": 8}, sequence_length=5, codec=codec) as store:
        for split, values in x.items():
            store.append(split, {"h": values}, lengths=lengths[split])
    ours = tcsae.open_store(tmp_path / "a.zarr")
    for split, values in x.items():
        result = read(tmp_path / "a.zarr", split, "h")
        np.testing.assert_allclose(result, ours.split(split).read("h", 0, len(values)), atol=1e-5)
        valid = np.arange(5) < lengths[split][:, None]
        off = np.square(result[valid] - values[valid]).mean(0).sum() / np.square(spectrum).sum()
        allowed = {"float16": 2e-6, "float32": 0, "bfloat16": 1e-4, "int8": 1e-4, "compact": 1.2e-2}
        assert off <= allowed["float16" if split == "eval" and codec != "float32" else codec]
        assert not result[~valid].any()


def test_golden_compact_store():
    """Written once by version 2 of the format; every later version has to read it. Never made again."""
    import tcsae

    store = tcsae.open_store(GOLDEN / "compact-v2.zarr")
    assert store.content == CONTENT
    place = np.arange(40 * 4 * 6).reshape(40, 4, 6)
    expected = np.sin(place * 0.7) * np.arange(6, 0, -1)
    valid = np.arange(4) < store.train.lengths[:, None]
    for result in (store.train.read("h", 0, 40), read(GOLDEN / "compact-v2.zarr", "train", "h")):
        off = np.square(result - expected)[valid].sum(1).mean() / expected[valid].var(0).sum()
        assert 5e-3 < off < 1.5e-2
        assert not result[~valid].any()
    np.testing.assert_allclose(store.eval.read("h", 0, 2), expected[:2], atol=4e-3)


CONTENT = "ebe20a5b0e52360ba1d487995d8e4f30f8b28327e38c4012a6887b1e2d93c9a3"
