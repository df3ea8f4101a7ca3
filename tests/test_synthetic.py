"""Promise: a planted store is what it says: SynthSAEBench's law token by token, slow as asked, the same bytes again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import norm

from tcsae.evaluate.planted.truth import CLASSES, load_truth, truth_path
from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.commands.group import cli
from tcsae.shared.store.reader import open_store
from tcsae.shared.store.writer import StoreWriter
from tcsae.synthetic.planting import STILL, PlantedConfig, planted_config
from tcsae.synthetic.population import draw_population
from tcsae.synthetic.run import plan_sequences, write_planted
from tcsae.synthetic.sampling import sample_document
from tcsae.synthetic.streams import held, redraws, survival

TINY = ("n_features=20", "d_model=8", "n_roots=2", "n_children=3", "n_slow=4", "sequence_length=16", "n_dense=1",
        "n_tokens=4K", "correlation_rank=2")  # fmt: skip
SMALL = ("n_features=34", "d_model=12", "n_roots=2", "n_children=3", "depth=2", "n_slow=5", "slow_rate=0.05",
         "correlation_rank=3", "correlation_scale=0.3")  # fmt: skip
CHUNKS = ("tcsae.shared.store.format.CHUNK_BYTES", 16 * 8 * 2 * 80)  # of 80 sequences


def restated(config: PlantedConfig, loadings: np.ndarray, n: int) -> np.ndarray:
    """SynthSAEBench's generator over again, a node of the hierarchy at a time: amplitudes of n independent tokens."""
    rng = np.random.default_rng(99)
    n_zipf = config.n_features - config.n_slow
    ranks = np.arange(1, n_zipf + 1) ** -config.zipf
    rates = config.rate_last + (config.rate_first - config.rate_last) * (ranks - ranks[-1]) / (ranks[0] - ranks[-1])
    rates = np.append(rates, np.full(config.n_slow, config.slow_rate))
    queue, children, after = list(range(config.n_roots)), {}, config.n_roots
    for _ in range(config.depth):
        below = []
        for node in queue:
            children[node] = list(range(after, after + config.n_children))
            after += config.n_children
            below += children[node]
        queue = below
    drawn = rates.copy()
    for node, ones in children.items():
        for one in ones:
            others = sum(rates[other] for other in ones if other != one)
            drawn[one] = min(1.0, rates[one] / rates[node] * (1 + others / rates[node]))
    covariance = loadings @ loadings.T
    np.fill_diagonal(covariance, 1)
    on = rng.multivariate_normal(np.zeros(config.n_features), covariance, n) > norm.ppf(1 - drawn)
    for node, ones in children.items():  # parents come before their children's children
        for token in np.flatnonzero(on[:, ones].any(1)):
            alive = [one for one in ones if on[token, one] and on[token, node]]
            keep = alive[rng.integers(len(alive))] if alive else None
            for one in ones:
                on[token, one] = one == keep
    means = np.append(
        np.linspace(config.mean_first, config.mean_last, n_zipf), np.full(config.n_slow, config.slow_amplitudes[0])
    )
    return on * np.maximum(means + config.amplitude_std * rng.standard_normal(on.shape), 0)


def sampled(config: PlantedConfig, n_documents: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes of the features (no sides), and activations."""
    population = draw_population(config)
    drawn = [sample_document(population, number, n_tokens) for number in range(n_documents)]
    features = np.concatenate([one.features.toarray() for one in drawn])
    return features[:, : config.n_features], np.concatenate([one.x for one in drawn])


def test_without_memory_the_moments_are_those_of_synthsaebench():
    config = planted_config("small", (*SMALL, *STILL, "noise=0"))
    ours, x = sampled(config, 60, 500)
    theirs = restated(config, draw_population(config).loadings, 30_000)
    n = len(ours)
    for name, of_ours, of_theirs in (("on", ours > 0, theirs > 0), ("amplitude", ours, theirs)):
        a, b = (one.astype(float) for one in (of_ours, of_theirs))
        error = np.sqrt((a.var(0) + b.var(0)) / n)
        assert (abs(a.mean(0) - b.mean(0)) < 4 * error).all(), name
        products = [one.T @ one / n for one in (a, b)]
        spread = np.sqrt(sum((one**2).T @ one**2 / n - mean**2 for one, mean in zip((a, b), products, strict=True)) / n)
        apart = abs(products[0] - products[1]) / np.maximum(spread, 3 / n)
        assert apart.max() < 5 and (apart < 2).mean() > 0.9, name
    counts = [(one > 0).sum(1) for one in (ours, theirs)]
    assert abs(counts[0].mean() - counts[1].mean()) < 4 * np.sqrt(sum(one.var() for one in counts) / n)
    population = draw_population(config)
    assert np.allclose(x, ours @ population.directions[: config.n_features] + population.bias, atol=1e-5)
    assert np.isclose(np.linalg.norm(population.bias), config.bias)


def test_durations_change_nothing_about_a_single_token():
    still, slow = (
        sampled(planted_config("small", (*SMALL, *more)), 150, 200)[0] > 0
        for more in (STILL, ("slow_durations=8", "parent_duration=8", "child_duration=4", "factor_duration=8"))
    )
    error = np.sqrt((still.var(0) + 15 * slow.var(0)) / len(still))  # some 15 tokens count as one
    assert (abs(still.mean(0) - slow.mean(0)) < 4 * error + 1e-9).all()


def test_slow_features_are_slow_and_fast_ones_are_not():
    config = planted_config("small", ("n_features=64", "n_roots=4", "correlation_rank=0", "slow_rate=0.05"))
    on = sampled(config, 60, 500)[0] > 0
    on = on.reshape(60, 500, -1) - on.mean(0)
    variance = (on**2).mean((0, 1))

    def correlation(lag: int, which: slice) -> float:
        return float(((on[:, lag:] * on[:, :-lag]).mean((0, 1)) / variance)[which].mean())

    slow, fast = slice(-config.n_slow, None), slice(20, 32)
    for lag in (1, 4, 16):
        assert abs(correlation(lag, slow) - (1 - 1 / 16) ** lag) < 0.06
        assert abs(correlation(lag, fast)) < 0.02


@pytest.mark.parametrize("law", ["geometric", "fixed", "negative_binomial", "pareto"])
def test_holds_have_the_law_asked_for_and_begin_in_equilibrium(law):
    mean, n = 6.0, 20_000
    kept = survival(law, mean, 2.5)
    assert np.isclose(kept.sum(), mean, rtol=1e-6) and kept[0] == 1 and (np.diff(kept) <= 0).all()
    drawn = redraws(np.random.default_rng(3), 40, n, law, mean, 2.5)
    assert drawn[0].all()
    rates = drawn[1:].mean(1)  # in equilibrium every token is as likely as another to be drawn anew
    assert abs(rates - 1 / mean).max() < 5 * np.sqrt(1 / mean / n)
    if law == "fixed":
        first = drawn[1:].argmax(0)
        assert all(drawn[1 + at + 6, i] for i, at in enumerate(first[:500]) if at < 30)


def test_a_value_stays_until_it_is_drawn_anew():
    drawn = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool)
    assert held(np.arange(8.0).reshape(4, 2), drawn).tolist() == [[0, 1], [0, 3], [0, 3], [6, 3]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "tiny.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*CHUNKS)
        write_planted(str(path), planted_config("small", TINY))
    assert len(list((path / "train/activations/planted/c").iterdir())) > 2
    return path


def files(path: Path) -> dict[str, bytes]:
    beside = [truth_path(str(path)), *path.rglob("*")]
    return {
        str(one.relative_to(path.parent)).replace(path.name, ""): one.read_bytes() for one in beside if one.is_file()
    }


def test_the_truth_sums_to_the_activations(tiny):
    store = open_store(tiny)
    truth, config = load_truth(store), planted_config("small", TINY)
    x = store.eval.read("planted", 0, store.eval.n_sequences)[np.arange(16) < store.eval.lengths[:, None]]
    dense = np.zeros((len(x), truth.n_features))
    dense[np.repeat(np.arange(len(x)), np.diff(truth.offsets)), truth.features] = truth.values
    left = x - dense @ truth.directions - draw_population(config).bias
    assert abs(left.std() / config.noise - 1) < 0.05, "noise is all that is left"
    names = [CLASSES[kind] for kind in truth.kinds]
    assert {name: names.count(name) for name in CLASSES} == {
        "slow_rare": 4, "slow_dense": 2, "fast": 8, "position": 2, "parent": 2, "child": 6,
    }  # fmt: skip
    assert (truth.parents[np.array(names) == "child"] < 2).all()


def test_sequences_are_whole_pieces_of_documents_in_one_split_each(tiny):
    store = open_store(tiny)
    assert not set(store.train.documents) & set(store.eval.documents)
    assert store.train.n_tokens + store.eval.n_tokens >= 4000
    for split in (store.train, store.eval):
        again = np.flatnonzero(split.documents[1:] == split.documents[:-1])
        assert (split.starts[again + 1] == split.starts[again] + 16).all() and (split.lengths[again] == 16).all()


class KillError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("step", ["write_shard", "commit", "finish_sequences", "seal", "truth"])
def test_killed_and_started_again_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, step):
    path, config = tmp_path / "a.zarr", planted_config("small", TINY)
    monkeypatch.setattr(*CHUNKS)

    def die(*_: object, **__: object) -> None:
        raise KillError

    for nth in (1, 2):
        with monkeypatch.context() as patch:
            if step == "truth":
                patch.setattr("tcsae.synthetic.run.save_truth", die)
            else:
                patch.setattr(StoreWriter, step, die if step == "seal" else later(step, nth))
            with pytest.raises(KillError):
                write_planted(str(path), config)
    write_planted(str(path), config)
    assert files(path) == files(tiny)


def later(name: str, nth: int):
    """The writer's method, which dies right after it has done its work the nth time."""
    true, calls = getattr(StoreWriter, name), []

    def method(self, *arguments):
        true(self, *arguments)
        calls.append(0)
        if len(calls) == nth:
            raise KillError

    return method


def test_a_seed_is_a_store(tiny, tmp_path):
    write_planted(str(tmp_path / "1.zarr"), planted_config("small", (*TINY, "seed=1")))
    assert (
        open_store(tmp_path / "1.zarr").eval.read("planted", 0, 1) != open_store(tiny).eval.read("planted", 0, 1)
    ).any()


def test_a_truth_that_is_gone_or_damaged_is_written_anew(tiny, tmp_path):
    path = tmp_path / "a.zarr"
    shutil.copytree(tiny, path)
    for spoil in (None, b"", truth_path(str(tiny)).read_bytes()[:-7] + b"1234567"):
        beside = truth_path(str(path))
        beside.unlink(missing_ok=True) if spoil is None else beside.write_bytes(spoil)
        write_planted(str(path), planted_config("small", TINY))
        assert beside.read_bytes() == truth_path(str(tiny)).read_bytes()


@pytest.mark.parametrize(
    "setting, says",
    [
        ("n_tokens=100", "n_tokens=100 is 4 documents"),
        ("d_model=0", "d_model=0: must lie in 1..65536"),
        ("slow_durations=0.5", "slow_durations=0.5: must lie in 1..4096"),
        ("slow_durations=", "slow_durations"),
        ("rate_first=1", "rate_first=1: a share of tokens"),
        ("n_slow=21", "n_slow=21: must lie in 0..20"),
        ("n_dense=8", "n_dense=8: must lie in 0..7"),
        ("law=weibull", "Unknown value 'weibull'"),
        ("noise=-1", "noise=-1: must lie in 0..10000"),
        ("noise=nan", "noise=nan: must lie"),
        ("nois=1", "Did you mean 'noise'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(setting, says):
    with pytest.raises(ConfigError) as error:
        plan_sequences(planted_config("small", (*TINY, setting)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_pareto_without_a_mean_is_refused():
    with pytest.raises(ConfigError, match="law_shape=1: of pareto it must be above 1"):
        planted_config("small", ("law=pareto", "law_shape=1"))


def test_another_store_at_the_place_is_named(tiny, tmp_path):
    with pytest.raises(
        StoreError, match="is there already, with d_model=8, n_features=20.*seed 0. Give another --store"
    ):
        write_planted(str(tiny), planted_config("small", (*TINY, "seed=5")))
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match=r"x.zarr is not an activation store"):
        write_planted(str(tmp_path / "x.zarr"), planted_config("small", TINY))
    with pytest.raises(ConfigError, match="--store s3://a/b: the truth lies in a file beside the store"):
        write_planted("s3://a/b", planted_config("small", TINY))


@pytest.mark.slow
def test_the_command(tmp_path):
    path = tmp_path / "a.zarr"
    arguments = [part for setting in TINY for part in ("--set", setting)]

    def run(*more: str):
        return CliRunner().invoke(cli, ["--store", str(path), "synthetic", *arguments, *more])

    assert "slow_durations=16.0" in run("--list").output and not path.exists()
    assert run().exit_code == 0 and "the truth:" in run().output
    refused = run("--seed", "1")
    assert refused.exit_code == 1 and refused.output.count("\n") == 1 and "start anew: --fresh" in refused.output
    assert run("--seed", "1", "--fresh", "--still").exit_code == 0
    assert not (load_truth(open_store(path)).durations[:20] > 1).any()
