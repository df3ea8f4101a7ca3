"""Promise: what a codec stores comes back within what it promises, nothing is clipped, and order changes no byte."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tcsae
from tcsae.shared.base.errors import ConfigError, DataError
from tcsae.shared.store.codecs import CODECS, Decoder, check_codec, encode, eval_codec, fit
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.reader import Store, open_store
from tcsae.shared.store.writer import Rows, open_writer
from tcsae.train.config import DataConfig
from tcsae.train.loader import SegmentLoader

HOOK, LENGTH, WIDTH = "a", 6, 16
FITTED = ("bfloat16", "int8", "compact")


def correlated(n: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Tokens with a falling spectrum in a rotated basis, a mean, and one in 200 a hundred times as large."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]
    x = rng.normal(size=(n, width)) * np.arange(1, width + 1) ** -0.7 @ rotation + np.linspace(-1, 3, width)
    x[::200] *= 100
    return x.astype(np.float32)


def decode(rows: np.ndarray, codec: str, parameters: dict[str, np.ndarray]) -> np.ndarray:
    signed = rows.view(f"i{rows.itemsize}") if codec in FITTED else rows
    return Decoder(codec, parameters)(torch.from_numpy(signed)).numpy()


@pytest.mark.parametrize("error", [1e-1, 1e-2, 1e-3, 1e-5])
def test_compact_keeps_its_error_on_other_tokens(error):
    parameters = fit("compact", correlated(20000), error)
    x = correlated(5000, seed=7)
    result = decode(encode(x, "compact", parameters), "compact", parameters)
    norms = np.linalg.norm(x, axis=1)
    kept = x[norms <= np.percentile(norms, 99)].astype(np.float64)
    variance = np.square(kept - kept.mean(0)).sum(1).mean()
    assert np.square(result - x.astype(np.float64)).sum(1).mean() / variance == pytest.approx(error, rel=0.15)
    # Massive tokens are no worse than the others: no number is off by more than rounding each coefficient gives.
    assert np.linalg.norm(result - x, axis=1).max() <= parameters["step"][0] * np.sqrt(WIDTH) / 2 * 1.01 + 1e-3
    np.testing.assert_allclose(parameters["basis"] @ parameters["basis"].T, np.eye(WIDTH), atol=1e-5)


def test_compact_codes_are_zigzag_in_the_basis():
    parameters = fit("compact", correlated(1000), 1e-2)
    x = correlated(300, seed=3)
    q = np.rint((x - parameters["mean"]) @ parameters["basis"].T / parameters["step"]).astype(np.int64)
    np.testing.assert_array_equal(encode(x, "compact", parameters), np.where(q < 0, -2 * q - 1, 2 * q))
    energy = np.square(q.astype(float)).mean(0)
    assert energy[0] > energy[WIDTH // 2] > energy[-1], "the dimensions stand in order of variance"


def test_every_code_of_16_bits_is_the_same_in_32():
    codes = torch.arange(2**16)[:, None]
    one = {"mean": np.zeros(1, "f4"), "basis": np.ones((1, 1), "f4"), "step": np.ones(1, "f4")}
    expected = torch.where(codes % 2 == 0, codes // 2, -(codes + 1) // 2).float()
    for dtype in (torch.int16, torch.uint16, torch.int32, torch.uint32):
        torch.testing.assert_close(Decoder("compact", one)(codes.to(dtype)), expected, rtol=0, atol=0)


@given(st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=20)
def test_int8_is_within_half_a_step_of_the_token(seed, scale):
    parameters = fit("int8", correlated(500) * np.float32(scale))
    x = correlated(50, seed=seed) * np.float32(scale)
    y = (x - parameters["mean"]) / parameters["scale"]
    step = np.abs(y).max(axis=1, keepdims=True) / 127
    off = np.abs(decode(encode(x, "int8", parameters), "int8", parameters) - x) / parameters["scale"]
    assert (off <= step * 0.501 + 1e-6 * np.abs(x / parameters["scale"])).all()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1))
def test_bfloat16_is_torch_s(values):
    x = np.array([values], np.float32)
    expected = torch.from_numpy(x).bfloat16()
    rows = encode(x, "bfloat16")
    np.testing.assert_array_equal(rows, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(decode(rows, "bfloat16", {}), expected.float().numpy())


@pytest.mark.parametrize("codec, largest", [("float16", 65505), ("bfloat16", 3.4e38), ("compact", 1e12)])
def test_too_large_is_said_with_the_cure(codec, largest):
    parameters = fit(codec, correlated(100), 1e-2)
    with pytest.raises(DataError, match=f"exceeds {codec}'s .*Harvest with --codec float32"):
        encode(np.full((1, WIDTH), largest, np.float32), codec, parameters)


def test_what_never_varies_and_what_is_not_there():
    for codec in ("int8", "compact"):
        for x in (np.full((9, 3), 2, np.float32), np.zeros((0, 3), np.float32)):
            parameters = fit(codec, x, 1e-2)
            assert all(np.isfinite(values).all() for values in parameters.values())
            np.testing.assert_allclose(decode(encode(x, codec, parameters), codec, parameters), x, atol=1e-6)


def test_settings_that_make_no_sense():
    assert check_codec("compact", None) == 1e-2
    assert check_codec("int8", None) is None
    with pytest.raises(ConfigError, match="--codec-error belongs to --codec compact"):
        check_codec("float16", 1e-3)
    with pytest.raises(ConfigError, match="--codec-error 2: give a relative squared error"):
        check_codec("compact", 2.0)


def write(path, codec: str, x: np.ndarray, order=lambda shards: shards, stop_after: int | None = None):
    """A store of 40 + 7 sequences with x's tokens; or a part of one."""
    recipe = Recipe(
        model=ModelRecipe(name="toy", revision="1"),
        corpus=CorpusRecipe(name="numbers", revision="1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=(HookRecipe(requested=HOOK, canonical=HOOK, d_model=WIDTH),),
        codec=codec,
        codec_error=check_codec(codec, None),
        n_tokens=1,
    )
    writer = open_writer(str(path), recipe, Layout(sequences_per_chunk=3))
    n = {"train": 40, "eval": 7}
    lengths = {s: np.random.default_rng(n[s]).integers(1, LENGTH + 1, n[s]).astype("i4") for s in SPLITS}
    if not writer.planned:
        none = {s: np.zeros((n[s], LENGTH), np.int32) for s in SPLITS}
        rows = {s: Rows(none[s], lengths[s], np.arange(n[s]) + 100 * (s == "eval"), none[s][:, 0]) for s in SPLITS}
        writer.commit(rows, {})
        writer.finish_sequences(
            {s: {"sequences": n[s], "tokens": int(lengths[s].sum()), "documents": n[s]} for s in SPLITS}
        )

    def run(shard) -> dict[str, np.ndarray]:
        first = (shard.start + 40 * (shard.split == "eval")) * LENGTH
        part = x[first : first + (shard.stop - shard.start) * LENGTH].reshape(-1, LENGTH, WIDTH)
        valid = np.arange(LENGTH)[:, None] < lengths[shard.split][shard.start : shard.stop, None, None]
        return {HOOK: np.where(valid, part, np.nan)}

    writer.fit_codec(run)
    for number, shard in enumerate(order(writer.missing_shards())):
        if number == stop_after:
            writer.close()
            return None
        writer.write_shard(shard, run(shard))
    writer.seal({HOOK: {"none": "toy"}}, [], {})
    return open_store(path)


def contents(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_any_order_and_any_stop_give_the_same_bytes(tmp_path, codec):
    x = correlated(47 * LENGTH)
    write(tmp_path / "a", codec, x)
    write(tmp_path / "b", codec, x, order=reversed)
    for stop in (0, 2, 5):
        assert write(tmp_path / "c", codec, x, order=lambda shards: shards[::-1], stop_after=stop) is None
    write(tmp_path / "c", codec, x)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.fixture(scope="module", params=CODECS)
def store(request, tmp_path_factory) -> Store:
    return write(tmp_path_factory.mktemp("codecs") / "a.zarr", request.param, correlated(47 * LENGTH))


def test_readers_see_activations_whatever_is_stored(store):
    x = correlated(47 * LENGTH).reshape(47, LENGTH, WIDTH)
    codec = store.manifest.recipe.codec
    for split, expected in ((store.train, x[:40]), (store.eval, x[40:])):
        valid = np.arange(LENGTH) < split.lengths[:, None]
        got = split.read(HOOK, 0, split.n_sequences)
        assert got.dtype == np.float32
        assert not got[~valid].any()
        bound = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}.get(split.codec(HOOK))
        if bound is None:
            typical = np.linalg.norm(expected, axis=2) < 20
            off = np.square((got - expected)[valid & typical]).sum(1).mean()
            assert 0 < off < 0.03 * x.reshape(-1, WIDTH).var(0).sum()
        else:
            np.testing.assert_allclose(got[valid], expected[valid], rtol=bound)
        np.testing.assert_array_equal(split.read(HOOK, 2, 5), got[2:5])
        assert not split.read_stored(HOOK, 0, split.n_sequences)[~valid].any(), "padding is stored as zero"
    assert store.eval.codec(HOOK) == ("float32" if codec == "float32" else "float16")


def test_the_loader_hands_out_what_read_gives(store):
    loader = SegmentLoader(store, DataConfig(n_segments=7, segment_length=3, skip_first=0, buffer_sequences=9))
    expected = store.train.read(HOOK, 0, 40)
    tokens = {document: expected[document] for document in range(40)}
    n_seen = 0
    for batch in itertools.islice(loader, loader.n_segments // 7):
        ends = np.cumsum(batch.lengths)
        for end, length, start, document in zip(ends, batch.lengths, batch.starts, batch.documents, strict=True):
            want = tokens[document][start : start + length]
            np.testing.assert_allclose(batch.x[end - length : end].numpy(), want, rtol=1e-5, atol=1e-5)
            n_seen += length
    assert n_seen > 100
    assert torch.isfinite(next(tcsae.iterate_tokens(store, batch_tokens=5))).all()


def test_a_block_that_does_not_fit_16_bits_is_held_in_32(tmp_path):
    x = correlated(47 * LENGTH)
    x[30 * LENGTH] *= 1e6
    store = write(tmp_path / "a.zarr", "compact", x)
    stored = store.train.read_stored(HOOK, 0, 40)
    assert stored.max() > 0xFFFF
    loader = SegmentLoader(store, DataConfig(n_segments=5, segment_length=6, skip_first=0, buffer_sequences=6))
    seen = np.concatenate([batch.x.numpy().copy() for batch in itertools.islice(loader, loader.n_segments // 5)])
    expected = store.train.read(HOOK, 0, 40)[np.arange(LENGTH) < store.train.lengths[:, None]]
    np.testing.assert_allclose(np.sort(seen.sum(1)), np.sort(expected.sum(1)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("codec", FITTED)
def test_an_eval_split_beyond_float16_is_float32(tmp_path, codec):
    x = correlated(47 * LENGTH)
    x[:: 3 * LENGTH, 0] = 40000  # float16 holds it, with little room for the sequences to come
    store = write(tmp_path / "a.zarr", codec, x)
    assert store.eval.codec(HOOK) == "float32"
    valid = np.arange(LENGTH) < store.eval.lengths[:, None]
    np.testing.assert_array_equal(store.eval.read(HOOK, 0, 7)[valid], x[40 * LENGTH :].reshape(7, LENGTH, WIDTH)[valid])
    assert eval_codec("float16", x) == "float16", "what float16 cannot hold, it refuses"
