"""One pass over a split for many SAEs: each batch is read once and goes through all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch, Settings, batches, document_numbers, run_numbers
from tcsae.evaluate.intervals import Resamplings
from tcsae.evaluate.measures.baselines import ConstantOutput
from tcsae.evaluate.measures.core import (
    COLUMNS,
    Code,
    Inputs,
    Output,
    Sums,
    firing_counts,
    n_latents,
    sum_rows,
    token_columns,
    widen,
)
from tcsae.evaluate.measures.cross_entropy import Losses, Reference, sequence_losses, splice
from tcsae.evaluate.parallel import Part, part_of
from tcsae.evaluate.systems import SequenceSystem, System, output_of
from tcsae.shared.base.distributed import ALONE
from tcsae.shared.lm.tail import Tail
from tcsae.shared.store.counted import CountingRules, counted
from tcsae.shared.store.reader import Split


@runtime_checkable
class Observer(Protocol):
    """Sees what goes by: the code of each batch's counted positions, in document order."""

    looks_back: bool
    """Whether batches that another process adds up are of use to it."""

    def begin(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """A new batch, and its activations at the counted positions."""

    def see(self, system: int, code: Code) -> None:
        """The code that a system made of them."""

    def look_back(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """A batch that another process adds up, as what comes next is compared with it."""

    def pass_over(self, system: int, code: Code) -> None:
        """The code that a system made of it."""


class Measured(NamedTuple):
    """Sums of a pass: of `counted` and `skipped` a row for each resampling, of losses a row for each document.

    So memory grows with documents by a few numbers for each system, not by d_model.
    """

    counted: list[Sums]
    """One for each system, over the counted positions."""
    skipped: list[Sums]
    firings: list[Int[Tensor, "2 d_sae"] | None]
    """`core.firing_counts` over the counted positions; None for a system without latents."""
    losses: list[Losses]
    """One for each system; empty without a tail."""
    reference: Reference | None
    resamplings: Resamplings


@torch.inference_mode()
def measure(
    split: Split,
    settings: Settings,
    systems: Sequence[System | SequenceSystem],
    tail: Tail | None,
    reference: Reference | None,
    observers: Sequence[Observer],
    advance: Callable[[int], None],
    part: Part | None = None,
) -> Measured:
    """Run every system over the split; `advance` gets the number of valid tokens of each batch.

    With a tail and a `reference` of an earlier pass, no ablation is run again. Observers see codes only. Of several
    processes each runs over its `part`, and rank 0 is returned the sums of all; an observer brings its own
    together.
    """
    part = part or part_of(split, settings.skip_first, ALONE)
    n_documents = int(document_numbers(split)[0][-1]) + 1
    n_predictions, n_positions = _counts(split, settings.skip_first, n_documents)
    resamplings = Resamplings(n_documents, int((n_positions > 0).sum()))
    sums = _Accumulator(len(systems), resamplings, len(settings.mean))
    losses = torch.zeros(len(systems), 2, n_documents, dtype=torch.float64)
    plain = torch.zeros(4, 2, n_documents, dtype=torch.float64)
    for observer in (one for one in observers if one.looks_back):
        _look_back(split, settings, systems, observer, part)
    for batch in batches(split, settings.hook, settings.skip_first, ranges=part.own):
        x_counted, x_skipped = batch.x[batch.counted], batch.x[batch.skipped]
        counted = _Positions(batch, batch.counted, widen(x_counted, settings.mean))
        skipped = _Positions(batch, batch.skipped, widen(x_skipped, settings.mean))
        sums.begin(batch.document)
        sums.add_inputs(counted, skipped)
        for observer in observers:
            observer.begin(batch, x_counted)
        spliced = {}
        for i, system in enumerate(systems):
            output = output_of(system, x_counted, counted.runs)
            rest = output_of(system, x_skipped, skipped.runs)
            sums.add(i, counted, output, skipped, rest)
            if output.code is not None:
                _show(observers, i, output.code)
            if tail is not None and not isinstance(system, ConstantOutput):  # theirs are in the reference
                spliced[i] = splice(batch.x, batch.counted, output.x_hat)
                if settings.splice_all:
                    spliced[i][batch.skipped] = rest.x_hat
        if tail is not None:
            if reference is None:
                spliced |= _ablations(batch, settings)
            for i, found in _losses(tail, batch, spliced).items():
                into = losses[i] if i >= 0 else plain[i]
                into[0].index_add_(0, batch.document, found.ce)
                into[1].index_add_(0, batch.document, found.kl)
        advance(int(batch.lengths.sum()))
    sums.add_up(part)
    part.add_up((losses, plain))
    if tail is not None and reference is None:
        reference = Reference(n_predictions, n_positions, *(Losses(*one) for one in plain))
    of_systems = [Losses(*one) for one in losses] if tail is not None else []
    return Measured(*sums.result(), of_systems, reference, resamplings)


def _show(observers: Sequence[Observer], system: int, code: Code) -> None:
    for observer in observers:
        observer.see(system, code)


OPEN_DOCUMENTS = 1024
"""Documents with rows of their own, at most (or as many as a batch has): 8 MB at d_model 512."""
CLEAN, ABLATION, ZERO, MEAN = -4, -3, -2, -1
"""Where the losses that no SAE changes stand, counted from the end."""


class _Positions(NamedTuple):
    """Some positions of a batch."""

    batch: EvalBatch
    positions: Tensor
    inputs: Inputs

    @property
    def sequence(self) -> Int[Tensor, " n"]:
        """Row of the batch that each position lies in."""
        return self.positions.nonzero()[:, 0]

    @property
    def runs(self) -> Int[Tensor, " n"]:
        """Run of consecutive positions that each lies in: what is smoothed or compared along."""
        return run_numbers(self.positions)


class _Accumulator:
    """Sums on every resampling of the documents, for all systems.

    Documents come in order, so only those of the last few batches have rows of their own: once there are more than
    OPEN_DOCUMENTS, the finished ones are added to each resampling as often as it draws them.
    """

    def __init__(self, n_systems: int, resamplings: Resamplings, d_model: int) -> None:
        self.resamplings = resamplings
        self.first = 0
        """The document of the first open row."""
        self.n = torch.zeros(2, resamplings.n_documents, dtype=torch.float64)
        self.x, self.columns = self._zeros(n_systems, resamplings.n_rows, d_model)
        self.open_x, self.open_columns = self._zeros(n_systems, 0, d_model)
        self.firings: list[Tensor | None] = [None] * n_systems

    @staticmethod
    def _zeros(n_systems: int, n_rows: int, d_model: int) -> tuple[Tensor, Tensor]:
        """Of x, and of what is summed for each system; the first axis: counted, skipped."""
        shapes = (2, n_rows, d_model), (2, n_systems, n_rows, len(COLUMNS))
        return torch.zeros(shapes[0], dtype=torch.float64), torch.zeros(shapes[1], dtype=torch.float64)

    def begin(self, document: Int[Tensor, " batch"]) -> None:
        """Open rows for the documents of the next batch."""
        low, high = int(document[0]), int(document[-1])
        n_open = self.open_x.shape[1]
        if not n_open:
            self.first = low
        elif high - self.first >= OPEN_DOCUMENTS:
            self._close(low)
            n_open = self.open_x.shape[1]
        if (missing := high + 1 - self.first - n_open) > 0:
            wide = max(missing, min(n_open, OPEN_DOCUMENTS))  # doubled, so that rows are seldom copied
            more_x, more_columns = self._zeros(len(self.firings), wide, self.x.shape[2])
            self.open_x = torch.cat((self.open_x, more_x), 1)
            self.open_columns = torch.cat((self.open_columns, more_columns), 2)

    def _close(self, stop: int) -> None:
        """Add the documents before `stop` to the resamplings."""
        for start, end in self.resamplings.blocks(self.first, stop):
            weights, rows = self.resamplings.weights(start, end), slice(start - self.first, end - self.first)
            for kind in (0, 1):
                self.x[kind].addmm_(weights, self.open_x[kind, rows])
                for i in range(len(self.firings)):
                    self.columns[kind, i].addmm_(weights, self.open_columns[kind, i, rows])
        done = stop - self.first
        self.open_x, self.open_columns = self.open_x[:, done:].clone(), self.open_columns[:, :, done:].clone()
        self.first = stop

    def add_inputs(self, *parts: _Positions) -> None:
        for kind, part in enumerate(parts):
            documents = part.batch.document[part.sequence]
            self.n[kind] += torch.bincount(documents, minlength=self.n.shape[1])
            self.open_x[kind].index_add_(0, documents - self.first, part.inputs.x)

    def add(self, i: int, counted: _Positions, output: Output, skipped: _Positions, rest: Output) -> None:
        for kind, (part, of_part) in enumerate(((counted, output), (skipped, rest))):
            batch_columns = token_columns(part.inputs, of_part)
            first, last = int(part.batch.document[0]), int(part.batch.document[-1])
            documents = part.batch.document[part.sequence] - first
            rows = slice(first - self.first, last + 1 - self.first)
            self.open_columns[kind, i, rows] += sum_rows(batch_columns, documents, last + 1 - first)
        if output.code is not None:
            counts = firing_counts(output.code, counted.sequence, len(counted.batch.tokens))
            before = self.firings[i]
            self.firings[i] = counts if before is None else before + counts
            assert counts.shape[1] == n_latents(output.code)

    def add_up(self, part: Part) -> None:
        """The sums of all parts, in rank 0."""
        self._close(min(self.first + self.open_x.shape[1], self.resamplings.n_documents))
        part.add_up((self.n, self.x, self.columns))
        for i, one in enumerate(zip(*part.gather(self.firings), strict=True)):
            seen = [firings for firings in one if firings is not None]
            self.firings[i] = torch.stack(seen).sum(0) if seen else None

    def result(self) -> tuple[list[Sums], list[Sums], list[Tensor | None]]:
        n = self.resamplings.sums(self.n.T)
        counted, skipped = (
            [Sums(n[:, kind], self.x[kind], columns) for columns in self.columns[kind]] for kind in (0, 1)
        )
        return counted, skipped, self.firings


def _look_back(
    split: Split, settings: Settings, systems: Sequence[System | SequenceSystem], observer: Observer, part: Part
) -> None:
    for batch in batches(split, settings.hook, settings.skip_first, ranges=part.before):
        x = batch.x[batch.counted]
        observer.look_back(batch, x)
        for i, system in enumerate(systems):
            if (code := output_of(system, x, batch.runs).code) is not None:
                observer.pass_over(i, code)


def _ablations(batch: EvalBatch, settings: Settings) -> dict[int, Tensor]:
    replaced = (batch.counted | batch.skipped) if settings.splice_all else batch.counted
    zero, mean = torch.zeros(1, len(settings.mean)), settings.mean.float()[None]
    n = int(replaced.sum())
    return {
        ABLATION: torch.zeros_like(batch.x),
        ZERO: splice(batch.x, replaced, zero.expand(n, -1)),
        MEAN: splice(batch.x, replaced, mean.expand(n, -1)),
    }


def _losses(tail: Tail, batch: EvalBatch, spliced: Mapping[int, Tensor]) -> dict[int, Losses]:
    found = sequence_losses(tail, batch.x, list(spliced.values()), batch.tokens, batch.counted, batch.has_next)
    return dict(zip((CLEAN, *spliced), found, strict=True))


def _counts(
    split: Split, rules: CountingRules | int, n_documents: int
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Predictions and counted positions of each document: a sequence's last token predicts nothing."""
    document = torch.from_numpy(document_numbers(split)[0])
    mask = counted(split, rules)
    last = mask[np.arange(len(mask)), split.lengths - 1]
    counts = torch.zeros(2, n_documents, dtype=torch.float64)
    n = torch.from_numpy(mask.sum(1)).double()
    counts[0].index_add_(0, document, n - torch.from_numpy(last).double())
    counts[1].index_add_(0, document, n)
    return counts[0], counts[1]
