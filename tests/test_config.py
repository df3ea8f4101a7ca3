"""Promise: settings survive JSON, overrides reach nested keys, and whatever does not fit is refused by name."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import differences, from_dict, parse_count, to_dict, to_settings, with_settings
from tcsae.shared.sae.module import SaeConfig
from tcsae.train.config import (
    DataConfig,
    DeadConfig,
    GuardConfig,
    InitConfig,
    OptimizerConfig,
    SparsityConfig,
    TrainConfig,
)
from tcsae.train.losses import temporal_term
from tcsae.train.presets import PRESETS, preset
from tcsae.train.settings.temporal_settings import TemporalConfig


@dataclass(frozen=True)
class Inner:
    size: int = 3
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner = field(default_factory=Inner)
    flag: bool = False
    note: str | None = None


@pytest.mark.parametrize(
    "text, count",
    [("300", 300), ("40K", 40_000), ("1.5M", 1_500_000), ("2g", 2 * 10**9), ("1_000", 1000), (".5k", 500)],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "K", "1.5", "-3", "1e3", "3 M x", "0.0001K", "many"])
def test_what_is_no_count(text):
    with pytest.raises(ConfigError, match="is not a count. Write a whole number"):
        parse_count(text)


@given(st.integers(0, 10**12))
def test_every_whole_number_is_a_count(n):
    assert parse_count(str(n)) == n


@pytest.mark.slow
@given(
    st.floats(allow_nan=False),
    st.integers(),
    st.lists(st.text(max_size=3), max_size=3),
    st.booleans(),
    st.none() | st.text(min_size=5, max_size=6),
)
def test_configs_survive_dictionaries(rate, size, names, flag, note):
    config = Outer(rate, Inner(size, tuple(names)), flag, note)
    assert from_dict(Outer, to_dict(config)) == config


def test_settings_reach_nested_keys():
    config = with_settings(Outer(0.5), ["inner.size=40K", "flag=true", "rate=1e-3", "note=hm", "inner.names=x,y"])
    assert config == Outer(1e-3, Inner(40_000, ("x", "y")), True, "hm")
    assert with_settings(config, ["note=none"]).note is None


@pytest.mark.parametrize(
    "setting, message",
    [
        ("inner.siz=3", r"Unknown setting 'inner.siz'. Did you mean 'inner.size'\? There is: rate, inner.size"),
        ("rate", "'rate' has no value. Write key=value"),
        ("rate=fast", "rate='fast' is not a number"),
        ("inner.size=3.5", "inner.size: '3.5' is not a count. Write a whole number"),
        ("flag=maybe", "flag='maybe' is not true or false"),
        ("inner=3", r"Unknown setting 'inner'. Did you mean 'inner.size'\?"),
    ],
)
def test_settings_that_do_not_fit(setting, message):
    with pytest.raises(ConfigError, match=message):
        with_settings(Outer(0.5), [setting])


def test_missing_and_unknown_keys():
    with pytest.raises(ConfigError, match="Outer lacks rate"):
        from_dict(Outer, {})
    with pytest.raises(ConfigError, match=r"Unknown setting 'inner.sizes'. Did you mean 'inner.size'\?"):
        from_dict(Outer, {"rate": 1, "inner": {"sizes": 3}})


def test_differences_name_dotted_keys():
    assert differences(Outer(0.5), Outer(0.5, Inner(4))) == ["inner.size: 3, not 4"]
    assert differences(Outer(0.5), Outer(0.5)) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_survive_json(name):
    config = preset(name, 64)
    assert config.sae.d_model == 64
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"Unknown preset 'topkk'. Did you mean 'topk'\? There is: topk"):
        preset("topkk", 8)


SAE = SaeConfig(d_model=8, d_sae=16, k=4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SaeConfig(d_model=0), "sae.d_model=0: must be at least 1"),
        (lambda: SaeConfig(d_model=8, d_sae=16, k=17), r"sae.k=17: must lie in 1..sae.d_sae=16. Lower k or raise"),
        (lambda: DataConfig(n_segments=0), "data.n_segments=0: must be at least 1"),
        (lambda: DataConfig(segment_length=0), "data.segment_length=0: must be at least 1"),
        (lambda: DataConfig(skip_first=-1), "data.skip_first=-1: must be at least 0"),
        (lambda: OptimizerConfig(lr=0), "optimizer.lr=0: must be above 0"),
        (lambda: OptimizerConfig(lr=float("nan")), "optimizer.lr=nan: must be a finite number"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2=1.0: must lie in 0..1, below 1"),
        (lambda: TemporalConfig(window=1), "temporal.window=1: must be at least 2"),
        (lambda: TemporalConfig(weight=-1), "temporal.weight=-1: must be at least 0"),
        (lambda: TrainConfig(sae=SAE, steps=-1), "steps=-1: must be at least 0"),
        (lambda: SparsityConfig(l1=-0.1), "sparsity.l1=-0.1: must be at least 0"),
        (lambda: DataConfig(max_norm=0.0), "data.max_norm=0.0: must be above 0, or none"),
        (lambda: TemporalConfig(warmup=2), "temporal.warmup=2: must lie in 0..1, a share of the run"),
        (lambda: TemporalConfig(kind="contrastive", pairs="all"), "it takes adjacent pairs only"),
        (lambda: DeadConfig(after_share=0), "dead.after_share=0: must lie in 0..1, above 0"),
        (lambda: GuardConfig(explode=1), "guard.explode=1: must be above 1"),
        (lambda: SaeConfig(d_model=8, d_sae=16, k=4, groups=(0.5, 0.6)), "that sum to 1"),
        (lambda: SaeConfig(d_model=8, d_sae=16, k=4, groups=(0.01, 0.99)), "each at least one latent"),
        (
            lambda: TrainConfig(sae=SAE, group_weights=(1.0, 1.0)),
            r"one weight, at least 0, for each of sae.groups=\(1.0,",
        ),
        (lambda: TrainConfig(sae=SAE, sparsity=SparsityConfig(l0=1.0)), "Set sparsity.l0=0"),
        (lambda: TrainConfig(sae=SAE, init=InitConfig(weights="zero")), "Set optimizer.unit_decoder=false"),
        (
            lambda: TrainConfig(sae=SaeConfig(d_model=8, d_sae=16, k=4, layer_norm="in")),
            "undoes init.input_scale='unit'. Set init.input_scale=none",
        ),
        (
            lambda: TrainConfig(sae=SAE, data=DataConfig(segment_length=2), temporal=TemporalConfig(weight=1.0)),
            "data.segment_length=2 holds no window of temporal.window=3. Raise the first or lower",
        ),
        (
            lambda: from_dict(SaeConfig, {"d_model": 8, "activation": "topc"}),
            "Unknown sae.activation 'topc'. Did you mean 'topk'",
        ),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("decay, end", [("linear", 0.02), ("cosine", 0.0), ("none", 1.0)])
def test_learning_rate_schedule(decay, end):
    config = OptimizerConfig(lr=1.0, warmup_steps=1000, decay=decay)
    rates = [config.learning_rate(step, 250) for step in range(250)]
    assert rates[0] == pytest.approx(1 / 12)  # a twentieth of the run
    assert rates[12] == pytest.approx(1.0)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(end, abs=1e-3)
    assert rates[199] == (1.0 if decay != "cosine" else pytest.approx(0.11, abs=0.02))


def test_a_warm_up_that_is_given_whole_takes_its_steps_however_short_the_run():
    config = OptimizerConfig(lr=1.0, warmup_steps=100, warmup_share=1.0, decay="none")
    assert [config.learning_rate(step, 120) for step in (0, 49, 99, 119)] == pytest.approx([0.01, 0.5, 1.0, 1.0])
    assert config.learning_rate(9, 10) == 1.0, "a run that is shorter is all warm-up"


KEYS = [line.partition("=")[0] for line in to_settings(preset("temporal-matryoshka", 16))]


@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(KEYS),
    st.sampled_from(
        ["-1", "0", "1", "7", "1e9", "nan", "inf", "-inf", "", "x", "none", "true", "0.3", "0.2,0.8", "-0.5"]
    ),
)
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line_that_names_it(name, key, value):
    base = preset(name, 16)
    try:
        config = with_settings(base, [f"{key}={value}"])
        temporal_term(config.temporal.kind)
    except ConfigError as error:
        message = str(error)
        assert key.rpartition(".")[2] in message
        assert "\n" not in message
        assert (
            value in message
            or "must" in message
            or "one weight" in message
            or "shares of" in message
            or "Set " in message
        )
    else:
        taken = dict(line.split("=", 1) for line in to_settings(config))
        assert taken.keys() == set(KEYS)
        assert not any(text == "nan" for name, text in taken.items() if name not in ("data.hook", "data.positions")), (
            taken
        )


@dataclass(frozen=True)
class Named:
    versions: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"torch": 2}, "versions.torch=2 is not text"),
        (["torch"], r"versions=\['torch'\] is no group of names and values"),
    ],
)
def test_entries_of_a_dictionary_are_of_its_type(values, message):
    assert from_dict(Named, {"versions": {"torch": "2"}}) == Named({"torch": "2"})
    with pytest.raises(ConfigError, match=message):
        from_dict(Named, {"versions": values})
