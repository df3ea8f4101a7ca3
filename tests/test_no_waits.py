"""Promise: no stage waits for a GPU but where READS says so, and none mixes a GPU's tensors with the host's.

Shown without one: under FakeTensorMode on the meta device no number exists, so whatever needs one on the host, or a
shape that follows from values, fails at once, as does an operation on tensors of two devices.
"""

import inspect
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from toy_pairs import pair_settings

import tcsae.harvest.capture as capture_module
from tcsae.evaluate import one_pass
from tcsae.evaluate.batches import EvalBatch, Settings
from tcsae.evaluate.parallel import Part
from tcsae.evaluate.systems import SaeOutput
from tcsae.harvest.capture import IN_FLIGHT, Capture, Forward
from tcsae.harvest.language_model import LanguageModel
from tcsae.shared.base.device import READS, Readout
from tcsae.shared.base.settings import with_settings
from tcsae.shared.lm.tail import Tail
from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.format import HookRecipe
from tcsae.train.batch import Batch, Text
from tcsae.train.presets import PRESETS, preset
from tcsae.train.trainer import Trainer

META = torch.device("meta")
WIDTH, LENGTH, SEGMENTS = 8, 6, 8
SMALL = (
    "sae.d_sae=512", "sae.k=3", "data.segment_length=6", "steps=100", "dead.aux_k=8", "init.input_scale=none",
)  # fmt: skip
"""init.input_scale=unit reads one number before the first step."""
VARIANTS = {
    "topk": ("sae.groups=0.25,0.75", "group_weights=1,1", "temporal.weight=0.1", "temporal.position_penalty=1"),
    "batchtopk": ("temporal.kind=gated", "temporal.weight=0.1", "temporal.pairs=all"),
    "relu-l1": ("sae.layer_norm=in_out", "temporal.kind=relative", "temporal.budget=0.1"),
    "temporal-topk": ("temporal.order=segment",),
    "jumprelu": ("temporal.kind=contrastive", "temporal.weight=0.1", "temporal.position_penalty=0.1"),
    "written-run4": ("temporal.budget=0.1", "sae.groups=0.5,0.5", "group_weights=1,1"),
    "temporal-matryoshka": ("temporal.budget=0.1", "temporal.kind=difference", "temporal.order=batch"),
}
CASES = [(name, ()) for name in PRESETS if not name.startswith("logged-") and not name.endswith("-shuffled")] + [
    *VARIANTS.items()
]


class WaitError(AssertionError):
    """A copy between host and device that one of them waits for, or an operation on tensors of both."""


class _Watch(TorchDispatchMode):
    """Refuses what fake tensors let pass: copies to the device but through `to_device`, any to the host but through a
    Readout, and an index of the host's, which is such a copy.
    """

    def __torch_dispatch__(self, op, _types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        copies = op._schema.name in ("aten::_to_copy", "aten::copy_")
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in tensors if copies or tensor.dim()}
        if len(places) > 1 and not (copies and (kwargs or {}).get("non_blocking")):
            raise WaitError(f"{op} between {places}")
        return out


@contextmanager
def no_waits(monkeypatch, answer: float = 1.0):
    """Everything inside is fake; yields how often each of READS was waited for, the answer being all `answer`."""
    counts: Counter[str] = Counter()

    def values(self: Readout) -> np.ndarray:  # a tensor would be fake
        counts[self.what] += 1
        return np.full(tuple(self._tensor.shape), answer)

    monkeypatch.setattr(Readout, "values", values)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield counts


def trainer_on_meta(monkeypatch, name: str, settings: tuple[str, ...] = ()) -> tuple[Trainer, Batch]:
    monkeypatch.setattr(SparseAutoencoder, "to", lambda self, *_: self)  # it is there; Module.to fails on fake ones
    config = with_settings(preset(name, WIDTH), [*SMALL, *pair_settings(name, settings, gap=2, distance=3), *settings])
    n = SEGMENTS * LENGTH
    with torch.device(META):
        initial = new_sae(config.sae)
    trainer = Trainer(config, torch.zeros(n, WIDTH, device=META), n_positions=LENGTH, initial=initial)
    trainer.progress.n_steps, trainer.progress.n_tokens = 10, 10 * n
    documents = np.arange(SEGMENTS) // 2
    text = Text(np.arange(n), np.arange(n) % (2 * LENGTH))
    x, lengths = torch.zeros(n, WIDTH, device=META), np.full(SEGMENTS, LENGTH)
    return trainer, Batch(x, lengths, np.zeros(SEGMENTS, np.int64), documents, text=text)


def good_verdict(monkeypatch, most_dead: int = 300) -> None:
    """A verdict has a number that stands for yes or no."""
    real = Readout.values

    def values(self: Readout) -> np.ndarray:
        result = real(self)
        return np.array([1.0, 1.0, 1.0, 1.0, 0.0, most_dead]) if self.what == "guard" else result

    monkeypatch.setattr(Readout, "values", values)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_step_of_each_preset_waits_for_nothing(monkeypatch, name, settings):
    with no_waits(monkeypatch) as counts:
        good_verdict(monkeypatch)
        trainer, batch = trainer_on_meta(monkeypatch, name, settings)
        with _Watch():
            for _ in range(3):  # before a verdict was read, and after
                trainer.step(batch)
    assert counts == {"guard": 2}, "the third verdict is read a step later"


@pytest.mark.parametrize("most_dead", [0, 1, 300])
def test_auxk_waits_for_no_count_of_the_dead(monkeypatch, most_dead):
    with no_waits(monkeypatch) as counts:
        good_verdict(monkeypatch, most_dead)
        trainer, batch = trainer_on_meta(monkeypatch, "topk")
        with _Watch():
            for _ in range(3):
                trainer.step(batch)
    assert counts == {"guard": 2}


WAITS = {
    "a number is read": (lambda x: x.sum().item(), DataDependentOutputException),
    "a number decides": (lambda x: bool((x > 0).any()), DataDependentOutputException),
    "a shape follows from values": (lambda x: (x > 0).nonzero(), DynamicOutputShapeException),
    "a mask selects": (lambda x: x[x[:, 0] > 0], DynamicOutputShapeException),
    "counts": (lambda x: torch.bincount(x[:, 0].long()), DynamicOutputShapeException),
    "a copy to the device that is waited for": (lambda x: torch.ones(3).to(x.device), WaitError),
    "a tensor of the host among them": (lambda x: x * torch.ones(len(x), 1), RuntimeError),
    "a tensor of the host added in place": (lambda x: x.add_(torch.ones(len(x), 1)), WaitError),
    "an index of the host's": (lambda x: x[torch.arange(3)], WaitError),
}


@pytest.mark.parametrize(
    ("place", "wait"),
    [*(("gradients", wait) for wait in WAITS), ("_norm_decoder", "a number is read"), ("count", "a mask selects")],
)
def test_a_wait_anywhere_in_a_step_is_noticed(monkeypatch, place, wait):
    what, error = WAITS[wait]
    real = getattr(Trainer, place)

    def waits(self, *given):
        what(self.sae.W_dec.detach())
        return real(self, *given)

    monkeypatch.setattr(Trainer, place, waits)
    with no_waits(monkeypatch):
        good_verdict(monkeypatch)
        trainer, batch = trainer_on_meta(monkeypatch, "topk")
        with pytest.raises(error), _Watch():
            trainer.step(batch)


def test_each_read_is_named():
    assert all(READS.values())
    with pytest.raises(AssertionError, match="whim"):
        Readout(torch.zeros(1), "whim")


class _Answer(np.ndarray):
    """What a Readout brings, as far as the capture asks."""

    def float(self):
        return self

    def numpy(self):
        return np.asarray(self)


class _ToyModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(11, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return self.layer(self.embed(ids))


def capture_on_meta(what=lambda x: x) -> Capture:
    """A capture of one hook whose model is there already."""
    with torch.device(META):
        model = _ToyModel()
    capture = object.__new__(Capture)
    forward = Forward(model, "toy", 1, lambda ids, _logits: forward.record("h", what(model(ids))), "sdpa")
    capture.model, capture._forward = LanguageModel("toy", "toy", "1"), forward
    capture.batch_size, capture.device, capture.causal = 2, "meta", True
    capture.hooks = (HookRecipe(requested="h", canonical="h", d_model=WIDTH),)
    return capture


def test_from_tokens_to_bytes_each_batch_is_read_once_and_late(monkeypatch):
    order = []
    real = capture_module._OnTheWay.__init__

    def sent(self, *given):
        order.append("sent")
        real(self, *given)

    monkeypatch.setattr(capture_module._OnTheWay, "__init__", sent)
    tokens, lengths = np.ones((10, LENGTH), np.int32), np.arange(10) % LENGTH + 1
    with no_waits(monkeypatch) as counts:
        faked = Readout.values

        def values(self: Readout) -> np.ndarray:
            order.append("read")
            return faked(self).view(_Answer)

        monkeypatch.setattr(Readout, "values", values)
        with _Watch():
            activations = capture_on_meta().run(tokens, lengths)
    assert counts == {"capture": 5}
    assert order[:4] == ["sent"] * IN_FLIGHT + ["read"], "the model has its next batches before the first is read"
    assert activations["h"].dtype == np.float32 and (activations["h"][lengths == LENGTH] == 1).all()


@pytest.mark.parametrize("wait", ["a number decides", "a mask selects"])
def test_a_wait_in_a_capture_is_noticed(monkeypatch, wait):
    what, error = WAITS[wait]
    with no_waits(monkeypatch), pytest.raises(error), _Watch():
        capture_on_meta(lambda x: (what(x.flatten(0, 1)), x)[1]).run(np.ones((2, LENGTH), np.int32), np.full(2, LENGTH))


class _ToyTail(Tail):
    """A matrix in place of a language model's last layers."""

    vocabulary, slice_tokens = 7, 5

    def __init__(self) -> None:
        self.out = torch.zeros(WIDTH, self.vocabulary, device=META)

    device = META

    def hidden(self, x):
        return torch.tanh(x)

    def unembed(self, hidden, out=None):
        return torch.mm(hidden, self.out, out=out)


class _PassedError(Exception):
    """All batches were gone through."""


def evaluate_on_meta(monkeypatch, activation: str, splice_all: bool = False) -> Counter:
    """What an evaluation's pass over four batches waited for."""
    n = SEGMENTS
    config = SaeConfig(d_model=WIDTH, d_sae=32, k=3, activation=activation)
    with torch.device(META):
        sae = SparseAutoencoder(config)
    valid = np.arange(LENGTH) < np.arange(1, n + 1)[:, None].clip(max=LENGTH)
    counted = valid & (np.arange(LENGTH) >= 1)
    made = [
        EvalBatch(
            i * n,
            torch.zeros(n, LENGTH, WIDTH),
            torch.zeros(n, LENGTH, dtype=torch.int32),
            torch.from_numpy(valid.sum(1)),
            torch.from_numpy(np.arange(n) // 2 + i * n // 2),
            torch.from_numpy(np.arange(n) // 2 + i * n // 2),
            torch.from_numpy(counted),
            torch.from_numpy(valid & ~counted),
        )
        for i in range(4)
    ]
    waited: Counter[str] = Counter()
    read = torch.Tensor.numpy

    def numpy(self):  # of a real tensor; under fake tensors it would read memory that is none
        assert not isinstance(self, FakeTensor)
        with _disable_current_modes():
            return read(self)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)

    def batches(*_, **__):
        with no_waits(monkeypatch) as counts, _Watch():
            yield from made
            waited.update(counts)
            raise _PassedError

    monkeypatch.setattr(one_pass, "batches", batches)
    monkeypatch.setattr(one_pass, "document_numbers", lambda _: (np.arange(4 * n) // 2,))
    monkeypatch.setattr(one_pass, "n_sequences", lambda *_: 4 * n)
    monkeypatch.setattr(one_pass, "_counts", lambda *_: (*torch.ones(2, 2 * n, dtype=torch.float64), 2 * n))
    mean = torch.zeros(WIDTH, dtype=torch.float64)
    settings = Settings(hook="h", rules=CountingRules(skip_first=1), splice_all=splice_all, mean=mean, device=META)
    unchecked = inspect.unwrap(one_pass.measure)
    with pytest.raises(_PassedError), torch.no_grad():
        unchecked(None, settings, [SaeOutput(sae)], _ToyTail(), None, [], lambda _: None, Part([], []))
    return waited


@pytest.mark.slow
@pytest.mark.parametrize("splice_all", [False, True])
@pytest.mark.parametrize("activation", ["topk", "gelu"])
def test_an_evaluation_pass_waits_for_nothing(monkeypatch, activation, splice_all):
    assert evaluate_on_meta(monkeypatch, activation, splice_all) == {}


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
def test_codes_without_a_fixed_number_of_entries_wait_for_their_number(monkeypatch, activation):
    with pytest.raises(DynamicOutputShapeException):
        evaluate_on_meta(monkeypatch, activation)


def test_a_wait_in_an_evaluation_is_noticed(monkeypatch):
    real = SparseAutoencoder.decode_sparse
    monkeypatch.setattr(
        SparseAutoencoder, "decode_sparse", lambda self, code, x: (code.values.sum().item(), real(self, code, x))[1]
    )
    with pytest.raises(DataDependentOutputException):
        evaluate_on_meta(monkeypatch, "topk")
