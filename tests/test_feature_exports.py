"""Promise: Neuronpedia's converter and delphi's loader find in our exports what the SAE does on the store."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy
import torch

from tcsae.evaluate.exports import run as exports
from tcsae.evaluate.exports.feature_source import ExportRequest
from tcsae.shared.base.errors import RunError, Stopped, StoreError
from tcsae.shared.sae.folder import load_sae, save_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import open_store

RUN = "topk"
FEATURE = {
    # What convert-saedashboard-to-neuronpedia-export.py (Neuronpedia ebb8426f) looks up, and its types there.
    "feature_index": int,
    "neuron_alignment_indices": int,
    "neuron_alignment_values": float,
    "neuron_alignment_l1": float,
    "correlated_neurons_indices": int,
    "correlated_neurons_pearson": float,
    "correlated_neurons_l1": float,
    "correlated_features_indices": int,
    "correlated_features_pearson": float,
    "correlated_features_l1": float,
    "neg_str": str,
    "neg_values": float,
    "pos_str": str,
    "pos_values": float,
    "frac_nonzero": float,
    "freq_hist_data_bar_heights": float,
    "freq_hist_data_bar_values": float,
    "logits_hist_data_bar_heights": float,
    "logits_hist_data_bar_values": float,
    "decoder_weights_dist": float,
    # And what SAEDashboard 0.8.0 writes besides.
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    "vector": float,
}
SCALARS = ("feature_index", "frac_nonzero", "n_prompts_total", "n_tokens_in_prompt", "dataset")
ACTIVATION = {"bin_min": float, "bin_max": float, "bin_contains": float, "qualifying_token_index": int}


@pytest.fixture(scope="module")
def place(tiny_store, tmp_path_factory):
    """A store, and a run with random weights, some of whose latents never fire."""
    place = tmp_path_factory.mktemp("exports") / "place"
    shutil.copytree(tiny_store, place / "a.zarr")
    store = open_store(place / "a.zarr")
    x = torch.from_numpy(store.train.read(store.hook(), 0, 8)[:, 1:5]).reshape(-1, 16)
    torch.manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_model=16, d_sae=40, activation="topk", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(40, 16), dim=1))
        sae.W_enc_rows.copy_(sae.W_dec)
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc[::7] = -1e6
    record = {
        "name": RUN,
        "preset": "topk",
        "train": {"data": {"skip_first": 1}},
        "hook": store.hook(),
        "store": {"content": store.content},
        "steps": 7,
        "tokens": 100,
    }
    (place / "runs" / RUN).mkdir(parents=True)
    save_sae(sae, place / "runs" / RUN, record, {"model_name": "tiny", "hook_name": store.hook()})
    return place


@pytest.fixture(scope="module")
def codes(place):
    """Dense codes [n_sequences, length, d_sae] of the eval split, 0 where not counted."""
    store, sae = open_store(place / "a.zarr"), load_sae(place / "runs" / RUN)
    x = torch.from_numpy(store.eval.read(store.hook(), 0, store.eval.n_sequences))
    with torch.no_grad():
        result = sae.encode(x.view(-1, x.shape[-1])).view(*x.shape[:2], -1).numpy()
    result[~counted(store.eval, CountingRules(skip_first=1))] = 0
    return result


def export(place, out, form: str, **options) -> str:
    request = ExportRequest(name=RUN, **options)
    return exports.export_features(open_store(place / "a.zarr"), place / "runs", request, form, out)


def test_neuronpedia_features_have_the_schema_and_say_what_the_codes_do(place, codes, tmp_path, monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.exports.neuronpedia.BATCH_FEATURES", 10)
    line = export(place, tmp_path / "out", "neuronpedia")
    store = open_store(place / "a.zarr")
    alive = (codes > 0).any((0, 1))
    batches = [json.loads((tmp_path / f"out/batch-{i}.json").read_text()) for i in range(-(-int(alive.sum()) // 10))]
    for batch in batches:
        assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
        assert (batch["layer"], batch["sae_set"]) == (2, RUN)
        assert 1 <= len(batch["features"]) <= 10
    features = [one for batch in batches for one in batch["features"]]
    assert [one["feature_index"] for one in features] == np.flatnonzero(alive).tolist()
    assert f"{alive.sum()} features" in line
    skipped = json.loads((tmp_path / "out/skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == np.flatnonzero(~alive).tolist()
    n_counted = counted(store.eval, CountingRules(skip_first=1)).sum()
    for one in features:
        assert one.keys() == {*FEATURE, "activations"}
        for name, kind in FEATURE.items():
            values = [one[name]] if name in SCALARS else one[name]
            assert all(type(value) is kind for value in values), name
        latent = one["feature_index"]
        assert one["frac_nonzero"] == pytest.approx((codes[..., latent] > 0).sum() / n_counted)
        assert sum(one["freq_hist_data_bar_heights"]) == (codes[..., latent] > 0).sum()
        assert len(one["freq_hist_data_bar_heights"]) == len(one["freq_hist_data_bar_values"])
        assert one["pos_str"] and len(one["pos_str"]) == len(one["pos_values"])
        top = one["activations"][0]
        assert max(top["values"]) == pytest.approx(codes[..., latent].max(), rel=2e-3, abs=2e-3)
        for shown in one["activations"]:
            assert shown.keys() == {*ACTIVATION, "tokens", "values"}
            assert all(type(shown[name]) is kind for name, kind in ACTIVATION.items())
            assert len(shown["tokens"]) == len(shown["values"]) > 0
            assert all(type(token) is str for token in shown["tokens"])
            assert shown["values"][shown["qualifying_token_index"]] == max(shown["values"]) > 0


@pytest.mark.parametrize("length", [None, 8])
def test_delphi_reads_every_activation_of_whole_contexts(place, codes, tmp_path, length):
    export(place, tmp_path / "out", "delphi", context_length=length)
    store, n = open_store(place / "a.zarr"), length or 32
    module = tmp_path / "out/latents" / store.hook()
    config = json.loads((module / "config.json").read_text())
    assert (config["ctx_len"], config["cache_ctx_len"], config["n_splits"]) == (n, n, 5)
    per_sequence = store.eval.lengths // n
    contexts = [(s, c * n) for s, many in enumerate(per_sequence.tolist()) for c in range(many)]
    expected = np.stack([codes[s, start : start + n] for s, start in contexts])
    edges = sorted(tuple(map(int, file.stem.split("_"))) for file in module.glob("*.safetensors"))
    assert edges[0][0] == 0
    assert edges[-1][1] == codes.shape[-1] - 1
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(edges))
    result = np.zeros_like(expected)
    for first, last in edges:
        data = safetensors.numpy.load_file(module / f"{first}_{last}.safetensors")
        assert data["activations"].dtype == np.float16
        assert data["locations"].dtype in (np.uint16, np.uint32)
        tokens = np.stack([store.eval.tokens[s, start : start + n] for s, start in contexts])
        np.testing.assert_array_equal(data["tokens"], tokens)
        context, position, latent = data["locations"].astype(np.int64).T
        assert latent.max() <= last - first
        result[context, position, latent + first] = data["activations"]
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=1e-4)
    assert (tmp_path / "out/tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize("form", ["neuronpedia", "delphi"])
def test_an_interrupted_export_leaves_the_earlier_one(place, tmp_path, form, monkeypatch):
    out = tmp_path / "out"
    export(place, out, form)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    real, seen = exports.progress, []

    def interrupting(*arguments, **options):
        bar = real(*arguments, **options)
        advance = bar.__enter__()
        bar.__enter__ = None

        class Bar:
            def __enter__(self):
                def after(n):
                    seen.append(n)
                    signal.raise_signal(signal.SIGINT)
                    advance(n)

                return after

            def __exit__(self, *error):
                return bar.__exit__(*error)

        return Bar()

    monkeypatch.setattr(exports, "progress", interrupting)
    with pytest.raises(Stopped, match="nothing of this one is there"):
        export(place, out, form)
    assert seen
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_else_is_overwritten_and_what_does_not_fit_is_said(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for form in ("neuronpedia", "delphi"):
        with pytest.raises(RunError, match="mine holds thesis.txt; an export goes into a new folder"):
            export(place, tmp_path / "mine", form)
    with pytest.raises(StoreError, match="No sequence of .* has 99 tokens; the longest has 32. Give a shorter"):
        export(place, tmp_path / "out", "delphi", context_length=99)
    assert not (tmp_path / "out").exists()
