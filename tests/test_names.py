"""Promise: what a store says of itself never leads out of it, nor takes memory for what is not there."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import toy_store as toy
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.shared.base.errors import StoreError, TcsaeError
from tcsae.shared.base.files import json_digest
from tcsae.shared.commands.group import cli
from tcsae.shared.store.extend import extend
from tcsae.shared.store.places import objects_at
from tcsae.shared.store.reader import check_manifest, open_store
from tcsae.shared.store.verify import find_faults


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return toy.make(tmp_path_factory.mktemp("names") / "a.zarr", "float16")


@pytest.fixture
def store(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a.zarr"))


def manifest_of(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]["tcsae"]


def sign(path: Path, manifest: dict) -> None:
    """Write the manifest with a digest that fits it, as a forger does."""
    blank = {**manifest, "digest": ""}
    signed = {**manifest, "digest": json_digest(blank)}
    root = {"zarr_format": 3, "node_type": "group", "attributes": {"tcsae": signed}}
    (path / "zarr.json").write_text(json.dumps(root, indent=2) + "\n")


LEADING_OUT = [
    "/etc/passwd",
    "tokenizer/../../../x",
    "..",
    "tokenizer/..",
    "tail/./x",
    "tail//x",
    "tokenizer/",
    "",
    "tokenizer\\..\\x",
    "C:/x",
    "tokenizer/a\0b",
    "tokenizer/\x1b[2J",
    "tokenizer/\u202egnp.exe",
    "train/tokens/c/0/0",
    "zarr.json",
]


@pytest.mark.parametrize("key", LEADING_OUT)
def test_a_key_that_leads_elsewhere_is_refused_by_all(store, tmp_path, key):
    manifest = manifest_of(store)
    manifest["files"].append(key)
    sign(store, manifest)
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: open_store(store),
        lambda: list(find_faults(str(store), lambda n: None)),  # noqa: ARG005
        lambda: extend(str(store), toy_recipe(store)),
    ):
        with pytest.raises(StoreError, match=r"cannot be the key of an object|neither of a tail nor of the tokenizer"):
            use()
    done = CliRunner().invoke(cli, ["copy", "--from", str(store), "--to", str(tmp_path / "b.zarr")])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.rstrip("\n").isprintable()
    assert sorted(tmp_path.rglob("*")) == before


def toy_recipe(path: Path):
    from tcsae.shared.store.format import manifest_from_json

    return manifest_from_json(manifest_of(path)).recipe


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/x", "a\\b", "a\nb"])
def test_a_hook_s_name_that_leads_elsewhere_is_refused(store, name):
    manifest = manifest_of(store)
    manifest["recipe"]["hooks"][0]["requested"] = name
    sign(store, manifest)
    with pytest.raises(StoreError, match="cannot be the key of an object|the manifest in zarr.json is damaged"):
        open_store(store)


@pytest.mark.parametrize("digest", ["", "../../x", "A" * 64, "0" * 63, "g" * 64, "0" * 65, "/"])
@pytest.mark.parametrize("field", ["content", "checksums_metadata"])
def test_what_is_no_digest_is_refused(store, field, digest):
    manifest = manifest_of(store)
    manifest[field] = digest
    sign(store, manifest)
    with pytest.raises(StoreError, match=rf"{field} '.*' is no sha256"):
        open_store(store)


def test_another_store_s_content_is_refused(store):
    """So that it cannot lie in the cache under the other's name."""
    manifest = manifest_of(store)
    manifest["content"] = "0" * 64
    sign(store, manifest)
    with pytest.raises(StoreError, match="checksums/c/0/0 does not fit the manifest's content digest"):
        open_store(store).tail_path(toy.HOOK)


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", ""])
def test_nothing_is_written_under_such_a_key(store, key):
    with pytest.raises(StoreError, match="cannot be the key of an object"):
        objects_at(str(store)).put(key, b"x")


def claim(*path_and_value):
    def change(manifest: dict) -> None:
        *path, last, value = path_and_value
        for part in path:
            manifest = manifest[part]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        claim("counts", "train", {"sequences": 10**12, "tokens": 10**12, "documents": 10}),
        claim("counts", "train", {"sequences": 10**30, "tokens": 10**30, "documents": 10}),
        claim("counts", "train", "sequences", -1),
        claim("counts", "train", "sequences", 1.5),
        claim("counts", "train", "tokens", 10**9),
        claim("counts", "eval", None),
        claim("counts", {}),
        claim("layout", "sequences_per_chunk", 0),
        claim("layout", "sequences_per_chunk", -1),
        claim("layout", "sequences_per_token_chunk", 0),
        claim("layout", "sequences_per_chunk", 1),
        claim("layout", "chunks_per_shard", 0),
        claim("recipe", "sequences", "length", 0),
        claim("recipe", "sequences", "length", 10**15),
        claim("recipe", "hooks", []),
        claim("recipe", "hooks", 0, "d_model", 0),
        claim("recipe", "hooks", 0, "d_model", 10**12),
        claim("recipe", "codec", "zip"),
        claim("files", []),
        claim("state", "sealing"),
        claim("version", None),
        claim("version", "2"),
        claim("recipe", None),
        claim("history", 5),
        claim("tails", 5),
    ],
)
def test_a_manifest_that_lies_is_refused_before_anything_is_allocated(store, tmp_path, change):
    manifest = manifest_of(store)
    change(manifest)
    sign(store, manifest)
    for command in (["inspect"], ["verify"], ["copy", "--from", str(store), "--to", str(tmp_path / "b.zarr")]):
        done = CliRunner().invoke(cli, ["--store", str(store), "--runs", str(tmp_path / "runs"), *command])
        assert isinstance(done.exception, SystemExit), (command, done.exception)
        assert done.exit_code == 1, command
        assert str(store) in done.output or "checksums" in done.output


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 10**7}, {"n_layer": 10**7}, {"text_config": {"num_layers": 99}}]
)
def test_a_tail_that_claims_more_layers_than_it_has_tensors(tmp_path, config):
    data = json.dumps({"model_type": "gpt_neox", **config}).encode()
    path = toy.make(tmp_path / "a.zarr", "float16", files={toy.CONFIG: data})
    with pytest.raises(StoreError, match=r"config.json claims [0-9,]+ layers; its weights are 1 tensors"):
        open_store(path).tail_path(toy.HOOK)


ROOTS = [b"", b"[]", b"null", b"{}", b'{"attributes": []}', b'{"attributes": null}', b'{"attributes": {"tcsae": []}}',
         b"\xff\xfe", b"[" * 100_000, b"<html>404</html>", b'{"attributes": {"tcsae": 1}}']  # fmt: skip


@pytest.mark.parametrize("root", ROOTS, ids=range(len(ROOTS)))
def test_a_root_that_is_no_manifest(store, root):
    (store / "zarr.json").write_bytes(root)
    with pytest.raises(StoreError, match="is not an activation store|has format None"):
        open_store(store)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5), st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(st.integers(0, 2**32), JUNK)
@settings(max_examples=150)
def test_any_manifest_is_read_or_refused_in_one_line(original, seed, junk):
    """One place of the manifest, drawn at random, holds something else; its digest fits."""
    manifest = copy.deepcopy(manifest_of(original))
    rng, node = random.Random(seed), manifest
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            break
        node = inner
    node[key] = junk
    signed = json.loads(json.dumps({**manifest, "digest": json_digest({**manifest, "digest": ""})}))
    try:
        result = check_manifest("a.zarr", signed)
    except TcsaeError as error:
        assert "\n" not in str(error)
        return
    result.n_objects()
    result.to_json()
