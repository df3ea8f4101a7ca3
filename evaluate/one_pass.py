"""One pass over a split for many SAEs: each batch is read once and goes through all of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.baselines import ConstantOutput
from tcsae.evaluate.batches import EvalBatch, Settings, batches, document_numbers, n_sequences, run_numbers
from tcsae.evaluate.intervals import Resamplings
from tcsae.evaluate.measures.core import (
    COLUMNS,
    Inputs,
    Output,
    Sums,
    firing_counts,
    n_latents,
    sum_rows,
    token_columns,
    widen,
)
from tcsae.evaluate.measures.cross_entropy import Losses, Reference, sequence_losses, splice, unigram_losses
from tcsae.evaluate.parallel import Part, part_of
from tcsae.evaluate.systems import SequenceSystem, System, output_of
from tcsae.shared.base.device import Readout, sums_on, to_device
from tcsae.shared.base.distributed import ALONE, wait_for_all
from tcsae.shared.lm.tail import Tail
from tcsae.shared.sae.ops import Code
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
    losses: Sequence[Losses]
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

    Systems and tail are on the settings' device; sums and observers where `sums_on` says; what is returned on the CPU.

    With a tail and a `reference` of an earlier pass, no ablation is run again. Observers see codes only. Of several
    processes each runs over its `part`, and rank 0 gets the sums of all; an observer adds up its own.
    """
    part = part or part_of(split, settings.rules, ALONE)
    n_documents = int(document_numbers(split)[0][-1]) + 1
    tail_end = n_sequences(split, settings.ce_tokens)
    n_predictions, n_positions, n_counted = _counts(split, settings.rules, n_documents, tail_end)
    resamplings = Resamplings(n_documents, n_counted)
    there = sums_on(settings.device)
    mean = settings.mean.to(there)
    sums = _Accumulator(len(systems), resamplings, len(mean), there)
    losses, plain = (torch.zeros(n, 2, n_documents, dtype=torch.float64, device=there) for n in (len(systems), 4))
    for observer in (one for one in observers if one.looks_back):
        _look_back(split, settings, systems, observer, part)
    for batch in batches(split, settings.hook, settings.rules, ranges=part.own):
        x, documents = to_device(batch.x, settings.device), to_device(batch.document, there)
        counted, skipped = (_positions(batch, mask, x, mean) for mask in (batch.counted, batch.skipped))
        sums.begin(batch.document)
        sums.add_inputs(counted, skipped)
        for observer in observers:
            observer.begin(batch, counted.x.to(there))
        spliced, in_tail = {}, batch.counted.numpy()[: max(0, tail_end - batch.start)].any()
        for i, system in enumerate(systems):
            output = output_of(system, counted.x, counted.runs)
            rest = output_of(system, skipped.x, skipped.runs)
            sums.add(i, counted, _on(there, output), skipped, _on(there, rest))
            _show(observers, i, output.code, there)
            if tail is not None and in_tail and not isinstance(system, ConstantOutput):  # theirs are in the reference
                spliced[i] = splice(x, batch.counted, output.x_hat)
                if settings.splice_all:
                    spliced[i] = splice(spliced[i], batch.skipped, rest.x_hat)
        if tail is not None and in_tail:
            ablations = _ablations(batch, x, settings) if reference is None else []
            of_batch = _losses(tail, batch, x, [*spliced.values(), *ablations], tail_end - batch.start)
            totals = [plain[0], *(losses[i] for i in spliced), *plain[1 : 1 + len(ablations)]]
            for total, one in zip(totals, of_batch, strict=True):
                total.index_add_(1, documents[: one.shape[1]], one)
        advance(int(batch.lengths.numpy().sum()))
    wait_for_all(part.ours)  # whose parts may take longer than a sum may
    sums.add_up(part)
    losses, plain = (Readout(one, "evaluation").values() for one in (losses, plain))
    part.add_up((losses, plain))
    if tail is not None and reference is None:
        unigrams = unigram_losses(split, settings.rules, n_documents, tail_end)
        reference = Reference(n_predictions, n_positions, unigrams, *(Losses(*one) for one in plain))
    return Measured(*sums.result(), _losses_of(systems, losses, reference), reference, resamplings)


def _losses_of(
    systems: Sequence[System | SequenceSystem],
    losses: Float64[Tensor, "n_systems 2 n_documents"],
    reference: Reference | None,
) -> list[Losses]:
    """Of each system, those of a constant one the reference's; none without a tail."""
    if reference is None:
        return []
    return [
        getattr(reference, system.losses) if isinstance(system, ConstantOutput) else Losses(*one)
        for system, one in zip(systems, losses, strict=True)
    ]


def _show(observers: Sequence[Observer], system: int, code: Code | None, device: torch.device) -> None:
    if code is not None:
        for observer in observers:
            observer.see(system, code.to(device))


OPEN_DOCUMENTS = 1024
"""Documents with rows of their own, at most (or as many as a batch has): 8 MB at d_model 512."""


class _Positions(NamedTuple):
    """Some positions of a batch."""

    batch: EvalBatch
    x: Float[Tensor, "n d_model"]
    """On the device of the systems."""
    sequence: Int[Tensor, " n"]
    """Row of the batch that each lies in; like what follows, where sums are kept."""
    documents: Int[Tensor, " n"]
    runs: Int[Tensor, " n"]
    """Run of consecutive positions that each lies in: what is smoothed or compared along."""
    inputs: Inputs
    n_by_document: Int[ndarray, " n_documents_of_batch"]
    """From the batch's first document on."""


def _positions(
    batch: EvalBatch, mask: Bool[Tensor, "batch position"], x: Tensor, mean: Float64[Tensor, " d_model"]
) -> _Positions:
    """Those in the mask, worked out on the host, so that no device is waited for."""
    at = np.flatnonzero(mask.numpy())
    sequence = at // mask.shape[1]
    documents = batch.document.numpy()[sequence]
    first, last = _ends(batch)
    chosen = x.flatten(0, 1).index_select(0, to_device(at, x.device))
    sequence, documents = np.ascontiguousarray(sequence), np.ascontiguousarray(documents)
    return _Positions(
        batch,
        chosen,
        to_device(sequence, mean.device),
        to_device(documents, mean.device),
        to_device(run_numbers(mask), x.device),
        widen(chosen.to(mean.device), mean),
        np.bincount(documents - first, minlength=last + 1 - first),
    )


def _ends(batch: EvalBatch) -> tuple[int, int]:
    """Its first and its last document."""
    documents = batch.document.numpy()
    return int(documents[0]), int(documents[-1])


def _on(device: torch.device, output: Output) -> Output:
    code, predicted = (one if one is None else one.to(device) for one in (output.code, output.predicted))
    assert predicted is None or isinstance(predicted, Tensor)
    return Output(output.x_hat.to(device), code, predicted)


class _Accumulator:
    """Sums on every resampling of the documents, for all systems.

    Documents come in order, so only those of the last few batches have rows of their own: once there are more than
    OPEN_DOCUMENTS, the finished ones are added to each resampling as often as it draws them.
    """

    def __init__(
        self, n_systems: int, resamplings: Resamplings, d_model: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.resamplings = resamplings
        self.first = 0
        """The document of the first open row."""
        self.n = np.zeros((2, resamplings.n_documents))
        self.x, self.columns = self._zeros(n_systems, resamplings.n_rows, d_model)
        self.open_x, self.open_columns = self._zeros(n_systems, 0, d_model)
        self.firings: list[Tensor | None] = [None] * n_systems

    def _zeros(self, n_systems: int, n_rows: int, d_model: int) -> tuple[Tensor, Tensor]:
        """Of x, and of what is summed for each system; the first axis: counted, skipped."""
        shapes = (2, n_rows, d_model), (2, n_systems, n_rows, len(COLUMNS))
        x, columns = (torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes)
        return x, columns

    def begin(self, document: Int[Tensor, " batch"]) -> None:
        """Open rows for the documents of the next batch, on the CPU."""
        low, high = (int(one) for one in document.numpy()[[0, -1]])
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
            weights = to_device(self.resamplings.weights(start, end), self.device)
            rows = slice(start - self.first, end - self.first)
            for kind in (0, 1):
                self.x[kind].addmm_(weights, self.open_x[kind, rows])
                for i in range(len(self.firings)):
                    self.columns[kind, i].addmm_(weights, self.open_columns[kind, i, rows])
        done = stop - self.first
        self.open_x, self.open_columns = self.open_x[:, done:].clone(), self.open_columns[:, :, done:].clone()
        self.first = stop

    def add_inputs(self, *parts: _Positions) -> None:
        for kind, part in enumerate(parts):
            first, last = _ends(part.batch)
            self.n[kind, first : last + 1] += part.n_by_document
            self.open_x[kind].index_add_(0, part.documents - self.first, part.inputs.x)

    def add(self, i: int, counted: _Positions, output: Output, skipped: _Positions, rest: Output) -> None:
        for kind, (part, of_part) in enumerate(((counted, output), (skipped, rest))):
            batch_columns = token_columns(part.inputs, of_part)
            first, last = _ends(part.batch)
            rows = slice(first - self.first, last + 1 - self.first)
            self.open_columns[kind, i, rows] += sum_rows(batch_columns, part.documents - first, last + 1 - first)
        if output.code is not None:
            counts = firing_counts(output.code, counted.sequence, len(counted.batch.tokens))
            before = self.firings[i]
            self.firings[i] = counts if before is None else before + counts
            assert counts.shape[1] == n_latents(output.code)

    def add_up(self, part: Part) -> None:
        """The sums of all parts, in rank 0."""
        self._close(min(self.first + self.open_x.shape[1], self.resamplings.n_documents))
        self.x, self.columns = (Readout(one, "evaluation").values() for one in (self.x, self.columns))
        self.firings = [one if one is None else Readout(one, "evaluation").values() for one in self.firings]
        part.add_up((torch.from_numpy(self.n), self.x, self.columns))
        for i, one in enumerate(zip(*part.gather(self.firings), strict=True)):
            seen = [firings for firings in one if firings is not None]
            self.firings[i] = torch.stack(seen).sum(0) if seen else None

    def result(self) -> tuple[list[Sums], list[Sums], list[Tensor | None]]:
        n = self.resamplings.sums(torch.from_numpy(self.n.T))
        counted, skipped = (
            [Sums(n[:, kind], self.x[kind], columns) for columns in self.columns[kind]] for kind in (0, 1)
        )
        return counted, skipped, self.firings


def _look_back(
    split: Split, settings: Settings, systems: Sequence[System | SequenceSystem], observer: Observer, part: Part
) -> None:
    device, there = settings.device, sums_on(settings.device)
    for batch in batches(split, settings.hook, settings.rules, ranges=part.before):
        counted = _positions(batch, batch.counted, to_device(batch.x, device), settings.mean.to(there))
        observer.look_back(batch, counted.x.to(there))
        for i, system in enumerate(systems):
            if (code := output_of(system, counted.x, counted.runs).code) is not None:
                observer.pass_over(i, code.to(there))


def _ablations(batch: EvalBatch, x: Float[Tensor, "batch position d_model"], settings: Settings) -> list[Tensor]:
    """What stands in place of x, in the order of `Reference`: zeros everywhere, zeros where xhat is, the mean there."""
    replaced = batch.counted.numpy() | (settings.splice_all & batch.skipped.numpy())
    zero, mean = x.new_zeros(1, len(settings.mean)), to_device(settings.mean.float(), x.device)[None]
    n = int(replaced.sum())
    constant = [splice(x, replaced, one.expand(n, -1)) for one in (zero, mean)]
    return [torch.zeros_like(x), *constant]


def _losses(
    tail: Tail,
    batch: EvalBatch,
    x: Float[Tensor, "batch position d_model"],
    others: Sequence[Float[Tensor, "batch position d_model"]],
    n: int,
) -> list[Float64[Tensor, "2 m"]]:
    """Cross-entropies and KL divergences of the batch's first `n` sequences, or all: of x itself, then of `others`."""
    first = slice(n)
    on_host = (one[first] for one in (batch.tokens.numpy(), batch.counted.numpy(), batch.has_next_on_host))
    losses = sequence_losses(tail, x[first], [one[first] for one in others], *on_host)
    return [torch.stack(tuple(one)) for one in losses]


def _counts(
    split: Split, rules: CountingRules, n_documents: int, tail_end: int
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"], int]:
    """Predictions and counted positions of each document, of the sequences before `tail_end`; and how many documents
    have a counted position anywhere. A sequence's last token predicts nothing.
    """
    numbers = document_numbers(split)[0]
    document = torch.from_numpy(numbers)
    mask = counted(split, rules)
    n_counted = len(np.unique(numbers[mask.any(1)]))
    mask[tail_end:] = False
    last = mask[np.arange(len(mask)), split.lengths - 1]
    counts = torch.zeros(2, n_documents, dtype=torch.float64)
    n = torch.from_numpy(mask.sum(1)).double()
    counts[0].index_add_(0, document, n - torch.from_numpy(last).double())
    counts[1].index_add_(0, document, n)
    return counts[0], counts[1], n_counted
