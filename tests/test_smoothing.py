"""Promise: smoothed codes are what a loop over positions gives, within a sequence, scored and kept as any others."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import toy_eval as toy
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st

from tcsae.evaluate.batches import batches
from tcsae.evaluate.candidates import EvalRequest
from tcsae.evaluate.measures.smoothing import parse_smoothing, split_name
from tcsae.evaluate.printed_tables import differences
from tcsae.evaluate.report.pages.page_files import choose_runs
from tcsae.evaluate.run import evaluate_runs
from tcsae.evaluate.systems import SaeOutput, SmoothedOutput, output_of
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.store.reader import Store

make_run, make_sae, WIDTH = toy.make_run, toy.make_sae, toy.WIDTH

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gelu")
KERNELS = ("ema=0", "ema=0.3", "ema=0.95", "mean=1", "mean=3", "mean=20", "scale=0.8")
HYSTERESES = ("hysteresis=1", "hysteresis=1.5", "hysteresis=2", "hysteresis=100")
lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy.write_store(tmp_path_factory.mktemp("store") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


def sae_of(activation: str, seed: int = 0):
    sae = make_sae(activation, seed=seed)
    if sae.threshold is not None:
        sae.threshold.data = sae.threshold.data.abs() + 0.5
    return sae.requires_grad_(False)


def inputs(lengths: list[int], seed: int):
    """Slowly moving x of sequences of these lengths, and each position's sequence: numbers with gaps, as in a batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(n, WIDTH, generator=generator).cumsum(0) for n in lengths])
    return x, torch.repeat_interleave(2 * torch.arange(len(lengths)), torch.tensor(lengths))


def smoothed(sae, text: str, x, sequence):
    code = output_of(SmoothedOutput(sae, parse_smoothing(text)), x, sequence).code
    return code.dense() if isinstance(code, SparseCode) else code


def naive(sae, text: str, x, sequence):
    """Position by position, in plain words."""
    kind, value = text.split("=")
    value, k = float(value), sae.config.k
    start = 0
    f, pre, rows = sae.encode(x).double(), sae.pre_activations(x), []
    for t in range(len(x)):
        begins = t == 0 or sequence[t] != sequence[t - 1]
        start = t if begins else start
        if kind.startswith("ema"):
            rows.append(f[t] if begins else value * rows[-1] + (1 - value) * f[t])
        elif kind == "mean":
            rows.append(f[max(start, t - int(value) + 1) : t + 1].mean(0))
        elif kind == "scale":
            rows.append(value * f[t])
        elif sae.config.activation == "topk":
            order = sorted(range(len(pre[t])), key=lambda j: -float(pre[t, j]))
            near = order[: round(value * k)]
            stay = [j for j in near if not begins and rows[-1][j] > 0 and pre[t, j] > 0]
            chosen = (stay + [j for j in order if j not in stay])[:k]
            row = torch.zeros(len(order)).double()
            row[chosen] = pre[t, chosen].relu().double()
            rows.append(row)
        else:
            on = pre[t] > sae.threshold
            if not begins:
                on |= (pre[t] > sae.threshold / value) & (rows[-1] > 0)
            rows.append(torch.where(on, pre[t], 0.0).double())
    return torch.stack(rows)


@pytest.mark.slow
@given(st.sampled_from(ACTIVATIONS), st.sampled_from(KERNELS), lengths_of, st.integers(0, 99))
def test_memory_and_mean_are_the_loop(activation, text, lengths, seed):
    sae, (x, sequence) = sae_of(activation), inputs(lengths, seed)
    torch.testing.assert_close(
        smoothed(sae, text, x, sequence).double(), naive(sae, text, x, sequence), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@given(st.sampled_from(("ema-topk=0", "ema-topk=0.3", "ema-topk=0.95")), lengths_of, st.integers(0, 99))
def test_of_a_memory_the_largest_are_kept(text, lengths, seed):
    sae, (x, sequence) = sae_of("topk"), inputs(lengths, seed)
    result, memory = smoothed(sae, text, x, sequence).double(), naive(sae, text, x, sequence)
    for row, whole in zip(result, memory, strict=True):
        kept = whole.sort(descending=True).values[: sae.config.k]
        torch.testing.assert_close(row[row > 0].sort(descending=True).values, kept[kept > 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[row > 0], whole[row > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@given(st.sampled_from(ACTIVATIONS[:3]), st.sampled_from(HYSTERESES), lengths_of, st.integers(0, 99))
def test_hysteresis_is_the_loop(activation, text, lengths, seed):
    sae, (x, sequence) = sae_of(activation), inputs(lengths, seed)
    result = smoothed(sae, text, x, sequence)
    torch.testing.assert_close(result.double(), naive(sae, text, x, sequence), rtol=1e-4, atol=1e-5)
    if activation == "topk":
        assert int((result > 0).sum(1).max()) <= sae.config.k


@pytest.mark.slow
@given(
    st.sampled_from(("ema=0.5", "ema-topk=0.5", "mean=3", "hysteresis=2")), lengths_of, st.integers(0, 99), st.data()
)
def test_nothing_goes_from_one_sequence_into_another(text, lengths, seed, data):
    assume(len(lengths) > 1)
    sae, (x, sequence) = sae_of("topk"), inputs(lengths, seed)
    changed = data.draw(st.sampled_from(sequence.unique().tolist()))
    other = torch.where((sequence == changed)[:, None], x.flip(1) * 3 + 1, x)
    before, after = (smoothed(sae, text, one, sequence) for one in (x, other))
    rest = sequence != changed
    torch.testing.assert_close(before[rest], after[rest])
    assert not torch.equal(before[~rest], after[~rest])


@pytest.mark.parametrize(
    "text, neutral", [("ema=0", True), ("mean=1", True), ("hysteresis=1", True), ("ema=0.5", False)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS[:3])
def test_without_strength_it_is_the_plain_sae(activation, text, neutral):
    sae, (x, sequence) = sae_of(activation), inputs([9, 9, 9], 0)
    plain, result = SaeOutput(sae)(x), output_of(SmoothedOutput(sae, parse_smoothing(text)), x, sequence)
    assert torch.allclose(plain.x_hat, result.x_hat, atol=1e-5) == neutral
    assert torch.allclose(plain.code.dense(), result.code.dense(), atol=1e-5) == neutral


def test_hysteresis_makes_latents_stay_on():
    sae, (x, sequence) = sae_of("topk"), inputs([60], 1)
    codes = [smoothed(sae, text, x, sequence) > 0 for text in ("hysteresis=1", "hysteresis=3")]
    switches = [int((code[1:] != code[:-1]).sum()) for code in codes]
    assert switches[1] < 0.8 * switches[0]
    assert [int(code.sum()) for code in codes] == [5 * 60] * 2


@pytest.mark.parametrize(
    "activation, text",
    [
        *itertools.product(ACTIVATIONS, ("ema=0.3", "mean=3")),
        *((activation, "hysteresis=2") for activation in ACTIVATIONS[:3]),
    ],
)
def test_parts_of_an_encoding_and_no_position_at_all(monkeypatch, activation, text):
    sae, (x, sequence) = sae_of(activation), inputs([9, 4], 0)
    whole = output_of(SmoothedOutput(sae, parse_smoothing(text)), x, sequence)
    monkeypatch.setattr("tcsae.evaluate.systems.BATCH_CODE_ENTRIES", 5 * toy.LATENTS)
    torch.testing.assert_close(smoothed(sae, text, x, sequence), naive(sae, text, x, sequence).float())
    torch.testing.assert_close(SmoothedOutput(sae, parse_smoothing(text))(x, sequence).x_hat, whole.x_hat)
    none = output_of(SmoothedOutput(sae, parse_smoothing(text)), x[:0], sequence[:0])
    assert none.x_hat.shape == (0, WIDTH)


# In evaluations


def call(store: Store, runs: Path, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store.location, "--runs", str(runs), "eval", *arguments])


def measures(evaluation: dict) -> dict:
    return evaluation["temporal"]["groups"]["all"]["measures"]


SMOOTH = [word for text in ("ema=0.3", "mean=3", "hysteresis=2") for word in ("--smooth", text)]
NAMES = ("ema=0.3", "mean=3", "hysteresis=2")


@pytest.mark.slow
def test_figures_are_those_of_the_smoothed_codes(store, tmp_path):
    sae = sae_of("topk")
    make_run(tmp_path, "a", sae, store)
    done = call(store, tmp_path, *SMOOTH)
    assert done.exit_code == 0, done.output
    plain = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert "smooth" not in plain["options"] and "smoothing" not in plain
    for text in NAMES:
        assert f"a+{text}" in done.stdout
        result = json.loads((tmp_path / "a" / f"eval+{text}.json").read_text())
        assert result["name"] == f"a+{text}" and result["options"] == plain["options"] | {"smooth": text}
        assert result["weights"] == plain["weights"] and result["smoothing"]
        assert result["metrics"].keys() == plain["metrics"].keys()
        assert (
            result["temporal"]["groups"]["all"]["measures"].keys()
            == plain["temporal"]["groups"]["all"]["measures"].keys()
        )
        squares, active, n, total, x_squared = 0.0, 0.0, 0, 0.0, 0.0
        for batch in batches(store.eval, toy.HOOK, toy.FROM_1):
            for i in range(len(batch.x)):
                x = batch.x[i][batch.counted[i]]
                if len(x):
                    f = naive(sae, text, x, torch.zeros(len(x)))
                    squares += float((x - sae.decode(f.float())).double().square().sum())
                    active, n = active + int((f.float() > 0).sum()), n + len(x)
                    total, x_squared = total + x.double().sum(0), x_squared + float(x.double().square().sum())
        ev = 1 - squares / (x_squared - float(total.square().sum()) / n)
        assert result["metrics"]["explained_variance"] == pytest.approx(ev, abs=1e-5)
        assert result["metrics"]["l0"] == pytest.approx(active / n)
        for name in ("explained_variance", "ce_loss_score"):
            assert result["metrics"][name] != plain["metrics"][name]
        for name in ("ce_loss_without_sae", "ce_loss_with_ablation", "l2_norm_in"):
            assert result["metrics"][name] == pytest.approx(plain["metrics"][name])
    slow = {
        text: measures(json.loads((tmp_path / "a" / f"eval{text}.json").read_text()))["slowness_to_x"]["value"]
        for text in ("", "+ema=0.3", "+mean=3")
    }
    assert slow["+mean=3"] < slow["+ema=0.3"] < slow[""], "smoother"


@pytest.mark.slow
def test_a_pass_for_all_gives_what_each_gives_alone(store, tmp_path):
    make_run(tmp_path, "a", sae_of("topk"), store)
    make_run(tmp_path, "b", sae_of("jumprelu"), store)
    together = evaluate_runs(store, tmp_path, EvalRequest(smooth=NAMES)).evaluations
    assert [one["name"] for one in together] == ["a", *(f"a+{x}" for x in NAMES), "b", *(f"b+{x}" for x in NAMES)]
    for run, text in itertools.product("ab", NAMES):
        *_, alone = evaluate_runs(store, tmp_path, EvalRequest(names=[run], smooth=[text], force=True)).evaluations
        (ours,) = [one for one in together if one["name"] == alone["name"]]
        for key in ("metrics", "intervals", "temporal", "options"):
            assert ours[key] == alone[key], (alone["name"], key)


@pytest.mark.slow
def test_what_is_done_is_kept_and_the_plain_evaluation_is_untouched(store, tmp_path):
    make_run(tmp_path, "a", sae_of("topk"), store)
    assert call(store, tmp_path).exit_code == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    done = call(store, tmp_path, *SMOOTH)
    assert "Evaluated already: a. Do it again" in done.stderr, "its smoothed codes are not"
    after = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert {name: after[name] for name in files} == files
    assert set(after) - set(files) == {f"eval+{x}.json" for x in NAMES} | {
        f"eval_replicates+{x}.safetensors" for x in NAMES
    }
    again = call(store, tmp_path, *SMOOTH)
    assert "Evaluated already: a, a+ema=0.3, a+mean=3, a+hysteresis=2." in again.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == after
    make_run(tmp_path, "a", sae_of("topk", seed=1), store)
    other = call(store, tmp_path, *SMOOTH)
    assert "Evaluated already" not in other.stderr, "other weights"


@pytest.mark.slow
def test_inspect_and_report_see_the_plain_evaluation(store, tmp_path):
    make_run(tmp_path, "a", sae_of("topk"), store)
    assert call(store, tmp_path, *SMOOTH).exit_code == 0
    plain = json.loads((tmp_path / "a" / "eval.json").read_text())
    included, excluded = choose_runs(store, tmp_path)
    assert [one.evaluation for one in included] == [plain] and not excluded
    shown = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path), "inspect"])
    assert f"{plain['metrics']['explained_variance']:.4g}" in shown.stdout and "+ema" not in shown.stdout
    (tmp_path / "a" / "eval.json").unlink()
    shown = CliRunner().invoke(cli, ["--store", store.location, "--runs", str(tmp_path), "inspect"])
    assert f"{plain['metrics']['explained_variance']:.4g}" not in shown.stdout


@pytest.mark.slow
def test_smoothed_codes_are_compared_with_a_run(store, tmp_path):
    make_run(tmp_path, "a", sae_of("topk"), store)
    make_run(tmp_path, "b", sae_of("topk", seed=4), store)
    done = call(store, tmp_path, "--compare", "a+ema=0.30", "--with", "b")
    assert done.exit_code == 0, done.output
    assert "a+ema=0.3 minus b, paired over 10 documents" in done.stdout
    result = {one["name"]: one for one in evaluate_runs(store, tmp_path, EvalRequest(smooth=["ema=0.3"])).evaluations}
    paired = differences(tmp_path, result["a+ema=0.3"], result["b"])
    assert paired["explained_variance"]["a"] == result["a+ema=0.3"]["metrics"]["explained_variance"]
    assert paired["explained_variance"]["b"] == result["b"]["metrics"]["explained_variance"]
    same = differences(tmp_path, result["a+ema=0.3"], result["a+ema=0.3"])
    assert {tuple(one["interval"]) for one in same.values() if one["interval"]} == {(0.0, 0.0)}
    assert [str(parse_smoothing(x)) for x in ("ema=.30", "ema=0.1234567", "mean=3.0", "hysteresis=1000000")] == [
        "ema=0.3",
        "ema=0.1234567",
        "mean=3",
        "hysteresis=1000000",
    ]
    assert split_name("a+b") == ("a+b", None) and split_name("a+b+mean=2") == ("a+b", "mean=2")


@pytest.mark.parametrize(
    "text, message",
    [
        ("median=3", "Unknown smoothing 'median'.*ema, ema-topk, mean, hysteresis"),
        ("ema", "--smooth ema: allowed is ema=A, 0 <= A < 1"),
        ("ema=1", "--smooth ema=1: allowed is ema=A, 0 <= A < 1"),
        ("ema=-0.1", "allowed is ema=A"),
        ("ema=nan", "allowed is ema=A"),
        ("ema-topk=1", "allowed is ema-topk=A, 0 <= A < 1"),
        ("mean=2.5", "allowed is mean=W, a whole number from 1 on"),
        ("mean=0", "allowed is mean=W"),
        ("mean=inf", "allowed is mean=W"),
        ("hysteresis=0.5", "allowed is hysteresis=M, M >= 1"),
        ("scale=0", "allowed is scale=C, C > 0"),
        ("hysteresis=inf", "allowed is hysteresis=M"),
        ("hysteresis=two", "allowed is hysteresis=M"),
    ],
)
def test_a_wrong_smoothing_is_refused_in_one_line(store, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_smoothing(text)
    make_run(tmp_path, "a", sae_of("topk"), store)
    done = call(store, tmp_path, "--smooth", text)
    assert done.exit_code == 1 and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a" / "eval.json").exists(), "before anything is evaluated"


@pytest.mark.slow
def test_hysteresis_needs_a_bound(store, tmp_path):
    make_run(tmp_path, "a", sae_of("topk"), store)
    make_run(tmp_path, "r", sae_of("relu"), store)
    done = call(store, tmp_path, "--smooth", "hysteresis=2", "--smooth", "mean=2")
    assert done.exit_code == 1
    assert "r+hysteresis=2: hysteresis=2 is for topk, batchtopk, jumprelu SAEs" in " ".join(done.stderr.split())
    assert len(list(tmp_path.glob("a/eval*.json"))) == 3
    assert {path.name for path in tmp_path.glob("r/eval*.json")} == {"eval.json", "eval+mean=2.json"}
