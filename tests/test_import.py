"""Promise: activations that other programs saved become a store: every token once, whole sequences, or a refusal."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from tcsae.harvest.imports import array_files, foreign_caches
from tcsae.harvest.imports.run import ImportRequest, import_store
from tcsae.shared.base.errors import ConfigError, DataError, StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.verify import find_faults

WIDTH, ROWS, LENGTH = 4, 50, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several reads a source."""
    for module in (array_files, foreign_caches):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 5 * LENGTH)


def x_of(row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Activations that say where they are from."""
    return np.stack([row, position, row * 0 + 1, row % 7], -1).astype(np.float32)


GRID = np.mgrid[0:ROWS, 0:LENGTH]
X, IDS = x_of(*GRID), GRID[0] * 10 + GRID[1]
DOCUMENTS = np.arange(ROWS) // 3


def saelens(path, **_):
    from datasets import Array2D, Dataset, Features, Sequence, Value

    features = Features(
        {"blocks.1.hook_resid_post": Array2D((LENGTH, WIDTH), "float32"), "token_ids": Sequence(Value("int32"), LENGTH)}
    )
    rows = {"blocks.1.hook_resid_post": list(X), "token_ids": IDS.tolist()}
    Dataset.from_dict(rows, features=features).save_to_disk(str(path))


def vllm(path, packed: bool = False, **_):
    path.mkdir()
    for i, document in enumerate(np.split(np.arange(ROWS * LENGTH), np.arange(1, 12) * 23)):
        states = torch.from_numpy(X.reshape(-1, WIDTH)[document])[:, None].repeat(1, 2, 1).bfloat16()
        states[:, 1] *= 2
        data = safetensors.torch.save(
            {"hidden_states": states.contiguous(), "token_ids": torch.from_numpy(IDS.reshape(-1)[document])}
        )
        name = path / f"hs_{i}.safetensors"
        if packed and i % 2:
            import zstandard

            name, data = path / f"hs_{i}.safetensors.zst", zstandard.compress(data)
        name.write_bytes(data)
        (path / f"hs_{i}.safetensors.lock").touch()


def arrays(path, form: str, flat: bool = False, documents: bool = False):
    """In two parts, whose border lies within a document."""
    path.mkdir()
    for part, rows in enumerate((slice(0, 20), slice(20, ROWS))):
        named = {"layer4": X[rows], "tokens": IDS[rows]}
        if flat:
            named = {name: one.reshape(-1, *one.shape[2:]) for name, one in named.items()}
        if documents:
            named["documents"] = np.repeat(DOCUMENTS[rows], LENGTH) if flat else DOCUMENTS[rows]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in named.items()}
        if form == "npy":
            for name, one in named.items():
                np.save(path / f"{name}_{part}.npy", one)
        elif form == "safetensors":
            safetensors.torch.save_file(tensors, path / f"part{part}.safetensors")
        else:
            torch.save(tensors, path / f"part{part}.pt")


def stored_tokens(store) -> dict[int, tuple[float, ...]]:
    """id -> activations, of every token of both splits; each id stands once."""
    result: dict[int, tuple[float, ...]] = {}
    for split in (store.train, store.eval):
        x = split.read(store.hooks[0], 0, split.n_sequences)
        for row, length in enumerate(split.lengths):
            assert (np.diff(split.tokens[row, :length]) > 0).all(), "consecutive tokens of the source"
            for position in range(length):
                assert result.setdefault(int(split.tokens[row, position]), tuple(x[row, position].tolist()))
    assert len(result) == store.train.n_tokens + store.eval.n_tokens
    return result


SOURCES = {
    "saelens": (saelens, "saelens", {}, ROWS),
    "vllm": (vllm, "vllm", {}, 12),
    "vllm-packed": (vllm, "vllm", {"packed": True}, 12),
    "npy": (arrays, "npy", {"form": "npy"}, ROWS),
    "npy-documents": (arrays, "npy", {"form": "npy", "documents": True}, 17),
    "npy-flat-documents": (arrays, "npy", {"form": "npy", "flat": True, "documents": True}, 17),
    "safetensors": (arrays, "safetensors", {"form": "safetensors", "documents": True}, 17),
    "nnsight": (arrays, "nnsight", {"form": "nnsight"}, ROWS),
}


@pytest.mark.parametrize(("make", "form", "options", "n_documents"), SOURCES.values(), ids=SOURCES)
def test_every_token_is_there_once_with_its_activations(tmp_path, make, form, options, n_documents):
    make(tmp_path / "source", **options)
    length = 5 if form == "vllm" else None
    request = ImportRequest(form=form, path=tmp_path / "source", min_length=1, eval_every=4, sequence_length=length)
    store, counts = import_store(str(tmp_path / "a.zarr"), request)
    assert not list(find_faults(store.location, [].append))
    assert counts["tokens_read"] == X[..., 0].size
    assert counts["tokens_dropped_short"] == 0
    result = stored_tokens(store)
    expected = {int(i): tuple(one.tolist()) for i, one in zip(IDS.flat, X.reshape(-1, WIDTH), strict=True)}
    assert result == expected
    assert store.train.n_documents + store.eval.n_documents == n_documents
    assert store.eval.n_documents > 0
    if form == "vllm":
        assert store.hooks == ("layer_0", "layer_1")
        assert float(store.train.read("layer_1", 0, 1)[0, 0, 2]) == 2


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_masked_positions_are_not_stored(tmp_path, flat, documents):
    arrays(tmp_path / "source", "npy", flat=flat, documents=documents)
    mask = GRID[1] < 1 + GRID[0] % LENGTH
    for part, rows in enumerate((slice(0, 20), slice(20, ROWS))):
        np.save(tmp_path / f"source/attention_mask_{part}.npy", mask[rows].reshape(-1 if flat else mask[rows].shape))
    request = ImportRequest(form="npy", path=tmp_path / "source", min_length=1, eval_every=4)
    store, counts = import_store(str(tmp_path / "a.zarr"), request)
    assert counts["tokens_read"] == mask.sum()
    assert sorted(stored_tokens(store)) == sorted(IDS[mask].tolist())


def test_without_boundaries_vectors_are_single_and_windows_are_refused(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, WIDTH)))
    request = ImportRequest(form="npy", path=tmp_path / "x.npy", eval_every=3)
    store, counts = import_store(str(tmp_path / "a.zarr"), request)
    assert "No sequence boundaries: the vectors are stored one by one, without windows" in capsys.readouterr().err
    assert (store.sequence_length, counts["train"] + counts["eval"]) == (1, 3000)

    def train(*arguments: str):
        runs = ("--store", str(tmp_path / "a.zarr"), "--runs", str(tmp_path / "runs"))
        size = ("--steps", "3", "--set", "sae.d_sae=16", "--set", "sae.k=2")
        return CliRunner().invoke(cli, [*runs, "train", *size, *arguments])

    for arguments in ((), ("--set", "data.skip_first=0")):
        refused = train(*arguments)
        assert refused.exit_code == 1
        assert "single vectors without the order of a text: no windows" in refused.output
        assert refused.output.strip().count("\n") <= 1
    assert train("--preset", "topk", "--set", "data.skip_first=0").exit_code == 0


@pytest.mark.slow
def test_a_start_token_cuts_packed_documents_and_streams(tmp_path):
    ids = np.where(GRID[1] % 4 == 1, 7, IDS + 100)
    for flat in (False, True):
        folder = tmp_path / f"flat-{flat}"
        folder.mkdir()
        np.save(folder / "layer4.npy", X.reshape(-1, WIDTH) if flat else X)
        np.save(folder / "tokens.npy", ids.reshape(-1) if flat else ids)
        request = ImportRequest(form="npy", path=folder, start_token=7, min_length=1, eval_every=5)
        store, counts = import_store(f"{folder}.zarr", request)
        assert counts["train"] + counts["eval"] == ids.size
        assert not list(find_faults(store.location, [].append))
        for split in (store.train, store.eval):
            assert not (split.tokens[:, 1:] == 7).any(), "only at the start of a sequence"
    store, _ = import_store(str(tmp_path / "short.zarr"), ImportRequest(form="npy", path=folder, start_token=7))
    assert store.train.lengths.min() >= 3


def spoil(path, kind):
    if kind == "unfinished":
        saelens(path)
        (path / ".tmp_shards").mkdir()
        return "saelens", "is unfinished. Give the folder of new_cached_activations_path"
    if kind == "no dataset":
        path.mkdir()
        return "saelens", r"is no dataset as SAELens saves it \(no state.json\)"
    if kind == "nothing":
        path.mkdir()
        return "vllm", "holds no .safetensors file"
    if kind == "cut off":
        vllm(path)
        (path / "hs_3.safetensors").write_bytes((path / "hs_3.safetensors").read_bytes()[:-9])
        return "vllm", "hs_3.safetensors is no file of vLLM's hidden states"
    if kind == "pickle":
        path.mkdir()
        torch.save({"layer4": print}, path / "a.pt")
        return "nnsight", "a.pt cannot be read"
    arrays(path, "npy", documents=True)
    if kind == "misfit":
        np.save(path / "tokens_1.npy", IDS[:3])
        return "npy", r"tokens has shape \[3, 6\], activations are of \[30, 6\]"
    if kind == "parts differ":
        (path / "documents_1.npy").unlink()
        return "npy", "no documents; the first, .* Give parts that are alike"
    if kind == "documents fall":
        np.save(path / "documents_1.npy", DOCUMENTS[20:][::-1])
        return "npy", "documents fall, after .* Sort the tokens by document"
    if kind == "no activations":
        for file in path.glob("layer4*"):
            file.unlink()
        return "npy", r"has no activations, \[sequences, positions, width\]"
    np.save(path / "layer4_1.npy", np.where(X[20:] == 1, np.nan, X[20:]))
    assert kind == "nan"
    return "npy", "NaN or infinite"


KINDS = (
    *("unfinished", "no dataset", "nothing", "cut off", "pickle", "misfit", "parts differ", "documents fall"),
    *("no activations", "nan"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(tmp_path, kind):
    form, message = spoil(tmp_path / "source", kind)
    with pytest.raises(DataError, match=message):
        import_store(str(tmp_path / "a.zarr"), ImportRequest(form=form, path=tmp_path / "source"))
    with pytest.raises(StoreError, match="No activation store"):
        open_store(tmp_path / "a.zarr")


def test_lengths_of_single_vectors_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", layer4=X.reshape(-1, WIDTH), lengths=np.full(ROWS * LENGTH, LENGTH))
    message = r"lengths are of sequences, activations are of \[300\] tokens. Give documents or attention_mask"
    with pytest.raises(DataError, match=message):
        import_store(str(tmp_path / "a.zarr"), ImportRequest(form="npy", path=tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hooks": ("a", "b")}, r"--hook a b: the source has 1, layer4. Name some"),
        ({"hooks": ("a/b",)}, "The name 'a/b' has a / in it"),
        ({"eval_every": 1}, "--eval-every 1: at least 2"),
        ({"start_token": 3}, "--start-token 3: .* has no token ids"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, change, message):
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source/layer4.npy", X)
    with pytest.raises(ConfigError, match=message):
        import_store(str(tmp_path / "a.zarr"), ImportRequest(form="npy", path=tmp_path / "source", **change))


def test_the_command_keeps_names_and_tokenizer_and_states_counts(tmp_path, tiny_lm):
    vllm(tmp_path / "source")
    named = ("--hook", "layer8", "--hook", "layer16", "--model", "some/model", "--tokenizer", str(tiny_lm))
    arguments = ["import", "--from", "vllm", str(tmp_path / "source"), *named, "--eval-every", "3"]
    done = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), *arguments])
    assert done.exit_code == 0, done.output
    assert "300 tokens read = 300 stored + 0" in done.output
    store = open_store(tmp_path / "a.zarr")
    assert store.hooks == ("layer8", "layer16")
    assert store.manifest.recipe.model.name == "some/model"
    assert json.loads((store.tokenizer_path / "tokenizer.json").read_text())["added_tokens"]
    again = CliRunner().invoke(cli, ["--store", str(tmp_path / "a.zarr"), *arguments])
    assert again.exit_code == 1
    assert "is there already" in again.output
