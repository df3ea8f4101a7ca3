"""Promise: what an SAE recovers of planted features is scored as defined: perfect codes fully, noise as nothing."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import toy_eval
from click.testing import CliRunner

from tcsae.evaluate.batches import batches
from tcsae.evaluate.planted.matching import capture, match
from tcsae.evaluate.planted.recovery_figures import Planted, PlantedTokens
from tcsae.evaluate.planted.segments import axis_of, compare_segments
from tcsae.evaluate.planted.truth import CLASSES, Truth, load_truth, truth_path
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.sparse import positive_code
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.synthetic.planting import planted_config
from tcsae.synthetic.run import write_planted

SETTINGS = ("n_features=24", "d_model=16", "n_roots=2", "n_children=3", "n_slow=4", "sequence_length=32", "n_dense=1",
            "n_tokens=12K", "correlation_rank=0", "rate_last=0.02", "slow_durations=6", "slow_rate=0.05")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted(str(tmp_path_factory.mktemp("planted") / "a.zarr"), planted_config("small", SETTINGS))


def valid_positions(store) -> np.ndarray:
    return np.arange(store.sequence_length) < store.eval.lengths[:, None]


def scored(store, rows: np.ndarray, encode, rules: CountingRules = toy_eval.FROM_1) -> Planted:
    """`encode` makes the dense code of a batch's counted positions from (true amplitudes there, their sequences)."""
    truth = load_truth(store)
    tokens = PlantedTokens(truth, store.eval.lengths)
    planted = Planted(tokens, rows.astype(np.float32))
    dense = np.zeros((store.eval.n_tokens, truth.n_features), np.float32)
    dense[np.repeat(np.arange(len(dense)), np.diff(truth.offsets)), truth.features] = truth.values
    chosen = counted(store.eval, rules)[valid_positions(store)]
    sequence = np.repeat(np.arange(store.eval.n_sequences), store.eval.lengths)
    for batch in batches(store.eval, "planted", rules):
        tokens.begin(batch)
        here = (sequence >= batch.start) & (sequence < batch.start + len(batch.x)) & chosen
        code = torch.from_numpy(np.asarray(encode(dense[here], sequence[here]), np.float32))
        planted.add(positive_code(code) if batch.start % 2 else code)
    return planted


@pytest.mark.slow
def test_the_truth_as_a_code_is_recovered_whole(store):
    truth = load_truth(store)
    order = np.random.default_rng(0).permutation(truth.n_features)
    result = scored(store, 2 * truth.directions[order], lambda dense, _: dense[:, order] / 2).figures()
    overall = result["planted"]["figures"]
    assert overall["mcc"] == pytest.approx(1) and overall["uniqueness"] == 1 and overall["recovered"] == 1
    assert overall["f1"] == overall["precision"] == overall["recall"] == 1
    assert overall["shrinkage"] == pytest.approx(1) and overall["absorption"] == 0
    n_signed = int(
        (truth.kinds == CLASSES.index("slow_dense")).sum() + (truth.kinds == CLASSES.index("position")).sum()
    )
    assert overall["antipodal_pairs"] == n_signed // 2 and overall["false_splits"] == 0
    assert set(result) == {"planted", *(f"planted_{name}" for name in CLASSES)}
    slow = result["planted_slow_rare"]["figures"]
    assert slow["missed"] == slow["onset_distance"] == slow["offset_distance"] == 0 and slow["fragments"] == 1
    assert result["planted_slow_dense"]["figures"]["capture"] == pytest.approx(1)
    assert "onset_error" not in result["planted_fast"]["figures"]


def shifted(dense: np.ndarray, sequence: np.ndarray, by: int) -> np.ndarray:
    """The code `by` tokens later within each sequence."""
    late = np.zeros_like(dense)
    late[by:] = dense[:-by] * (sequence[by:] == sequence[:-by])[:, None]
    return late


def test_a_late_code_is_late_by_as_many_tokens(store):
    truth = load_truth(store)
    planted = scored(store, truth.directions, lambda dense, sequence: shifted(dense, sequence, 2))
    slow = planted.figures()["planted_slow_rare"]["figures"]
    assert 1.5 < slow["onset_error"] <= 2.2 and 0 < slow["missed"] < 0.5, "short segments are missed altogether"
    assert slow["offset_error"] == pytest.approx(slow["offset_distance"], abs=0.3)
    assert slow["f1"] < 0.9


def test_a_segment_ends_where_a_token_is_left_out(store):
    """Counted by hand on the true features, which as a code have the same segments."""
    truth, rules = load_truth(store), CountingRules(skip_first=1, max_norm=1.3)
    mask = counted(store.eval, rules)
    inside = mask & np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    assert (mask[:, 1:-1] < (mask[:, :-2] & mask[:, 2:])).sum() > 20, "tokens are left out in the middle"
    on = np.zeros((*mask.shape, truth.n_features), bool)
    at = np.argwhere(valid_positions(store))[np.repeat(np.arange(store.eval.n_tokens), np.diff(truth.offsets))]
    on[at[:, 0], at[:, 1], truth.features] = True
    on &= mask[..., None]
    begins = on & ~(np.pad(on, ((0, 0), (1, 0), (0, 0)))[:, :-1] & inside[..., None])
    scores = scored(store, truth.directions, lambda dense, _: dense, rules).per_feature()
    slow = truth.durations > 1
    np.testing.assert_array_equal(scores["segments"][slow], begins.sum((0, 1))[slow])
    np.testing.assert_array_equal(scores["fragments"][slow], scores["segments"][slow])
    np.testing.assert_array_equal(scores["n_onset"][slow], (begins & inside[..., None]).sum((0, 1))[slow])


def test_half_the_amplitude_is_half_the_shrinkage(store):
    truth = load_truth(store)
    result = scored(store, truth.directions, lambda dense, _: dense / 2).figures()
    assert result["planted"]["figures"]["shrinkage"] == pytest.approx(0.5)


def test_random_rows_and_codes_recover_nothing(store):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(30, 16))
    overall = scored(store, rows, lambda dense, _: 1.0 * (rng.random((len(dense), 30)) < 0.1)).figures()["planted"][
        "figures"
    ]
    assert overall["f1"] < 0.12 and overall["recovered"] == 0 and overall["mcc"] < 0.7
    dead = scored(store, np.zeros((30, 16)), lambda dense, _: np.zeros((len(dense), 30))).figures()
    assert dead["planted"]["figures"]["f1"] == 0 and dead["planted_fast"]["figures"]["f1"] == 0
    assert dead["planted_slow_rare"]["figures"]["missed"] == 1
    assert dead["planted_slow_rare"]["figures"]["onset_error"] is None


def test_parents_absorbed_by_hand_are_counted(store):
    """Where child 2 of parent 0 is on, its latent carries the parent, whose own latent is off."""
    truth = load_truth(store)
    rows = truth.directions.copy()
    children = np.flatnonzero(truth.parents == 0)
    rows[children[0]] += 0.9 * truth.directions[0]

    def encode(dense: np.ndarray, _: np.ndarray) -> np.ndarray:
        code = dense.copy()
        code[dense[:, children[0]] > 0, 0] = 0
        return code

    n_absorbed, n_pairs = 0, 0

    def watch(one: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        nonlocal n_absorbed, n_pairs
        n_absorbed += int((one[:, children[0]] > 0).sum())
        n_pairs += sum(int(((one[:, child] > 0) & (one[:, above] > 0)).sum()) for child, above in family)
        return encode(one, sequence)

    family = [(child, above) for child, above in enumerate(truth.parents) if above >= 0]
    result = scored(store, rows, watch).figures()
    assert n_absorbed > 20
    assert result["planted"]["figures"]["absorption"] == pytest.approx(n_absorbed / n_pairs, rel=0.02)
    # A latent that is off without another that takes its place is missing, not absorbed.
    plain = scored(store, truth.directions, encode).figures()["planted"]["figures"]["absorption"]
    assert plain < 0.2 * result["planted"]["figures"]["absorption"]


def test_splits_and_antipodal_rows_are_counted():
    truth = np.eye(4)[:3]
    rows = np.array([[1, 0, 0, 0], [1, 0.2, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0.1], [0, 1, 0, 0], [0, 0, 0, 0]])
    result = match(truth, rows)
    assert result.splits.tolist() == [1, 0, 0] and result.n_antipodal == 1
    assert result.latent_of.tolist() == [0, 4, 2] and result.feature_of.tolist() == [0, -1, 2, -1, 1, -1]
    assert match(rows[:2], truth[:1]).latent_of.tolist() == [0, -1], "more features than latents"


def test_the_matching_is_the_best_of_all():
    rng = np.random.default_rng(2)
    truth, rows = rng.normal(size=(4, 5)), rng.normal(size=(6, 5))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    cosines = abs(truth @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)
    best = max(sum(cosines[i, j] for i, j in enumerate(one)) for one in itertools.permutations(range(6), 4))
    assert match(truth, rows).cosine.sum() == pytest.approx(best, abs=1e-4)


def test_capture_is_a_share_of_the_subspace():
    assert capture(np.eye(4)[:2], np.array([[1, 1, 0, 0], [1, -1.0, 0, 0]])) == pytest.approx(1)
    assert capture(np.eye(4)[:2], np.array([[1, 0, 0, 0], [0, 0, 1.0, 0]])) == pytest.approx(0.5)
    assert capture(np.eye(4)[:2], np.zeros((2, 4))) == 0


def naive_segments(on: list[bool]) -> list[tuple[int, int]]:
    runs, start = [], None
    for t, value in enumerate([*on, False]):
        if value and start is None:
            start = t
        if not value and start is not None:
            runs.append((start, t - 1))
            start = None
    return runs


def test_segments_agree_with_a_walk_through_each_sequence():
    rng = np.random.default_rng(4)
    lengths = [7, 1, 30, 12, 2]
    sequence = np.repeat(np.arange(5), lengths)
    true, code = (rng.random((len(sequence), 3)) < rate for rate in (0.5, 0.4))
    axis = axis_of(sequence)
    keys = [axis.keys(np.nonzero(one)[1], np.nonzero(one)[0]) for one in (true, code)]
    result = compare_segments(axis, *keys)
    expected = []
    for feature in range(3):
        for one in range(5):
            ours, theirs = (naive_segments(x[sequence == one, feature].tolist()) for x in (true, code))
            for start, end in ours:
                over = [run for run in theirs if run[0] <= end and run[1] >= start]
                onset = over[0][0] - start if over else 0
                offset = over[-1][1] - end if over else 0
                inside = bool(over) and start > 0, bool(over) and end < lengths[one] - 1
                expected.append((feature, not over, len(over), onset, offset, *inside))
    assert list(zip(*(one.tolist() for one in result), strict=True)) == expected
    nothing = np.zeros(0, np.int64)
    assert compare_segments(axis, keys[0], nothing).missed.all()
    assert len(compare_segments(axis, nothing, keys[1]).missed) == 0


def test_scores_agree_with_counting_by_hand(store):
    truth = load_truth(store)
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(20, 16))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def encode(dense: np.ndarray, _: np.ndarray) -> np.ndarray:
        code = np.maximum(dense @ truth.directions @ rows.T - 0.8, 0)
        seen.append((dense, code))
        return code

    planted = scored(store, rows, encode)
    dense, code = (np.concatenate(one) > 0 for one in zip(*seen, strict=True))
    result, latent = planted.per_feature(), planted.matching.latent_of
    for feature in range(truth.n_features):
        both = (dense[:, feature] & code[:, latent[feature]]).sum() if latent[feature] >= 0 else 0
        n_true, n_code = dense[:, feature].sum(), code[:, latent[feature]].sum() if latent[feature] >= 0 else 0
        if n_true == 0:
            assert np.isnan(result["f1"][feature])
            continue
        assert result["f1"][feature] == pytest.approx(2 * both / (n_true + n_code))
        assert result["recall"][feature] == pytest.approx(both / n_true)
        assert result["precision"][feature] == pytest.approx(both / max(1, n_code))
    of_latents = []
    for j, nearest in enumerate(planted.matching.nearest):
        both = (dense[:, nearest] & code[:, j]).sum()
        of_latents.append(2 * both / max(1, dense[:, nearest].sum() + code[:, j].sum()))
    assert planted.figures()["planted"]["figures"]["f1"] == pytest.approx(np.mean(of_latents))


def run_of(folder, store, truth: Truth):
    """An SAE whose rows are the truth."""
    sae = SparseAutoencoder(SaeConfig(d_model=16, d_sae=truth.n_features, activation="topk", k=5))
    sae.W_dec.data = torch.from_numpy(truth.directions)
    sae.W_enc_rows.data = torch.from_numpy(truth.directions)
    return toy_eval.make_run(folder, "a", sae, store, hook="planted")


def test_eval_adds_the_figures_and_prints_them(store, tmp_path):
    run = run_of(tmp_path / "runs", store, load_truth(store))

    def evaluate(*more: str) -> str:
        done = CliRunner().invoke(
            cli, ["--store", store.location, "--runs", str(tmp_path / "runs"), "eval", "--no-temporal", *more]
        )
        assert done.exit_code == 0, done.output
        return done.output

    assert "Recovery of planted features" in evaluate()
    measures = json.loads((run / "eval.json").read_text())["measures"]
    assert measures["planted"]["figures"]["mcc"] == pytest.approx(1)
    assert measures["planted_child"]["figures"]["f1"] > 0.2
    assert all(one["figures"].keys() == one["definitions"].keys() for one in measures.values())
    assert "a: by class" in evaluate("--details", "--smooth", "mean=2")


def test_a_store_without_its_truth_is_evaluated_without(store, tmp_path):
    shutil.copytree(store.location, tmp_path / "a.zarr")
    run = run_of(tmp_path / "runs", store, load_truth(store))
    arguments = ["--store", str(tmp_path / "a.zarr"), "--runs", str(tmp_path / "runs"), "eval", "--no-temporal"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0 and "No truth of the planted features at" in done.output
    assert "planted" not in json.loads((run / "eval.json").read_text())["measures"]
    beside = truth_path(str(tmp_path / "a.zarr"))
    whole = truth_path(store.location).read_bytes()
    for bytes_, says in (
        (whole[:-1] + b"!", "is damaged: its digest does not fit. Delete it"),
        (b"nothing", "cannot be read"),
        (whole.replace(store.content[:20].encode(), b"0" * 20), "is the truth of another store"),
        (whole.replace(b'"version\\": 1', b'"version\\": 9').replace(b'version\\":1', b'version\\":9'), "version 9"),
    ):
        beside.write_bytes(bytes_)
        done = CliRunner().invoke(cli, [*arguments, "--force"])
        assert done.exit_code == 1 and says in done.output and "Traceback" not in done.output
        assert isinstance(done.exception, SystemExit)
