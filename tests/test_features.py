"""Promise: what is shown of a latent is what it does: its measures, its sequences, its likes, its lens, its tokens."""

import numpy as np
import pytest
import torch
import toy_eval as toy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcsae.evaluate.batches import batches
from tcsae.evaluate.measures.temporal_figures import latent_measures
from tcsae.evaluate.report.features.activation_histogram import ActivationHistogram
from tcsae.evaluate.report.features.contexts import N_SAMPLED, N_TOP, QUANTILES, ContextCollector
from tcsae.evaluate.report.features.decoder_map import OPPOSITE_FROM, decoder_map
from tcsae.evaluate.report.features.feature_data import feature_data, label_tokens, token_rarity
from tcsae.evaluate.report.features.feature_pass import MEASURES, Excerpt, collect_features
from tcsae.evaluate.report.features.lens import N_BINS, Lenses, logit_lens
from tcsae.evaluate.report.features.likeness import N_NEAREST, FiringSample, nearest_by_decoder
from tcsae.evaluate.report.pages.matched_saes import matched_latents
from tcsae.evaluate.systems import output_of, system_of
from tcsae.shared.lm.tail import Tail
from tcsae.shared.lm.token_text import TokenTexts, _bytes_text, legible
from tcsae.shared.sae.sparse import positive_code
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy.write_store(tmp_path_factory.mktemp("store") / "a.zarr", toy.make_model(), toy.N_SEQUENCES)


def whole_code(store: Store, sae) -> tuple[torch.Tensor, np.ndarray]:
    """The dense code of every position of the eval split, and which positions are counted."""
    x = torch.from_numpy(store.eval.read(toy.HOOK, 0, store.eval.n_sequences))
    position = np.arange(toy.LENGTH)
    counted = (position < store.eval.lengths[:, None]) & (position >= 1)
    with torch.no_grad():
        code = sae.encode(x)
    code[~torch.from_numpy(counted)] = 0
    return code, counted


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "gelu"])
def test_each_latent_s_measures_are_the_pooled_ones_of_it_alone(store, activation):
    """`eval` and the report may never mean two things by one name."""
    (result,) = collect_features(Excerpt(store.eval, toy.HOOK, toy.FROM_1), [toy.make_sae(activation)], lambda _: None)
    latents = [0, 7, 21]
    for latent in latents:
        which = torch.arange(toy.LATENTS) == latent
        pooled = latent_measures(result.sums, result.sums, which)
        ours = {name: float(values[latent]) for name, values in result.figures.measures.items()}
        for name in (
            "rho_1",
            "rho_1_within",
            "rho_8_within",
            "slowness",
            "dwell",
            "position_share",
            "token_share",
            "document_share",
        ):
            assert ours[name] == pytest.approx(pooled.values[name], nan_ok=True), name
        np.testing.assert_allclose(result.figures.rho[:, latent], pooled.curves["rho_1_within"], rtol=1e-9)
        assert float(result.figures.rho_null[latent]) == pytest.approx(pooled.nulls["rho_1_within"])
    assert list(result.figures.measures) == list(MEASURES)
    dead = {name: float(values[3]) for name, values in result.figures.measures.items() if activation != "gelu"}
    assert all(np.isnan(value) for name, value in dead.items() if name != "density")


def test_density_and_sequences_are_counted(store):
    sae = toy.make_sae("relu")
    (result,) = collect_features(Excerpt(store.eval, toy.HOOK, toy.FROM_1), [sae], lambda _: None)
    code, counted = whole_code(store, sae)
    on = code > 0
    np.testing.assert_allclose(result.figures.measures["density"], on.sum((0, 1)) / counted.sum())
    assert result.contexts.n_sequences.tolist() == on.any(1).sum(0).tolist()
    np.testing.assert_allclose(result.contexts.maximum(), code.amax((0, 1)).clamp(min=0), rtol=1e-6)
    np.testing.assert_allclose(result.contexts.total, code.clamp(min=0).sum((0, 1)), rtol=1e-5)
    assert result.alive.tolist() == on.any(1).any(0).tolist()
    assert not result.alive[3]
    assert result.n_tokens == counted.sum()


def test_a_window_reads_no_token_across_one_that_is_left_out(store):
    sae, rules = toy.make_sae(window=3), CountingRules(skip_first=1, exclude_tokens=tuple(map(str, range(20))))
    (result,) = collect_features(Excerpt(store.eval, toy.HOOK, rules), [sae], lambda _: None)
    n_tokens, n_on = 0, 0
    for batch in batches(store.eval, toy.HOOK, rules):
        assert len(batch.runs.unique()) > (batch.counted.any(1)).sum(), "there are holes"
        code = output_of(system_of(sae), batch.x[batch.counted], batch.runs).code  # as eval has it
        n_tokens, n_on = n_tokens + code.n_tokens, n_on + (code.dense() > 0).sum(0)
    np.testing.assert_allclose(result.figures.measures["density"], n_on / n_tokens)


def test_a_part_of_a_split_is_its_first_documents(store):
    (result,) = collect_features(
        Excerpt(store.eval, toy.HOOK, toy.FROM_1, max_tokens=50), [toy.make_sae()], lambda _: None
    )
    ends = np.append(np.flatnonzero(np.diff(store.eval.documents)) + 1, store.eval.n_sequences)
    n = next(end for end in ends if store.eval.lengths[:end].sum() >= 50)
    assert result.n_tokens == np.maximum(store.eval.lengths[:n] - 1, 0).sum()
    assert int(result.contexts.top.sequence.max()) < n


def random_code(seed: int, n_sequences: int, length: int, d_sae: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n_sequences, length, d_sae, generator=generator)
    return torch.where(torch.rand(code.shape, generator=generator) < density, code, 0.0)


def collect(code: torch.Tensor, cuts: list[int]) -> ContextCollector:
    made = ContextCollector(code.shape[2], code.shape[1])
    counted = torch.ones(code.shape[:2], dtype=torch.bool)
    for start, stop in zip([0, *cuts], [*cuts, len(code)], strict=True):
        made.add(start, counted[start:stop], positive_code(code[start:stop].flatten(0, 1)))
    return made


@settings(max_examples=30, deadline=None)
@example(21304, [], 0.3)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 59), max_size=4, unique=True), st.sampled_from([0.003, 0.03, 0.3])
)
def test_the_strongest_sequences_are_kept_whole_however_batches_are_cut(seed, cuts, density):
    code = random_code(seed, 60, 5, 7, density)
    ours, other = collect(code, sorted(cuts)), collect(code, [])
    peaks = code.amax(1)
    for latent in range(7):
        firing = (peaks[:, latent] > 0).nonzero().squeeze(1).tolist()
        expected = sorted(firing, key=lambda i: -float(peaks[i, latent]))
        result = ours.contexts(latent)
        strongest = [one for one in result if one.quantile is None]
        assert [one.sequence for one in strongest] == expected[:N_TOP]
        assert len({one.sequence for one in result}) == len(result)
        for one in result:
            # float16 shares of the peak: below 6e-5 of it their steps no longer shrink.
            np.testing.assert_allclose(one.activations, code[one.sequence, :, latent], rtol=1e-3, atol=6e-8)
        again = other.contexts(latent)
        assert [(one.sequence, one.quantile) for one in result] == [(one.sequence, one.quantile) for one in again]
        if len(firing) <= N_SAMPLED:  # exact
            ascending = sorted(firing, key=lambda i: float(peaks[i, latent]))
            for one in result[len(strongest) :]:
                assert one.sequence == ascending[round(one.quantile * (len(firing) - 1))]


def test_the_sample_is_fair():
    """Of 400 sequences in which all latents fire, each is drawn as often as any other."""
    code = torch.rand(400, 1, 300, generator=torch.Generator().manual_seed(0)) + 0.1
    made = collect(code, [100, 150, 390])
    drawn = torch.bincount(made.sample.sequence.flatten().long(), minlength=400).float()
    assert drawn.sum() == 300 * N_SAMPLED
    mean, chance = 300 * N_SAMPLED / 400, N_SAMPLED / 400
    assert abs(float(drawn.var()) / (300 * chance * (1 - chance)) - 1) < 0.3
    assert abs(float(drawn[:100].mean()) / mean - 1) < 0.05
    quantiles = {one.quantile for one in made.contexts(0)} - {None}
    assert quantiles <= set(QUANTILES)
    peaks = code[:, 0, 0].sort().values
    middle = next(one for one in made.contexts(0) if one.quantile == 0.5)
    assert peaks[120] < middle.activations.max() < peaks[280]


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 30]])
def test_the_histogram_of_activations_is_exact_however_they_come(cuts):
    """Of values over eight orders of magnitude, the largest last: as if the range had been known."""
    values = torch.logspace(-6, 2, 50)[:, None] * torch.tensor([1.0, 0.0, 3.0])
    made = ActivationHistogram(3)
    for part in values.tensor_split(cuts):
        made.add(positive_code(part))
    for latent in (0, 2):
        width, counts = made.of(latent)
        assert sum(counts) == 50
        assert width * len(counts) > values[:, latent].max() >= width * (len(counts) - 1)
        expected, _ = np.histogram(values[:, latent], np.arange(len(counts) + 1) * width)
        assert counts == expected.tolist()
        assert len(counts) > 32
    assert made.of(1)[1] == []


def test_the_map_is_that_of_principal_components_and_joins_opposite_latents():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator) * torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    rows[7] = -2 * rows[3]
    alive = torch.ones(40, dtype=torch.bool)
    alive[11] = False
    result = decoder_map(rows, alive, nearest_by_decoder(rows, alive).opposite)
    unit = torch.nn.functional.normalize(rows, dim=1)[alive].double()
    centred = unit - unit.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    assert result.explained == pytest.approx(float(singular[:2].square().sum() / singular.square().sum()), rel=1e-4)
    places = result.places["PCA"]
    assert places.shape == (39, 2)
    assert np.abs(places).max() == pytest.approx(1, abs=1e-5)
    for axis in range(2):
        assert abs(np.corrcoef(places[:, axis], centred @ axes[axis])[0, 1]) == pytest.approx(1, abs=1e-5)
    assert result.pairs[0][:2] == (3, 7)
    assert result.pairs[0][2] == pytest.approx(-1, abs=1e-5)
    assert all(11 not in pair and pair[2] <= -OPPOSITE_FROM for pair in result.pairs)
    none = torch.zeros(40, dtype=torch.bool)
    assert decoder_map(rows, none, nearest_by_decoder(rows, none).opposite).pairs == []


def test_saes_are_matched_by_the_nearest_row_both_ways(monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.pages.matched_saes.DECODER_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 5, generator=generator), torch.randn(30, 5, generator=generator)
    alive, other = torch.ones(20, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    alive[4] = other[9] = False
    b[17] = 3 * a[2]
    result = matched_latents(a, b, alive, other)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (a, b)]
    cosines = (unit[0] @ unit[1].T).masked_fill(~other, -2)
    cosines[~alive] = -2
    assert result["a"][0] == cosines[alive].argmax(1).tolist()
    assert result["b"][0] == cosines.T[other].argmax(1).tolist()
    np.testing.assert_allclose(result["a"][1], cosines[alive].amax(1), atol=6e-4)
    np.testing.assert_allclose(result["b"][1], cosines.T[other].amax(1), atol=6e-4)
    assert result["a"][0][2] == 17
    assert matched_latents(a, b, alive, torch.zeros(30, dtype=torch.bool)) == {"a": None, "b": None}


def test_the_nearest_latents(store, monkeypatch):
    sae = toy.make_sae("relu")
    monkeypatch.setattr("tcsae.evaluate.report.features.likeness.DECODER_BLOCK", 7)
    monkeypatch.setattr("tcsae.evaluate.report.features.likeness.PAIR_BLOCK", 50)
    (result,) = collect_features(Excerpt(store.eval, toy.HOOK, toy.FROM_1), [sae], lambda _: None)
    unit = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).detach()
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    cosines[:, ~result.alive] = -1
    near, opposite = nearest_by_decoder(sae.W_dec, result.alive)
    np.testing.assert_allclose(near.likeness, cosines.topk(N_NEAREST, 1).values.clamp(min=0), rtol=1e-5)
    assert near.latents[:, 0].tolist() == cosines.argmax(1).tolist()
    other = (unit @ unit.T).masked_fill(torch.eye(toy.LATENTS, dtype=torch.bool) | ~result.alive, 1)
    np.testing.assert_allclose(opposite.likeness, (-other).topk(N_NEAREST, 1).values.clamp(min=0), rtol=1e-5)
    assert opposite.latents[:, 0].tolist() == other.argmin(1).tolist()
    code, counted = whole_code(store, sae)
    on = (code[torch.from_numpy(counted)] > 0).double()
    both = on.T @ on
    either = on.sum(0)[:, None] + on.sum(0) - both
    jaccard = (both / either.clamp(min=1)).fill_diagonal_(-1)
    together, correlated = result.firing.nearest(result.alive)
    np.testing.assert_allclose(together.likeness, jaccard.topk(N_NEAREST, 1).values.clamp(min=0), rtol=1e-5)
    values = np.corrcoef(code[torch.from_numpy(counted)].clamp(min=0).double().T.numpy() + 0.0)
    values[:, ~result.alive] = -1
    np.fill_diagonal(values, -1)
    best = -np.sort(-np.nan_to_num(values, nan=0), 1)[:, :N_NEAREST]
    np.testing.assert_allclose(correlated.likeness, best.clip(min=0), atol=1e-4)
    assert result.firing.n_tokens == counted.sum()


def test_firing_together_is_counted_on_a_bounded_sample(monkeypatch):
    monkeypatch.setattr("tcsae.evaluate.report.features.likeness.SAMPLE_TOKENS", 100)
    sample = FiringSample(6, 1000)
    code = random_code(0, 50, 20, 6, 0.5)
    sample.add(0, torch.ones(50, 20, dtype=torch.bool), positive_code(code.flatten(0, 1)))
    assert sample.n_tokens == 100, "every tenth sequence"
    on = (code[::10].flatten(0, 1) > 0).double()
    both = on.T @ on
    jaccard = (both / (on.sum(0)[:, None] + on.sum(0) - both)).fill_diagonal_(0)
    np.testing.assert_allclose(
        sample.nearest(torch.ones(6, dtype=torch.bool)).joint.likeness, jaccard.topk(5, 1).values, rtol=1e-6
    )
    monkeypatch.setattr("tcsae.evaluate.report.features.likeness.SAMPLE_PAIRS", 0)
    alive = torch.ones(6, dtype=torch.bool)
    none = FiringSample(6, 1000)
    none.add(0, torch.ones(50, 20, dtype=torch.bool), positive_code(code.flatten(0, 1)))
    assert [one.likeness.sum() for one in none.nearest(alive)] == [0, 0]


def test_the_lens_is_the_tail_s_answer_to_one_direction(store, tmp_path):
    tail = Tail.load(store.tail_path(toy.HOOK))
    generator = torch.Generator().manual_seed(0)
    mean, directions = torch.randn(toy.WIDTH, generator=generator), torch.randn(5, toy.WIDTH, generator=generator)
    tokens = torch.arange(0, toy.VOCABULARY, 2)
    result = logit_lens(tail, mean, directions, tokens)
    for i, direction in enumerate(directions):
        change = tail.logits((mean + direction).view(1, 1, -1))[0, 0] - tail.logits(mean.view(1, 1, -1))[0, 0]
        change = (change - change.mean())[tokens]
        best = change.argsort(descending=True)[:8]
        assert result.promoted[i].tolist() == tokens[best].tolist()
        np.testing.assert_allclose(result.gains[i], change[best], atol=1e-4)
        assert result.suppressed[i, 0] == tokens[change.argmin()]
        assert result.losses[i, 0] == pytest.approx(float(change.min()), abs=1e-4)
        counts, edges = np.histogram(change.numpy(), N_BINS)
        assert result.counts[i].sum() == len(tokens)
        assert abs(result.counts[i].numpy() - counts).sum() <= 4, "a change on an edge may fall on either side"
        assert (result.lowest[i], result.highest[i]) == pytest.approx((edges[0], edges[-1]), abs=1e-4)
    without = toy.write_store(tmp_path / "no.zarr", toy.make_model(), {"train": 2, "eval": 2}, with_tail=False)
    lenses = Lenses(without, Excerpt(without.eval, toy.HOOK, toy.FROM_1))
    assert lenses.of(toy.HOOK, directions[:, None]) is None
    assert "no tail for" in lenses.tail(toy.HOOK)


def test_a_crosscoder_s_latent_has_a_row_for_each_position(store):
    sae = toy.make_sae("topk", window=3)
    part = Excerpt(store.eval, toy.HOOK, toy.FROM_1)
    (result,) = collect_features(part, [sae], lambda _: None)
    latent = int(result.alive.nonzero()[0])
    rows = sae.W_dec.detach()[latent].view(1, 3, toy.WIDTH)
    lenses = Lenses(store, part).of(toy.HOOK, rows)
    data = feature_data(result, sae, lenses, part.tokens, [latent])
    ((shown,),) = [chunk.values() for chunk in data.chunks.values()]
    assert [tokens for _, _, tokens in shown["window"]] == [lens.promoted[0].tolist() for lens in lenses]
    assert shown["up"][0][0] == shown["window"][2][2][0], "the token's own position is the last"
    norms = rows[0].norm(dim=1)
    np.testing.assert_allclose([share for share, _, _ in shown["window"]], norms**2 / (norms**2).sum(), atol=1e-3)
    cosines = rows[0] @ rows[0, 2] / norms / norms[2]
    np.testing.assert_allclose([cosine for _, cosine, _ in shown["window"]], cosines, atol=1e-3)
    assert data.tokens >= {token for _, _, tokens in shown["window"] for token in tokens}


def test_a_latent_s_tokens_are_those_it_fires_on_rare_ones_first():
    tokens = np.array([[1, 2, 3, 1], [1, 4, 1, 1]])
    collector = ContextCollector(1, 4)
    code = torch.tensor([[[1.0], [1.0], [0.2], [0.0]], [[0.0], [0.3], [1.0], [1.0]]])
    collector.add(0, torch.ones(2, 4, dtype=torch.bool), positive_code(code.flatten(0, 1)))
    rarity = token_rarity(tokens)
    assert rarity[1] == pytest.approx(np.log(8 / 5))
    assert label_tokens(collector.kept(0), tokens, rarity) == [2, 1, 4], "3 is below a quarter of the peak"


def test_tokens_show_legibly(tiny_store, store):
    from tcsae.shared.store.reader import open_store

    texts = TokenTexts(open_store(tiny_store))
    tokenizer = texts._tokenizer
    for text, shown in ((" a", " a"), ("\n", "⏎"), ("\t", "⇥"), ("\x1b", "\\x1b"), ("<", "<")):
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        assert texts[token] == shown
    assert "".join(texts[token] for token in tokenizer.encode("é", add_special_tokens=False)) == "⟨C3⟩⟨A9⟩"
    assert texts[0] == "<|endoftext|>"
    assert texts[10**6] == "⟨1000000⟩", "beyond the vocabulary"
    assert TokenTexts(store)[17] == "⟨17⟩", "no tokenizer in that store"
    assert list(texts.table([5, 3, 5])) == [3, 5]


def test_bytes_and_odd_pieces():
    assert _bytes_text("<0xE2>") == "⟨E2⟩"
    assert _bytes_text("âĢ") == "⟨E2 80⟩"
    assert _bytes_text("漢") == "漢", "no byte-level vocabulary"
    assert legible("\u202eb") == "\\u202eb", "no override of the direction of text"
