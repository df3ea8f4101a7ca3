"""Promise: a temporal crosscoder is an SAE of windows: trained on windows that cross no sequence, read out on all."""

import itertools
import json

import numpy as np
import pytest
import textbook
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import tcsae
from tcsae.evaluate.measures.smoothing import check_smoothing, parse_smoothing
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.base.windows import tiles
from tcsae.shared.commands.group import cli
from tcsae.shared.sae.crosscoder import read_out
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.train.batch import Batch
from tcsae.train.presets import preset
from tcsae.train.trainer import Trainer

D, LENGTH = 6, 10
lengths_lists = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def make_sae(window: int, activation: str = "topk", seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d_model=D, d_sae=20, k=3, activation=activation, window=window))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    if sae.threshold is not None:
        sae.threshold.data.fill_(0.5)
    return sae.eval()


@given(lengths_lists, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_tiles_are_the_windows_of_each_run(lengths, window, stride, offset):
    first, counts = tiles(np.array(lengths), window, stride, offset)
    expected, start = [], 0
    for length in lengths:
        expected.append([start + at for at in range(offset, length - window + 1, stride)])
        start += length
    assert first.tolist() == list(itertools.chain(*expected))
    assert counts.tolist() == [len(one) for one in expected]


@pytest.mark.slow
@given(lengths_lists, st.integers(1, 4), st.sampled_from(["topk", "relu", "jumprelu", "gelu"]))
def test_a_token_is_read_out_from_the_window_that_ends_at_it(lengths, window, activation):
    sae = make_sae(window, activation)
    x = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x_hat, code = read_out(sae, x, np.array(lengths))
        start = 0
        for length in lengths:
            for at in range(length):
                parts = sae.b_dec.view(window, D).clone()  # before the sequence: the decoder's bias
                for back in range(min(window, at + 1)):
                    parts[window - 1 - back] = x[start + at - back]
                expected = sae.encode(parts.flatten())
                torch.testing.assert_close(code.dense()[start + at], expected, atol=1e-5, rtol=1e-5)
                last = sae.decode(expected).view(window, D)[-1]
                torch.testing.assert_close(x_hat[start + at], last, atol=1e-5, rtol=1e-5)
            start += length


def test_no_tokens_have_no_code():
    x_hat, code = read_out(make_sae(3), torch.zeros(0, D), np.array([], np.int64))
    assert x_hat.shape == (0, D) and code.n_tokens == 0


def batch_of(lengths: list[int], x: torch.Tensor) -> Batch:
    n = len(lengths)
    return Batch(x, np.array(lengths), np.arange(n), np.arange(n))


def trainer_of(window: int, x: torch.Tensor, *more: str) -> Trainer:
    settings = ["sae.d_sae=20", "sae.k=3", f"sae.window={window}", "data.segment_length=8", *more]
    config = with_settings(preset("topk", D), settings)
    return Trainer(config, x[: len(x) // window * window].view(-1, window * D))


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("temporal", [(), ("temporal.weight=0.5", "temporal.window=2")])
def test_a_step_is_that_of_an_sae_on_the_windows(window, temporal):
    lengths = [8, 3, 7, 8]
    x = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(window, x, *temporal)
    offset = trainer.step_seed() % window
    rows = [x[at : at + window].flatten() for at in tiles(np.array(lengths), window, window, offset)[0]]
    counts = tiles(np.array(lengths), window, window, offset)[1]
    by_hand = Batch(torch.stack(rows), counts, np.zeros(4, np.int64), np.arange(4))
    expected = textbook.step(trainer_of(window, x, *temporal), by_hand)
    result = trainer.gradients(batch_of(lengths, x))
    for name, value in expected.losses.items():
        assert float(result.losses[name]) == pytest.approx(value, rel=1e-5)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(dict(trainer.sae.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_positions_are_those_of_the_windows_first_tokens():
    batch = Batch(torch.arange(15.0)[:, None], np.array([7, 8]), np.array([1, 9]), np.array([0, 1])).windows(3, 1)
    assert batch.x.tolist() == [[1, 2, 3], [4, 5, 6], [8, 9, 10], [11, 12, 13]]
    assert batch.positions().tolist() == [2, 5, 10, 13]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("crosscoder") / "a.zarr"
    rng = np.random.default_rng(0)
    with tcsae.create_store(path, hooks={"h": D}, sequence_length=LENGTH, codec="float32") as new:
        for split, n in (("train", 120), ("eval", 20)):
            x, lengths = rng.normal(size=(n, LENGTH, D)).astype("f4"), rng.integers(2, LENGTH + 1, n)
            new.append(split, {"h": x}, lengths=lengths)
    return str(path)


SMALL = ["sae.d_sae=24", "sae.k=6", "steps=6", "data.n_segments=16", "data.segment_length=8", "log_every=2"]


def tcsae_command(store: str, runs, *arguments: str):
    return CliRunner().invoke(cli, ["--store", store, "--runs", str(runs), *arguments])


@pytest.mark.slow
def test_it_is_trained_beside_others_resumed_and_evaluated(store, tmp_path):
    settings = [f"--set={one}" for one in SMALL]
    both = ["--preset=topk", "--preset=crosscoder-3"]
    done = tcsae_command(store, tmp_path / "a", "train", *both, *settings, "eval")
    assert done.exit_code == 0, done.output
    sae = tcsae.load_sae(next((tmp_path / "a").glob("crosscoder-3*")))
    assert sae.config.window == 3
    page = tcsae_command(store, tmp_path / "a", "report", "--out", str(tmp_path / "report"))
    assert page.exit_code == 0, page.output
    assert "Report of 2 SAEs" in page.output, "the two are compared, though their decoder rows differ in length"
    name = next((tmp_path / "a").glob("crosscoder-3*")).name
    shown = [tcsae_command(store, tmp_path / "a", "feature", "--run", name, "--id", str(i)) for i in range(4)]
    assert {one.exit_code for one in shown} == {0}
    (first, *_) = [one.stdout for one in shown if "active at none" not in one.stdout]
    norms = sae.window_rows[next(i for i in range(4) if shown[i].stdout == first)].square().sum(1)
    for at, share in zip(("at t-2", "at t-1", "at t "), norms / norms.sum(), strict=True):
        (line,) = [line for line in first.splitlines() if line.startswith(at)]
        assert f"{float(share):.0%} of its norm" in line
    assert sae.W_dec.shape == (24, 3 * D)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    evaluation = json.loads(next((tmp_path / "a").glob("crosscoder-3*/eval.json")).read_text())
    assert 0 < evaluation["metrics"]["l0"] <= 6
    config = json.loads(next((tmp_path / "a").glob("crosscoder-3*/cfg.json")).read_text())
    assert (config["architecture"], config["d_in"]) == ("topk-crosscoder-3", 3 * D)
    alone = tcsae_command(store, tmp_path / "b", "train", "--preset=crosscoder-3", *settings)
    assert alone.exit_code == 0, alone.output
    weights = [next((tmp_path / name).glob("crosscoder-3*/*.safetensors")).read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_its_rows_take_the_whole_width_of_the_feature_page(store, tmp_path, browser, toy_browser):
    settings = [f"--set={one}" for one in SMALL]
    out = tmp_path / "report"
    done = tcsae_command(
        store, tmp_path / "a", "train", "--preset=crosscoder-3", *settings, "eval", "report", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    browser.get(toy_browser.url(out, toy_browser.named(out, "crosscoder-3"), "features.html"))
    width = "const one = document.querySelector('{}'); return one && one.getBoundingClientRect().width"
    toy_browser.wait(browser, lambda: browser.execute_script(width.format(".window-rows")))
    block, row, table = (browser.execute_script(width.format(one)) for one in (".whole-row", ".likes", ".window-rows"))
    assert block == pytest.approx(row, abs=1) and table <= block + 1, (
        "three columns of figures and one of tokens need more than a cell of the grid"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "--set=sae.window=9"], "data.segment_length=8 holds no window of sae.window=9"),
        (["train", "--set=sae.window=0"], "sae.window=0: must be at least 1"),
        (["train", "--set=sae.window=8", "--set=data.skip_first=3"], "sae.window=8 positions a code; the longest"),
        (["train", "--set=sae.window=2", "--set=sae.layer_norm=in", "--set=init.input_scale=none"], "no layer norm"),
        (["train", "--preset=temporal-topk", "--set=sae.window=6"], "takes 2 consecutive positions"),
    ],
)
def test_what_holds_no_window_is_refused(store, tmp_path, arguments, words):
    done = tcsae_command(store, tmp_path, arguments[0], *[f"--set={one}" for one in SMALL], *arguments[1:])
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_its_codes_are_not_smoothed():
    with pytest.raises(ConfigError, match="with sae.window=2 a code is of several"):
        check_smoothing(parse_smoothing("ema=0.3"), make_sae(2).config)
