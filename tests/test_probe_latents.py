"""Promise: `eval --probe-latents N` reads the N latents of largest variance in its probes, and changes nothing else."""

import numpy as np
import pytest
import torch
import toy_eval as toy

from tcsae.evaluate.command import evaluate
from tcsae.evaluate.measures import probes
from tcsae.evaluate.measures.code_ops import columns
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.store.reader import open_store

N = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The toy's sequences are too short for the usual gap."""
    path = toy.make_place(tmp_path_factory.mktemp("probe_latents"), n_eval=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "GAP", 2)
        patch.setattr(probes, "MIN_TOKENS", 6)
        yield path


def evaluation(place, *arguments: str) -> tuple[dict, dict, str]:
    """eval.json; its probes' figures taken out; what was printed."""
    made, said = toy.run_eval(place / "a.zarr", place / "runs", "--details", "--force", *arguments)
    x = made["temporal"]["x"]
    groups = made["temporal"]["groups"] | {"x": x} | {f"x {name}": one for name, one in x["smoothed"].items()}
    probed = {
        (group, name): figures["measures"].pop(name)
        for group, figures in groups.items()
        for name in probes.DEFINITIONS
        if name in figures["measures"]
    }
    return made, probed, said


@torch.no_grad()
def naive(place, n: int) -> dict:
    """Probes of the n columns of largest variance over the tokens that probes read."""
    split, sae = open_store(str(place / "a.zarr")).eval, toy.make_sae()
    plan = probes.plan_probes(split, toy.FROM_1)
    x = np.asarray(split.read(toy.HOOK, 0, split.n_sequences), np.float32)
    x = np.concatenate([x[i, 1 : 1 + length] for i, length in zip(plan.sequences, plan.lengths, strict=True)])
    code = sae.encode(torch.from_numpy(x))
    widest = code.var(0).argsort(descending=True)[:n].sort().values
    return probes.probe(plan, code[:, widest])[0]


def test_as_many_are_read_as_are_asked_for(place):
    whole, of_all, said_of_all = evaluation(place)
    part, of_few, said = evaluation(place, "--probe-latents", str(N))
    assert of_few[("all", "probe_document")] == naive(place, N)["probe_document"]
    assert of_all[("all", "probe_document")] == naive(place, toy.LATENTS)["probe_document"]
    assert of_few[("all", "probe_token")] != of_all[("all", "probe_token")]
    assert of_few[("x", "probe_token")] != of_all[("x", "probe_token")]  # whose width is 16
    assert part["options"]["probe_latents"] == N and "probe_latents" not in whole["options"]
    for key in ("metrics", "intervals", "temporal", "measures"):
        assert part[key] == whole[key], key
    assert f"Probes of the {N} latents of largest variance" in said
    assert f"Probes of the {probes.PROBE_LATENTS} latents of largest variance" in said_of_all


def test_the_commands_default_is_the_probes_own():
    (option,) = (one for one in evaluate.params if one.name == "probe_latents")
    assert option.default == probes.PROBE_LATENTS


@pytest.mark.parametrize("n", [1, 4, 9, 10])
def test_latents_of_largest_variance_of_those_that_count(n):
    """Of a dense code, and of the same as the entries that are not zero."""
    generator = torch.Generator().manual_seed(n)
    dense = torch.randn(50, 10, generator=generator).relu() * torch.arange(10)
    which = torch.arange(10) % 3 > 0
    kept = [i for i in dense.var(0).argsort(descending=True).tolist() if which[i]][:n]
    expected = dense[:, sorted(kept)]
    at = dense.nonzero()
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), torch.bincount(at[:, 0], minlength=50).cumsum(0)))
    sparse = SparseCode(dense[at[:, 0], at[:, 1]], at[:, 1], starts, 10)
    for code in (dense, sparse):
        assert torch.equal(probes.largest_columns(code, which, n), expected)
    assert torch.equal(columns(dense, which.nonzero().squeeze(1)), probes.largest_columns(dense, which, 10))
