"""Measures of codes alone, one file each: `eval` runs every one that is registered here over each SAE's codes.

A measure adds up what it needs batch by batch, at the counted positions, and makes its figures from the sums at the
end; eval.json has them below "measures", with their definitions, and `eval --details` prints them. On a store of
planted features, what each SAE recovers of them comes beside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch
from tcsae.evaluate.measures.concentration import Concentration
from tcsae.evaluate.measures.core import n_latents
from tcsae.evaluate.measures.smoothness import Smoothness
from tcsae.evaluate.parallel import Part
from tcsae.evaluate.planted.recovery_figures import Planted, PlantedTokens
from tcsae.evaluate.planted.truth import MODEL, load_truth, truth_path
from tcsae.shared.base.console import say
from tcsae.shared.base.device import Readout
from tcsae.shared.sae.crosscoder import decoder_rows
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.store.reader import Split


@runtime_checkable
class Measure(Protocol):
    """One measure of one SAE; made with its number of latents."""

    definitions: Mapping[str, str]
    """What each of its figures is, in a sentence."""

    def add(self, code: Code) -> None:
        """The code of a batch's counted positions, in document order, on the CPU."""

    def sums(self) -> Sequence[Tensor]:
        """What it has added up; added over processes in place."""

    def figures(self) -> dict[str, float | None]:
        """The figures, None where undefined."""


@runtime_checkable
class OfPairs(Measure, Protocol):
    """A measure that also takes the activations, and where sequences begin."""

    def begin(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """The batch whose code comes next, and its activations at the counted positions."""


MEASURES: dict[str, Callable[[int], Measure]] = {
    "concentration": Concentration,
}
OF_CONFIG: dict[str, Callable[[SaeConfig], Measure]] = {
    "smoothness": Smoothness,
}
"""Measures that are made with the SAE's config, as they look at its groups of latents."""


class MeasureObserver:
    """Shows every registered measure the codes of a pass (`one_pass.Observer`)."""

    looks_back = False

    def __init__(self, saes: Sequence[SparseAutoencoder], split: Split) -> None:
        """`saes` are of the systems that are measured, the first ones of the pass.

        Raises StoreError if the store is planted and its truth is damaged.
        """
        self._of: list[dict[str, Measure]] = [
            {name: make(one.config.d_sae) for name, make in MEASURES.items()}
            | {name: make(one.config) for name, make in OF_CONFIG.items()}
            for one in saes
        ]
        truth = load_truth(split.store) if split.name == "eval" else None
        if truth is None and split.store.manifest.recipe.model.name == MODEL:
            say(f"No truth of the planted features at {truth_path(split.store.location)}: nothing is said of them.")
        self._tokens = PlantedTokens(truth, split.store.eval.lengths) if truth else None
        self._planted = [Planted(self._tokens, decoder_rows(one)) for one in saes] if self._tokens else []

    def begin(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        x = Readout(x, "measures").values()
        for measures in self._of:
            for measure in measures.values():
                if isinstance(measure, OfPairs):
                    measure.begin(batch, x)
        if self._tokens:
            self._tokens.begin(batch)

    def see(self, system: int, code: Code) -> None:
        if system >= len(self._of) or not n_latents(code):
            return
        values = code.values if isinstance(code, SparseCode) else code
        if values.device.type != "cpu":
            code = code.to("cpu")
        for measure in self._of[system].values():
            measure.add(code)
        if system < len(self._planted):
            self._planted[system].add(code)

    def look_back(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        pass

    def pass_over(self, system: int, code: Code) -> None:
        pass

    def add_up(self, part: Part) -> None:
        """Bring the sums of all processes to rank 0."""
        part.add_up([one for measures in self._of for measure in measures.values() for one in measure.sums()])
        part.add_up([one for planted in self._planted for one in planted.sums()])

    def figures(self, system: int) -> dict[str, dict[str, Any]]:
        """{measure: {"figures": ..., "definitions": ...}} of a system."""
        figures = {
            name: {"figures": measure.figures(), "definitions": dict(measure.definitions)}
            for name, measure in self._of[system].items()
        }
        return figures | (self._planted[system].figures() if self._planted else {})
