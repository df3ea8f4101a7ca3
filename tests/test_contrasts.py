"""Promise: every contrastive term is what its equation says, pair by pair, and what it cannot train is refused."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tcsae.shared.base.errors import ConfigError
from tcsae.shared.base.settings import to_dict, with_settings
from tcsae.shared.sae.sparse import positive_code
from tcsae.train.batch import Batch, Text, shuffled
from tcsae.train.losses import temporal_term
from tcsae.train.losses.contrastive import contrastive
from tcsae.train.losses.direction import direction
from tcsae.train.losses.pairs import choose_pairs
from tcsae.train.losses.state import BilinearHead, TermState
from tcsae.train.losses.t_sae import paired
from tcsae.train.presets import PRESETS, TEMPORAL_PRESETS, preset
from tcsae.train.record import _with_defaults
from tcsae.train.settings.temporal_settings import CONTRASTIVE, ContrastConfig, TemporalConfig
from tcsae.train.trainer import Trainer

D = 7


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    """Segments of one to three consecutive ones a document, from positions 0, 5 or 10 of their sequence on."""
    n, rng = len(lengths), np.random.default_rng(seed)
    return Batch(
        torch.zeros(sum(lengths), 3), np.array(lengths), rng.integers(0, 3, n) * 5, np.sort(rng.integers(0, n, n))
    )


def code_of(n: int, seed: int) -> torch.Tensor:
    """With tokens whose code is empty, and tokens of equal codes."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, D, generator=generator).relu() * (torch.rand(n, D, generator=generator) < 0.6)
    dense[torch.rand(n, generator=generator) < 0.15] = 0
    dense[n // 2 :: 3] = dense[n // 3].clone()
    return dense


def where(batch: Batch) -> list[tuple[int, int, int, int]]:
    """Of each token: segment, offset in it, position in the sequence, document."""
    rows = enumerate(zip(batch.lengths, batch.starts, batch.documents, strict=True))
    return [(i, t, int(start) + t, int(document)) for i, (n, start, document) in rows for t in range(n)]


class Watched(ContrastConfig):
    """Notes the names of the settings that are looked at."""

    def __getattribute__(self, name: str):
        LOOKED_AT.add(name)
        return super().__getattribute__(name)


LOOKED_AT: set[str] = set()


def is_negative(kind: str, one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    same, far = one[0] == other[0], one[3] != other[3]
    return {"documents": far, "sequence": same, "batch": same or far, "position": far and one[2] == other[2]}[kind]


def naive(config: TemporalConfig, f: torch.Tensor, batch: Batch, seed: int, means: torch.Tensor | None) -> torch.Tensor:
    """InfoNCE pair by pair, over the tokens that were drawn."""
    at, first = where(batch), choose_pairs(config, batch, seed).first.tolist()
    if means is not None:
        f = f - means[[position for _, _, position, _ in at]]
    losses = []
    for i in first:
        others = [j for j in first if j != i and is_negative(config.negatives, at[i], at[j])]
        if len(others) < config.contrast.min_negatives:
            continue
        for anchor, targets in ((i, [i + 1, *(j + 1 for j in others)]), (i + 1, [i, *others])):
            scores = torch.stack([F.cosine_similarity(f[anchor], f[j], dim=0, eps=1e-12) for j in targets])
            losses.append(
                torch.logsumexp(scores / config.contrast.temperature, 0) - scores[0] / config.contrast.temperature
            )
    return torch.stack(losses).mean() if losses else f.sum() * 0


def same_as(loss, oracle, dense: torch.Tensor) -> None:
    """Value and gradient, of the code as a matrix and as entries."""
    leaf = dense.clone().requires_grad_()
    expected = oracle(leaf)
    expected.backward()
    matrix = dense.clone().requires_grad_()
    entries = positive_code(dense)
    entries = entries.with_values(entries.values.clone().requires_grad_())
    for code, to in ((matrix, matrix), (entries, entries.values)):
        value = loss(code)
        assert value.item() == pytest.approx(expected.item(), abs=1e-10)
        if not value.requires_grad:
            assert not leaf.grad.any()
            continue
        (grad,) = torch.autograd.grad(value, to, allow_unused=True)
        # A token without an active latent has no direction: its gradient is only looked at where entries are.
        wanted, grad = leaf.grad[entries.rows, entries.latents], torch.zeros_like(to) if grad is None else grad
        torch.testing.assert_close(grad if to is entries.values else grad[entries.rows, entries.latents], wanted)


lengths_of_segments = st.lists(st.integers(1, 13), min_size=1, max_size=6)


@pytest.mark.slow
@given(
    lengths_of_segments,
    st.sampled_from(["documents", "sequence", "batch", "position"]),
    st.sampled_from([None, 1, 2]),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_contrasts_equal_autograd_pair_by_pair(lengths, negatives, per_segment, gap, centred, least, seed):
    contrast = ContrastConfig(
        negatives=negatives, per_segment=per_segment, gap=gap, centred=centred, min_negatives=least, temperature=0.5
    )
    config, batch = TemporalConfig(kind="local", contrast=contrast), batch_of(lengths, seed)
    means = torch.rand(30, D, generator=torch.Generator().manual_seed(seed)) + 0.1 if centred else None
    state = TermState(position=batch.positions(), means=means)
    same_as(
        lambda code: contrastive(config, code, batch, seed, state),
        lambda f: naive(config, f, batch, seed, means),
        code_of(sum(lengths), seed),
    )


@given(lengths_of_segments, st.sampled_from([None, 1, 2]), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_direction_equals_autograd_pair_by_pair(lengths, per_segment, gap, seed):
    contrast = ContrastConfig(per_segment=per_segment, gap=gap, rank=3)
    config, batch = TemporalConfig(weight=1.0, kind="direction", contrast=contrast), batch_of(lengths, seed)
    head = BilinearHead(D, 3, seed).double()
    torch.nn.init.normal_(head.V)
    first, at = choose_pairs(config, batch, seed, before=1).first.tolist(), where(batch)

    def oracle(f: torch.Tensor) -> torch.Tensor:
        h = F.normalize(f, dim=1)
        scores = h @ head.U.detach() @ head.V.detach().T @ h.T / contrast.temperature
        losses = []
        for i in first:
            assert at[i][1] >= 1
            far = [j + 1 for j in first if j != i and at[i][0] == at[j][0]]
            losses.append(scores[i, [i + 1, i - 1, *far]].logsumexp(0) - scores[i, i + 1])
        return torch.stack(losses).mean() if losses else f.sum() * 0

    same_as(
        lambda code: direction(config, code, batch, seed, TermState(head=head)), oracle, code_of(sum(lengths), seed)
    )
    # Its own weights always have a gradient, where no pair is too.
    direction(config, positive_code(code_of(sum(lengths), seed)), batch, seed, TermState(head=head)).backward()
    assert head.U.grad is not None and head.V.grad is not None


def test_direction_tells_order_and_a_cosine_does_not():
    batch, f = batch_of([12]), code_of(12, 0) + 0.1
    backward = f.flip(0)
    head = BilinearHead(D, 4, 0).double()
    torch.nn.init.normal_(head.V)
    config = TemporalConfig(weight=1.0, kind="direction", contrast=ContrastConfig(gap=1))
    ours, theirs = (direction(config, one, batch, 1, TermState(head=head)) for one in (f, backward))
    assert abs(ours - theirs) > 0.1
    config = TemporalConfig(weight=1.0, kind="local", contrast=ContrastConfig(gap=1))
    ours, theirs = (contrastive(config, one, batch, 1) for one in (f, backward))
    assert ours.item() == pytest.approx(theirs.item())


@given(lengths_of_segments, st.sampled_from([None, 1, 3]), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_pairs_keep_their_distance(lengths, per_segment, gap, aligned, seed):
    contrast = ContrastConfig(per_segment=per_segment, gap=gap, negatives="position" if aligned else "sequence")
    batch = batch_of(lengths, seed)
    pairs = choose_pairs(TemporalConfig(kind="local", contrast=contrast), batch, seed)
    at = [where(batch)[i] for i in pairs.first.tolist()]
    assert all(t + 1 < lengths[i] for i, t, _, _ in at)
    for one, (i, t, _, _) in enumerate(at):
        for other, (j, u, _, _) in enumerate(at):
            assert one == other or i != j or abs(t - u) >= gap
    counts = np.bincount(pairs.segment, minlength=len(lengths))
    assert per_segment is None or counts.max(initial=0) <= per_segment
    if not aligned:
        assert all((count > 0) == (n >= 2) for count, n in zip(counts, lengths, strict=True))
    else:
        offsets = {i: sorted(t for one, t, _, _ in at if one == i) for i in range(len(lengths)) if counts[i]}
        assert per_segment is not None or len({tuple(ts[:1]) for ts in offsets.values()}) <= 1, "one grid for all"
    assert (pairs.negatives == pairs.negatives.T).all()
    assert not pairs.negatives.diagonal().any()


@pytest.mark.parametrize("negatives, share", [("documents", 0.9), ("position", 0.1)])
def test_every_position_is_drawn(negatives, share):
    """Of segments of 16, whatever the number of pairs in each."""
    n = 64
    batch = Batch(torch.zeros(16 * n, 3), np.full(n, 16), np.arange(n) % 8 * 16 + 1, np.arange(n))
    config = TemporalConfig(kind="contrastive", contrast=ContrastConfig(negatives=negatives))
    drawn = [choose_pairs(config, batch, seed) for seed in range(150)]
    assert {int(one) % 16 for pairs in drawn for one in pairs.first} == set(range(15))
    assert float(np.mean([pairs.negatives.mean() for pairs in drawn])) > share


@pytest.mark.parametrize("order", ["segment", "batch"])
@pytest.mark.parametrize("per_segment", [1, 2])
def test_the_same_position_is_that_in_the_text_in_another_order_too(order, per_segment):
    n = 32
    text = Batch(torch.arange(16.0 * n)[:, None], np.full(n, 16), np.arange(n) % 4 * 16 + 1, np.arange(n) // 2)
    contrast = ContrastConfig(negatives="position", gap=4, per_segment=per_segment)
    config, at, shares = TemporalConfig(kind="contrastive", contrast=contrast), where(text), []
    for seed in range(20):
        _, batch = shuffled(order, text, seed)
        pairs = choose_pairs(config, batch, seed)
        assert (pairs.first % 16 < 15).all(), "whose partners are of the same segment"
        token = [at[int(batch.x[i])] for i in pairs.first]
        expected = [[one[2] == other[2] and one[3] != other[3] for other in token] for one in token]
        assert (pairs.negatives == np.array(expected)).all()
        in_text = choose_pairs(config, text, seed).negatives.sum(1)
        shares.append(pairs.negatives.sum(1).mean() / in_text.mean())
    assert np.mean(shares) > 0.85, "but those that nothing follows, as many as in the text"


@pytest.mark.parametrize(
    ("settings_", "line"),
    [
        (("temporal.kind=local",), "temporal.kind='local' at temporal.contrast.gap=16 takes segments of 18 positions"),
        (("temporal.kind=direction", "temporal.contrast.gap=20"), "takes segments of 23 positions, and finds no pair"),
        (("temporal.kind=t-sae", "data.segment_length=1"), "temporal.kind='t-sae' takes segments of 2 positions"),
        (("temporal.kind=gated", "data.segment_length=2"), "holds no window of temporal.window=3. Raise the first or"),
        (
            ("temporal.contrast.negatives=sequence",),
            "is for temporal.kind=contrastive or local, and it is 'difference'",
        ),
        (("temporal.contrast.negatives=sequnce",), "Unknown value 'sequnce'. Did you mean 'sequence'?"),
        (("temporal.contrast.gap=0",), "temporal.contrast.gap=0: must be at least 1."),
        (("temporal.contrast.per_segment=0",), "temporal.contrast.per_segment=0: must be at least 1."),
        (
            ("temporal.kind=contrastive", "temporal.contrast.negatives=position", "temporal.order=document"),
            "temporal.contrast.negatives='position' with temporal.order='document', sae.window=1 and sae.predictor="
            "'none': a token has no place of its own there. Set temporal.contrast.negatives=documents",
        ),
        (
            (
                "temporal.kind=contrastive",
                "temporal.contrast.negatives=position",
                "temporal.order=segment",
                "sae.predictor=decay",
            ),
            "sae.predictor='decay': a token has no place of its own there.",
        ),
        (("temporal.temperature=0.3",), "Did you mean 'temporal.contrast.temperature'?"),
        (("temporal.kind=direction", "temporal.pairs=all"), "temporal.kind='direction': it takes adjacent pairs only."),
    ],
)
def test_what_has_no_pair_is_refused_with_the_cure(settings_, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        with_settings(preset("topk", 8), ["temporal.weight=1", *settings_])


@pytest.mark.parametrize(
    ("name", "settings_", "line"),
    [
        (
            "temporal-topk",
            ("temporal.contrast.negatives=sequence", "data.segment_length=128"),
            "temporal.kind='contrastive' draws 1 pair(s) a segment (temporal.contrast.per_segment=None) and tells each "
            "from others of its segment: 0 at most, fewer than temporal.contrast.min_negatives=1. "
            "Set temporal.contrast.per_segment=2 or more.",
        ),
        ("local-contrast", ("temporal.contrast.per_segment=1",), "Set temporal.contrast.per_segment=2 or more."),
        ("local-topic", ("temporal.contrast.per_segment=1",), "'local-topic' draws 1 pair(s) a segment"),
        (
            "local-contrast",
            ("temporal.contrast.per_segment=3", "temporal.contrast.min_negatives=3"),
            "2 at most, fewer than temporal.contrast.min_negatives=3. Set temporal.contrast.per_segment=4 or more.",
        ),
        (
            "direction",  # the token before is a negative too
            ("temporal.contrast.per_segment=2", "temporal.contrast.min_negatives=3"),
            "2 at most, fewer than temporal.contrast.min_negatives=3. Set temporal.contrast.per_segment=3 or more.",
        ),
        (
            "local-contrast",
            ("temporal.contrast.min_negatives=8",),
            "data.segment_length=128: temporal.kind='local' at temporal.contrast.gap=16 and "
            "temporal.contrast.min_negatives=8 takes segments of 130 positions",
        ),
        ("direction", ("temporal.contrast.min_negatives=9",), "takes segments of 131 positions"),
        ("temporal-topk", ("data.n_segments=1",), "a batch of one segment has none. Set data.n_segments=2 or more."),
        ("topic", ("data.n_segments=1",), "data.n_segments=1: temporal.kind='topic' tells pairs from those of other"),
    ],
)
def test_pairs_without_enough_negatives_are_refused(name, settings_, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        with_settings(preset(name, 8), settings_)
    with_settings(preset(name, 8), [*settings_, "temporal.weight=0"])


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("temporal-topk", ("temporal.contrast.negatives=sequence", "temporal.contrast.per_segment=2")),
        ("temporal-topk", ("temporal.contrast.negatives=batch",)),
        ("local-contrast", ("temporal.contrast.per_segment=2",)),
        ("local-contrast", ("temporal.contrast.min_negatives=7",)),
        ("direction", ("temporal.contrast.per_segment=1",)),
        ("direction", ("temporal.contrast.per_segment=2", "temporal.contrast.min_negatives=2")),
        ("direction", ("temporal.contrast.min_negatives=8",)),
    ],
)
def test_what_is_taken_has_pairs_with_enough_negatives(name, settings_):
    config = with_settings(preset(name, 8), [*settings_, "data.segment_length=128"])
    contrast, own = config.temporal.contrast, int(name == "direction")
    batch = batch_of([128] * 4)
    drawn = [choose_pairs(config.temporal, batch, seed, before=own) for seed in range(200)]
    assert max(int(pairs.negatives.sum(1).max(initial=0)) for pairs in drawn) + own >= contrast.min_negatives


@pytest.mark.parametrize(
    ("name", "setting", "line"),
    [
        (
            "topk",
            "centred=true",
            "temporal.contrast.centred=True is for temporal.kind=contrastive or local or topic or local-topic, and it "
            "is 'difference'. Set temporal.contrast.centred=false.",
        ),
        ("local-contrast", "partner=past", "is for temporal.kind=t-sae, and it is 'local'"),
        ("local-contrast", "rank=3", "is for temporal.kind=direction, and it is 'local'. Set temporal.contrast.rank"),
        ("direction", "centred=true", "temporal.contrast.centred=True is for"),
        ("direction", "negatives=batch", "is for temporal.kind=contrastive or local, and it is 'direction'"),
        (
            "temporal-topk",
            "distance=5",
            "temporal.contrast.distance=5 is for temporal.kind=topic or local-topic (and temporal.order=document), and "
            "it is 'contrastive'. Set temporal.contrast.distance=64.",
        ),
        ("t-sae", "around=2", "is for temporal.kind=topic or local-topic, and it is 't-sae'"),
        ("t-sae", "gap=2", "is for temporal.kind=contrastive or local or direction or local-topic, and it is 't-sae'"),
        ("topic", "gap=2", "temporal.contrast.gap=2 is for"),
        ("t-sae", "min_negatives=2", "temporal.contrast.min_negatives=2 is for"),
        ("topk", "per_segment=2", "it is 'difference'. Set temporal.contrast.per_segment=none."),
    ],
)
def test_a_setting_that_the_kind_does_not_read_is_refused(name, setting, line):
    asked = ["temporal.weight=1", f"temporal.contrast.{setting}"]
    with pytest.raises(ConfigError, match=re.escape(line)):
        with_settings(preset(name, 8), asked)
    # A term that is not there leaves them all unread: one command trains presets with it and without.
    with_settings(preset(name, 8), [*asked, "temporal.weight=0"])


def test_far_pairs_of_any_kind_read_the_distance():
    asked = ["temporal.weight=1", "temporal.order=document", "temporal.contrast.distance=5"]
    assert with_settings(preset("topk", 8), asked).temporal.contrast.distance == 5


@pytest.mark.parametrize("kind", CONTRASTIVE)
def test_the_settings_of_a_kind_are_those_that_its_term_looks_at(kind):
    n, batch = 24, batch_of([12, 12])
    batch = batch._replace(x=torch.rand(n, 3), text=Text(np.arange(n), np.arange(n)))
    state = TermState(batch.positions(), torch.rand(30, D), BilinearHead(D, 3, 0).double(), code_of(n, 1))
    config = TemporalConfig(kind=kind, contrast=Watched(gap=2, distance=2, per_segment=2))
    LOOKED_AT.clear()
    if kind == "t-sae":
        paired(config, batch, 0)
    temporal_term(kind, state)(config, code_of(n, 0), batch, 0)
    read = LOOKED_AT | ({"rank"} if kind == "direction" else set())  # of the head, which the trainer makes
    # Whose default a kind has of its own, and every preset its temperature.
    assert {*CONTRASTIVE[kind]} - {"negatives"} == read - {"negatives", "temperature"}


def test_means_are_kept_only_for_a_term_that_reads_them():
    config = with_settings(preset("temporal-topk-centred", 8), ["sae.d_sae=16", "sae.k=2", "temporal.weight=0"])
    assert Trainer(config, torch.rand(4, 8)).positions is None


def test_records_of_older_runs_say_the_same():
    """Whose temperature stood beside the kind."""
    config = preset("temporal-topk", 8)
    old = to_dict(config)
    del old["temporal"]["contrast"], old["sparsity"]["threshold"], old["dead"]["aux_relative"]
    old["temporal"]["temperature"] = 0.3
    assert _with_defaults(old) == to_dict(config)
    old["temporal"]["temperature"] = 0.2
    assert _with_defaults(old)["temporal"]["contrast"]["temperature"] == 0.2


@pytest.mark.parametrize("name", TEMPORAL_PRESETS)
def test_every_contrast_has_a_twin_on_shuffled_positions(name):
    ours, twin = preset(name, 8), preset(f"{name}-shuffled", 8)
    assert (ours.temporal.order, twin.temporal.order) == ("text", "segment")
    assert twin.sae == ours.sae and twin.optimizer == ours.optimizer
    assert twin.data.segment_length > 2, "two tokens would only change places"
    assert PRESETS[f"{name}-shuffled"].about.startswith("control: ")
