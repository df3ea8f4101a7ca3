"""Promise: `inspect` shows what is there, finished or not, changes nothing, and text cannot play with the terminal."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tcsae.shared.base.files import file_digest
from tcsae.shared.commands.group import cli
from tcsae.shared.lm.token_text import legible
from tcsae.shared.sae.folder import save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.create import create_store
from tcsae.shared.store.format import SPLITS, CorpusRecipe, HookRecipe, Layout, ModelRecipe, Recipe, SequenceRecipe
from tcsae.shared.store.writer import Rows, StoreWriter, open_writer

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")
LENGTH, WIDTH, N_SEQUENCES = 48, 8, 6
TEXT = "one\ttab,\na [red]mark[/red] and \x1b[31ma code\x07"


def begin(path: Path, n_chunks: int = 1) -> StoreWriter:
    recipe = Recipe(
        model=ModelRecipe(name="toy/model", revision="0123456789abcdef0123456789abcdef01234567"),
        corpus=CorpusRecipe(name="toy/corpus", revision="r1"),
        sequences=SequenceRecipe(length=LENGTH),
        hooks=tuple(HookRecipe(requested=hook, canonical=hook, d_model=WIDTH) for hook in HOOKS),
        n_tokens=1,
    )
    writer = open_writer(str(path), recipe, Layout(sequences_per_chunk=2, chunks_per_shard=n_chunks))
    assert writer is not None
    return writer


def write_sequences(writer: StoreWriter) -> None:
    ids = np.frombuffer(TEXT.encode().ljust(LENGTH, b"~"), np.uint8).astype(np.int32)
    tokens, lengths = np.tile(ids, (N_SEQUENCES, 1)), np.full(N_SEQUENCES, len(TEXT), np.int32)
    rows = Rows(tokens, lengths, np.arange(10, 10 + N_SEQUENCES), np.full(N_SEQUENCES, 128, np.int32))
    writer.commit(dict.fromkeys(SPLITS, rows), {"counts": {}})


def finish_sequences(writer: StoreWriter) -> None:
    one = {"sequences": N_SEQUENCES, "tokens": N_SEQUENCES * len(TEXT), "documents": N_SEQUENCES}
    writer.finish_sequences({split: dict(one) for split in SPLITS} | {"documents_read": 1234, "corpus_exhausted": True})


def write_shards(writer: StoreWriter, n: int) -> None:
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards()[:n]:
        x = 3 + rng.normal(size=(shard.stop - shard.start, LENGTH, WIDTH))
        writer.write_shard(shard, dict.fromkeys(HOOKS, x.astype(np.float32)))


def save_tokenizer(folder: Path) -> Path:
    """Token i is byte i."""
    letters = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A sealed store with two hooks, one of them with a tail as far as the manifest knows."""
    folder = tmp_path_factory.mktemp("inspect")
    writer = begin(folder / "a.zarr")
    write_sequences(writer)
    finish_sequences(writer)
    write_shards(writer, 100)
    files = writer.add_folder("tokenizer", save_tokenizer(folder / "tokenizer"))
    tails = {HOOKS[0]: {"layers": 1, "max_difference": 2e-5}, HOOKS[1]: {"none": "it is no residual stream"}}
    writer.seal(tails, files, {"sealed": "2026-01-02T03:04:05+00:00", "seconds": 12.5, "tokens_per_s": None})
    return folder / "a.zarr"


def inspect(store: Path, runs: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["--store", str(store), "--runs", str(runs), "inspect", *options])


def everything_in(folder: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_a_sealed_store_on_one_screen(path, tmp_path):
    before = everything_in(path)
    done = inspect(path, tmp_path, "--details")
    assert done.exit_code == 0, done.output
    shown = done.stdout
    content = json.loads((path / "zarr.json").read_text())["attributes"]["tcsae"]["content"]
    for expected in (
        f"sealed, format 2, content {content[:12]}",
        "toy/model, revision 0123456789abcdef012…",
        "toy/corpus, revision r1, split train",
        "up to 48 tokens of one document, no BOS; one document in 20 is eval",
        f"{N_SEQUENCES * len(TEXT)} tokens in 6 sequences of 6 documents",
        "documents read 1,234",
        "sealed 2026-01-02T03:04:05+00:00, seconds 12.5",
        f"tail       1 layer, log-probabilities within {2e-05} nats of the whole model's",
        "tail       none, so no cross-entropies: it is no residual stream",
        "No runs in ",
    ):
        assert expected in shown, expected
    assert shown.count("stored as float16") == 1
    short = inspect(path, tmp_path).stdout
    assert "sealed, format 2\n" in short and "toy/model, float32 on" in short
    assert content[:12] not in short and "revision" not in short
    assert len(shown.splitlines()) < 50
    assert everything_in(path) == before


def test_sizes_are_those_on_disk(path, tmp_path):
    shown = inspect(path, tmp_path).stdout
    n_tokens = 2 * N_SEQUENCES * len(TEXT)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert f"{total / n_tokens:.1f} bytes per valid token" in shown
    for hook in HOOKS:
        n_bytes = sum(f.stat().st_size for f in path.rglob(f"activations/{hook}/**/*") if f.is_file())
        line = next(line for line in shown.splitlines() if line.endswith(f"activations {hook}"))
        assert f"{n_bytes / n_tokens:.2f}" in line


def test_norms_come_from_the_statistics(path, tmp_path):
    line = next(line for line in inspect(path, tmp_path).stdout.splitlines() if "norm of x" in line)
    rms = float(line.split("RMS ")[1].split(",")[0])
    median = float(line.split("median about ")[1].split(",")[0])
    assert rms == pytest.approx(np.sqrt(WIDTH * (9 + 1)), rel=0.05)
    assert median == pytest.approx(rms, rel=0.1)
    assert float(line.split("norm of the mean ")[1]) == pytest.approx(3 * np.sqrt(WIDTH), rel=0.05)


@pytest.mark.parametrize("factor, n", [(9.0, 0), (12.0, 3)])
def test_outliers_of_the_norm_are_counted_with_their_cure(tmp_path, factor, n):
    x = np.ones((4, 8, 16), np.float32)
    x[[0, 1, 3], [0, 0, 5]] *= factor
    with create_store(tmp_path / "a.zarr", hooks={"h": 16}, sequence_length=8) as creation:
        creation.append("train", {"h": x})
    shown = inspect(tmp_path / "a.zarr", tmp_path).stdout
    line = (
        "3 of 32 train tokens (4 begin a sequence) have over 10 median norms: data.skip_first=1 leaves out the first "
    )
    assert (line + "ones, data.max_norm=10 all" in shown) == (n == 3)
    assert ("  outliers  " in shown) == (n == 3)


def test_text_is_shown_as_text(path, tmp_path):
    legibly = "one⇥tab,⏎a [red]mark[/red] and \\x1b[31ma code\\x07"
    for options, n in (((), 3), (("--sequences", "5", "--split", "train"), 5), (("--sequences", "0"), 0)):
        done = inspect(path, tmp_path, *options)
        assert done.stdout.count(legibly) == n
        assert "\x1b" not in done.stdout
        assert "~" not in done.stdout, "padding is no text"
    assert f"[document 12, from token 128, {len(TEXT)} tokens]" in inspect(path, tmp_path).stdout


def test_legible_keeps_ordinary_text():
    assert legible("Grüße, 世界 🙂 naïve") == "Grüße, 世界 🙂 naïve"
    assert legible("a\u202eb\u2028c\r\n\x00") == "a\\u202eb⏎c␍⏎\\x00"


def test_runs_with_and_without_figures(path, tmp_path):
    content = json.loads((path / "zarr.json").read_text())["attributes"]["tcsae"]["content"]
    sae = SparseAutoencoder(SaeConfig(d_model=WIDTH, d_sae=77, k=5))
    record = {"preset": "topk", "steps": 1234, "tokens": 56789}
    for name in ("evaluated", "other-store", "retrained", "fresh", "damaged"):
        save_sae(sae, tmp_path / name, record, {})
        evaluation = {
            "store": {"content": "0" * 64 if name == "other-store" else content},
            "weights": "0" * 64 if name == "retrained" else file_digest(tmp_path / name / "sae_weights.safetensors"),
            "metrics": {"l0": 4.75, "explained_variance": 0.8125, "ce_loss_score": 0.9375},
        }
        if name != "fresh":
            (tmp_path / name / "eval.json").write_text(json.dumps(evaluation))
    (tmp_path / "damaged" / "tcsae.json").write_text("{")
    (tmp_path / "going").mkdir()
    (tmp_path / "going.1.partial").mkdir()
    done = inspect(path, tmp_path)
    assert done.exit_code == 0, done.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    rows = {row[0]: row[1:] for row in cells}
    trained = ["topk", "topk 5", "77", "1,234", "56,789"]
    assert rows == {
        "evaluated": [*trained, "4.75", "0.8125", "0.9375"],
        "other-store": [*trained, "-", "-", "-"],
        "retrained": [*trained, "-", "-", "-"],
        "fresh": [*trained, "-", "-", "-"],
        "damaged": ["damaged", *["-"] * 7],
        "going": ["unfinished", *["-"] * 7],
    }


@pytest.mark.parametrize("n_chunks, n_shards", [(1, 6), (2, 4)])
def test_an_unfinished_store_says_how_far_it_is(tmp_path, n_chunks, n_shards):
    path = tmp_path / "b.zarr"
    with begin(path, n_chunks) as writer:
        for step, expected in (
            (lambda: None, "phase 1 of 2, sequences: 0 train and 0 eval written"),
            (lambda: write_sequences(writer), "phase 1 of 2, sequences: 6 train and 6 eval written"),
            (lambda: finish_sequences(writer), f"phase 2 of 2, activations: 0 of {n_shards} shards written"),
            (lambda: write_shards(writer, 3), f"phase 2 of 2, activations: 3 of {n_shards} shards written"),
        ):
            step()
            before = everything_in(path)
            done = inspect(path, tmp_path / "runs")  # while another holds the writer's lock
            assert done.exit_code == 0, done.output
            assert "unfinished. The same harvest goes on where it stopped." in done.stdout
            assert "toy/model" in done.stdout
            assert expected in done.stdout
            assert everything_in(path) == before


def test_without_a_tokenizer_ids_are_shown(tmp_path):
    writer = begin(tmp_path / "c.zarr")
    write_sequences(writer)
    finish_sequences(writer)
    write_shards(writer, 100)
    writer.seal({}, [], {})
    shown = inspect(tmp_path / "c.zarr", tmp_path / "runs").stdout
    assert "(no tokenizer in the store) 111 110 101 9 116" in shown
    assert shown.count("none was saved") == len(HOOKS)


def test_no_store_is_one_line(tmp_path):
    done = inspect(tmp_path / "d.zarr", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: No activation store at")
    assert len(done.stderr.splitlines()) == 1
