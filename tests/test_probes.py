"""Promise: a probe finds what is in a code, on tokens it was not fitted on, and nothing where there is nothing."""

import numpy as np
import pytest
import torch

from tcsae.evaluate.batches import batches
from tcsae.evaluate.measures import probes
from tcsae.evaluate.measures.probes import Plan, plan_probes, probe, smoothed
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split, Store

LENGTH, N_DOCUMENTS = 100, 24


class FakeStore(Store):
    """As much of a store as the measures ask of it."""

    sequence_length, sequences_per_chunk = LENGTH, 7

    def __init__(self) -> None:
        """Nothing on disk."""


class FakeSplit(Split):
    """One or two sequences a document; every fifth document is too short to be probed."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        n_sequences = rng.integers(1, 3, N_DOCUMENTS)
        self.documents = np.repeat(np.arange(N_DOCUMENTS), n_sequences)
        self.n_sequences = len(self.documents)
        self.lengths = rng.integers(60, LENGTH + 1, self.n_sequences).astype(np.int32)
        self.lengths[np.isin(self.documents, np.arange(0, N_DOCUMENTS, 5))] = 20
        self.tokens = rng.zipf(1.5, (self.n_sequences, LENGTH)).clip(max=400).astype(np.int32)
        self.store = FakeStore()
        self.x = rng.normal(size=(self.n_sequences, LENGTH, 3)).astype(np.float16)

    def read(self, hook: str, start: int, stop: int) -> np.ndarray:  # noqa: ARG002
        return self.x[start:stop]


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = plan_probes(FakeSplit(), CountingRules(skip_first=1))
    assert made is not None
    return made


def noise(plan: Plan, width: int = 30) -> torch.Tensor:
    return torch.randn(len(plan.document), width, generator=torch.Generator().manual_seed(0))


def carrying(plan: Plan, target: str) -> torch.Tensor:
    """Noise, and a direction for each class of the target."""
    classes = plan.targets[probes.TARGETS.index(target)]
    directions = torch.randn(int(classes.max()) + 2, 30, generator=torch.Generator().manual_seed(1))
    return noise(plan) + 3 * directions[classes]


@pytest.mark.parametrize("target", probes.TARGETS)
def test_a_probe_finds_what_is_there_and_only_that(plan, target):
    result, draws = probe(plan, carrying(plan, target))
    for name in probes.TARGETS:
        row = result[f"probe_{name}"]
        assert row["difference"] == pytest.approx(row["value"] - row["null"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert float(draws[f"probe_{name}"][0]) == row["value"]
        if name == target:
            assert row["value"] > 0.8
            assert row["interval"][0] > 0
        else:
            assert row["difference"] < 0.15, name


def test_noise_tells_nothing(plan):
    for row in probe(plan, noise(plan))[0].values():
        assert row["difference"] < 0.05


def test_a_dead_code_tells_nothing_and_does_not_fail(plan):
    for row in probe(plan, torch.zeros(len(plan.document), 8))[0].values():
        assert np.isfinite(row["value"])
        assert row["difference"] <= 0.05


def test_the_plan_is_of_first_sequences_and_collects_their_tokens(plan):
    split = FakeSplit()
    seen = []
    for batch in batches(split, "hook", CountingRules(skip_first=1)):
        rows = plan.rows(batch)
        seen.append(batch.x[batch.counted][rows])
    expected = [split.x[i, 1 : split.lengths[i]] for i in plan.sequences]
    np.testing.assert_array_equal(torch.cat(seen).numpy(), np.concatenate(expected).astype(np.float32))
    assert set(split.documents[plan.sequences]) == set(range(N_DOCUMENTS)) - set(range(0, N_DOCUMENTS, 5))
    assert len(set(split.documents[plan.sequences])) == len(plan.sequences)
    assert plan_probes(split, CountingRules(skip_first=90)) is None


def test_smoothing_is_causal_and_stays_within_a_document(plan):
    code = noise(plan, 4)
    made = smoothed(plan, code)
    for document in (0, 3):
        rows = (plan.document == document).nonzero().squeeze(1)
        ours, memory = code[rows], torch.zeros(4)
        for t in range(len(ours)):
            memory = probes.EMA_DECAY * memory + (1 - probes.EMA_DECAY) * ours[t]
            mean = ours[max(0, t + 1 - probes.MEAN_OVER) : t + 1].mean(0)
            torch.testing.assert_close(made["mean_pooled"][rows[t]], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(made["ema"][rows[t]], memory, rtol=1e-4, atol=1e-5)


def test_a_slow_code_tells_more_of_its_document_when_it_is_averaged(plan):
    directions = torch.randn(len(plan.lengths), 30, generator=torch.Generator().manual_seed(2))
    weak = noise(plan) + 0.5 * directions[plan.document]
    plain, mean = (probe(plan, code)[0] for code in (weak, smoothed(plan, weak)["mean_pooled"]))
    assert mean["probe_document"]["value"] > plain["probe_document"]["value"] + 0.1
