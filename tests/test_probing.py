"""Promise: probes with free labels score what a code says of text, not what chance, ids or the chosen half say."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import toy_eval
from click.testing import CliRunner
from pyarrow import parquet
from scipy.optimize import minimize
from scipy.sparse import csr_array

from tcsae.evaluate.probing.given_labels import corpus_fields, field_labels, held_out_groups, read_labels
from tcsae.evaluate.probing.scores import auroc, discriminant, grouped_auroc, logistic
from tcsae.evaluate.probing.suite import Label, Probe, choose_tokens, halves
from tcsae.evaluate.probing.text_labels import depth, sections, text_labels
from tcsae.shared.base.errors import DataError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.create import create_store


def pairs_auroc(scores, truth, group) -> float:
    above = n = 0.0
    for i, j in itertools.product(np.flatnonzero(truth), np.flatnonzero(~truth)):
        if group[i] == group[j]:
            n += 1
            above += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
    return above / n if n else float("nan")


@pytest.mark.parametrize("n_groups", [1, 4, 40])
def test_auroc_is_counting_pairs(n_groups):
    rng = np.random.default_rng(n_groups)
    scores, truth = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.3
    group = rng.integers(0, n_groups, 80)
    assert grouped_auroc(scores, truth, group) == pytest.approx(pairs_auroc(scores, truth, group))
    assert auroc(scores, truth) == pytest.approx(pairs_auroc(scores, truth, np.zeros(80)))
    assert np.isnan(auroc(scores, np.zeros(80, bool))) and np.isnan(auroc(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize("separable", [False, True])
def test_logistic_is_the_minimum(separable):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 4))
    truth = features[:, 0] - 0.5 * features[:, 2] > (0 if separable else rng.logistic(size=300))

    def loss(weights: np.ndarray) -> float:
        margin = np.where(truth, 1, -1) * (features @ weights[:4] + weights[4])
        return np.logaddexp(0, -margin).mean() + 1e-3 / 2 * (weights[:4] ** 2).sum()

    assert logistic(features, truth) == pytest.approx(minimize(loss, np.zeros(5)).x[:4], abs=2e-2)


def test_the_discriminant_separates_what_a_difference_of_means_does_not():
    rng = np.random.default_rng(2)
    truth = rng.random(4000) < 0.5
    noise = rng.normal(size=4000)
    x = np.stack([noise + truth, 5 * noise + 0.1 * rng.normal(size=4000)], 1)
    difference = np.array([1.0, 0.0])
    best = discriminant(difference[:, None], np.cov(x.T))
    assert auroc(x @ best[:, 0], truth) > 0.97 > 0.8 > auroc(x @ difference, truth)


TEXT = """Sum of two (numbers [or more]).

Parameters
----------
a : int
    The "first" one, see https://a.b/c for 12.

Returns
-------
int

>>> add(1, 2)
3

Args:
    b: second
Raises:
    ValueError: if not
- item
"""


def labelled(name: str, text: str = TEXT) -> str:
    """The characters that a label marks."""
    result = text_labels([list(text)])[name][1]
    return "".join(one for one, marked in zip(text, result, strict=True) if marked and not one.isspace())


@pytest.mark.parametrize(
    "name, marked",
    [
        ("doctest", ">>>add(1,2)"),
        ("quote", '"first"'),
        ("link", "https://a.b/c"),
        ("list_item", "-item"),
        ("in_nested_brackets", "ormore]"),
        ("indented", 'The"first"one,seehttps://a.b/cfor12.b:secondValueError:ifnot'),
        ("section_raises", "ValueError:ifnot"),
        ("section_parameters", 'a:intThe"first"one,seehttps://a.b/cfor12.b:second'),
        ("digits", "12123"),
    ],
)
def test_labels_of_a_text(name, marked):
    assert labelled(name) == marked


def test_depth_and_sections_by_hand():
    assert depth("a(b[c])d").tolist() == [0, 0, 1, 1, 2, 2, 1, 0]
    assert depth("a(\n\nb").tolist() == [0, 0, 1, 1, 0], "a blank line closes what was left open"
    marks = sections(TEXT)["returns"]
    assert "".join(one for one, mark in zip(TEXT, marks, strict=True) if mark).split() == [
        "int",
        ">>>",
        "add(1,",
        "2)",
        "3",
    ]


def test_a_token_is_what_its_first_letter_is():
    result = text_labels([["x", " (", "y", ")", ""], ["A"], []])
    assert result["in_brackets"][1].tolist() == [0, 0, 1, 1, 1, 0]
    assert result["capitalised"] == ("token", pytest.approx(np.array([0, 0, 0, 0, 0, 1])))


LENGTH, N = 20, 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Activations whose first dimension is slow: on in the second half of each sequence of odd documents."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("probing") / "a.zarr"
    with create_store(path, hooks={"h": 6}, sequence_length=LENGTH) as made:
        for split, first in (("train", 0), ("eval", 1000)):
            x = rng.normal(size=(N, LENGTH, 6)).astype(np.float32)
            documents = first + np.arange(N) // 2
            x[documents % 2 == 1, LENGTH // 2 :, 0] += 4
            tokens = rng.integers(0, 5, (N, LENGTH))
            made.append(split, {"h": x}, documents=documents, tokens=tokens)
    from tcsae.shared.store.reader import open_store

    return open_store(path)


def is_on(store) -> np.ndarray:
    """For each valid token of the eval split."""
    return ((store.eval.documents % 2 == 1)[:, None] & (np.arange(LENGTH) >= LENGTH // 2)).reshape(-1).astype(np.int8)


def identity(n_latents: int = 6) -> SparseAutoencoder:
    """A ReLU SAE with a latent for each dimension."""
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=n_latents, activation="relu"))
    sae.W_dec.data, sae.W_enc_rows.data = torch.eye(n_latents, 6), torch.eye(n_latents, 6)
    return sae


def probe_of(store, values: np.ndarray) -> tuple[Probe, csr_array, torch.Tensor]:
    tokens = choose_tokens(store, "h", 1, None)
    label = Label("on", "given", values[tokens.counted])
    probe = Probe(tokens, [label], halves([str(one) for one in tokens.documents]), (1, 2, 5))
    x = tokens.x()
    return probe, csr_array(torch.relu(x).numpy()), x


def test_the_latent_that_says_it_is_chosen_and_noise_is_not(store):
    probe, code, x = probe_of(store, is_on(store))
    result, of_x = probe.of_code(code, False)["on"], probe.of_x(x)["on"]
    assert result["1"]["auroc"] > 0.95 and result["1"]["within"] > 0.95
    assert of_x["1"]["auroc"] > 0.95 and of_x["all"]["auroc"] > 0.95
    null = np.random.default_rng(5).permutation(is_on(store))
    probe, code, x = probe_of(store, null)
    for smooth in (False, True):
        assert all(abs(one["auroc"] - 0.5) < 0.1 for one in probe.of_code(code, smooth)["on"].values())
    assert all(abs(one["auroc"] - 0.5) < 0.1 for one in probe.of_x(x)["on"].values())


def test_smoothed_codes_are_chosen_by_their_smoothed_values(store):
    """The adjoint of the smoothing, applied to labels, gives the class means of smoothed codes."""
    probe, code, _ = probe_of(store, is_on(store))
    smooth = probe.tokens.smooth(torch.from_numpy(code.toarray())).double().numpy()
    assert code.T @ probe._contrasts_back == pytest.approx(smooth.T @ probe._contrasts, rel=1e-4)
    assert probe.of_code(code, True)["on"]["1"]["auroc"] > 0.8


def test_within_equal_tokens_an_id_says_nothing(store):
    ids = store.eval.tokens.reshape(-1)
    probe, _, _ = probe_of(store, (ids == 3).astype(np.int8))
    code = csr_array((probe.tokens.ids == 3).astype(float)[:, None])
    result = probe.of_code(code, False)["on"]["1"]
    assert result["auroc"] == 1 and result["within"] is None
    noisy = np.random.default_rng(0).random(len(ids)) < np.where(ids == 3, 0.9, 0.1)
    probe, _, _ = probe_of(store, noisy.astype(np.int8))
    result = probe.of_code(code, False)["on"]["1"]
    assert result["auroc"] > 0.75 and result["within"] == pytest.approx(0.5)


def test_halves_hold_whole_groups():
    groups = [f"m{i // 5}" for i in range(400)]
    train = halves(groups)
    assert all(len({bool(train[i]) for i in range(400) if groups[i] == group}) == 1 for group in set(groups))
    assert 0.3 < train.mean() < 0.7


def test_fields_of_the_corpus_become_labels():
    records = [{"source": "torch:a.py", "lang": "en"}, {"source": "numpy:b.py", "lang": "de"}, {"source": "torch:c.py"}]
    result = field_labels(records)
    assert result["package_torch"].tolist() == [1, 0, 1] and result["lang_de"].tolist() == [0, 1, -1]
    assert held_out_groups(records, [4, 5, 6]) == ["torch:a.py", "numpy:b.py", "torch:c.py"]
    assert held_out_groups(None, [4]) == ["4"]
    assert field_labels([{"id": str(i)} for i in range(500)]) == {}, "a name for each document is no label"


def test_a_corpus_that_is_no_file_gives_no_labels(store):
    assert corpus_fields(store, [1]) is None


def run(store, folder: Path, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store.location, "--runs", str(folder), "probe", *arguments])


@pytest.fixture
def runs(store, tmp_path) -> Path:
    toy_eval.make_run(tmp_path / "runs", "a", identity(), store, hook="h")
    return tmp_path / "runs"


@pytest.mark.parametrize("unit", ["tokens", "sequences", "documents", "numbers"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_labels_of_a_file(store, runs, unit, ending):
    lengths, documents = store.eval.lengths, store.eval.documents
    rows = {
        "tokens": is_on(store),
        "sequences": documents % 2,
        "documents": np.unique(documents) % 2,
        "numbers": np.unique(documents)[::-1] % 2,
    }[unit]
    columns = {"mine": rows.tolist(), "name": ["odd" if one else "even" for one in rows]}
    if unit == "numbers":
        columns["document"] = np.unique(documents)[::-1].tolist()
    path = runs.parent / f"labels{ending}"
    if ending == ".csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    else:
        parquet.write_table(pa.table(columns), path)
    result = read_labels(path, lengths, documents)
    assert set(result) == {"mine", "name_even", "name_odd"} and len(result["mine"]) == lengths.sum()
    expected = is_on(store) if unit == "tokens" else np.repeat(documents % 2, lengths)
    assert (result["mine"] == expected).all() and (result["name_even"] == 1 - expected).all()
    done = run(store, runs, "--labels", str(path), "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads((runs / "probes.json").read_text())["figures"]
    assert figures["a"]["mine"]["1"]["auroc"] > (0.95 if unit == "tokens" else 0.6)
    assert set(figures) == {"x", "x, smoothed", "a", "a, smoothed"}


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.csv", "x\n1\n0\n", "has 2 rows; the eval split has 1,200 tokens, 60 sequences, 30 documents"),
        ("a.txt", "x\n1\n", "ends in .txt: labels come as .csv or .parquet"),
        ("a.parquet", "no table", "cannot be read"),
        ("b.csv", "x\n" + "\n".join(f"{i / 7}" for i in range(60)) + "\n", "column x has 60 different values"),
        ("c.csv", "document,x\n1,1\n1,0\n", "document 1 has several rows"),
        ("d.csv", "document,x\n1,1\n2,0\n", "none of its 2 documents is in the eval split"),
        ("e.csv", "document\n1001\n", "has no column of labels"),
        ("f.csv", "document,x\nq,1\n", "must hold whole numbers"),
        ("g.csv", "x\n" + "\n".join(["1"] + ["0"] * 59) + "\n", "None of 1 labels has 50 tokens with it"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(store, runs, name, text, says):
    path = runs.parent / name
    path.write_text(text)
    done = run(store, runs, "--labels", str(path))
    assert done.exit_code == 1 and says in done.output, done.output
    assert isinstance(done.exception, SystemExit) and done.output.strip().count("\n") <= 1


def test_a_missing_file_and_a_dense_code_are_named(store, runs):
    with pytest.raises(DataError, match=r"gone.csv cannot be read"):
        read_labels(runs / "gone.csv", store.eval.lengths, store.eval.documents)
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=8, activation="gelu"))
    toy_eval.make_run(runs, "dense", sae, store, hook="h")
    shutil.rmtree(runs / "a")
    done = run(store, runs)
    assert done.exit_code == 1 and "its code is dense (gelu)" in done.output
    assert run(store, runs, "--null", "x").exit_code == 2


def test_differences_in_differences(store, runs, tmp_path):
    """The same store as its own null leaves nothing."""
    path = tmp_path / "labels.csv"
    path.write_text("on\n" + "\n".join(map(str, is_on(store))) + "\n")
    done = run(store, runs, "--labels", str(path), "--null", store.location, "--null-runs", str(runs), "--quick")
    assert done.exit_code == 0 and "(code - x) here, minus (code - x) on the null" in done.output, done.output
    done = run(
        store, runs, "--labels", str(path), "--null", store.location, "--null-runs", str(runs), "--json", "--details"
    )
    result = json.loads(done.output[done.output.index("{") : done.output.rindex("}") + 1])["difference"]
    assert result["a"]["on"]["1"]["auroc"] == 0 and set(result) == {"a", "a, smoothed"}
