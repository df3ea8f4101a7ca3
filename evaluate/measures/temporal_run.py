"""Temporal measures of many SAEs in one pass, put together: per SAE, per group of latents, beside those of x itself."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tcsae.evaluate.batches import EvalBatch
from tcsae.evaluate.intervals import jackknife
from tcsae.evaluate.measures import position_removed, probes, temporal_figures
from tcsae.evaluate.measures.code_ops import take, where
from tcsae.evaluate.measures.core import join_codes, n_latents
from tcsae.evaluate.measures.latent_terms import MEAN, MEDIAN, WIDEST, Terms, latent_terms, pool, widest
from tcsae.evaluate.measures.positions import FAR, N_GROUPS, Layout, View
from tcsae.evaluate.measures.smoothing import EMA, Smoothing, filtered_rows, smoothing_kernel
from tcsae.evaluate.measures.temporal_figures import (
    COMMONEST,
    NULL_DEFINITIONS,
    NULLS,
    latent_measures,
    slowness,
    token_measures,
)
from tcsae.evaluate.measures.temporal_sums import Collector, TemporalSums
from tcsae.evaluate.parallel import Part
from tcsae.shared.base.device import to_device
from tcsae.shared.sae.module import SaeConfig
from tcsae.shared.sae.ops import Code
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split

DEFINITIONS = temporal_figures.DEFINITIONS | probes.DEFINITIONS
INTERVAL_RULE = f"95% of value minus null, jackknife over {N_GROUPS} groups of documents (probes: bootstrap over them)"
SMOOTHED = ("mean_pooled", "ema")
"""Groups that are all latents smoothed, of which there are probes alone."""
POSITION_REMOVED = ("rho_1_within", f"rho_{FAR}_within", "slowness_to_x", "document_share")
WITHOUT_WIDEST = "without_widest"
"""All latents but the widest (`latent_terms.WIDEST`): whether these make a pooled figure."""
OF_CODES = ("jaccard", "dwell", "slowness_to_pca")
"""Measures that x itself has none of."""
PAIRS_RULE = "pairs within a sequence; documents' means over all of their counted tokens"


class XMoments:
    """Second moments of x and of its adjacent differences, by group of documents."""

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self.n, self.n_pairs = torch.zeros(2, N_GROUPS, dtype=torch.float64)
        self.total = torch.zeros(N_GROUPS, d_model, dtype=torch.float64, device=device)
        self.second, self.difference = (self.total.new_zeros(N_GROUPS, d_model, d_model) for _ in range(2))

    def add(self, view: View, x: Float[Tensor, "n d_model"]) -> None:
        at = where(view.adjacent)
        steps, step_group = x[at + 1] - x[at], view.group[at]
        for group in view.group.unique().cpu().tolist():
            ours, moved = x[where(view.group == group)], steps[where(step_group == group)]
            self.n[group] += len(ours)
            self.n_pairs[group] += len(moved)
            self.total[group] += ours.double().sum(0)
            self.second[group] += (ours.T @ ours).double()
            self.difference[group] += (moved.T @ moved).double()

    def tensors(self) -> list[Tensor]:
        """On the CPU, where they stay."""
        self.total, self.second, self.difference = self.total.cpu(), self.second.cpu(), self.difference.cpu()
        return [self.n, self.n_pairs, self.total, self.second, self.difference]

    def pca_slowness(self, k: int, without: int | None) -> float:
        """Slowness of x projected on its first k principal components, all but one group together."""
        keep = [group for group in range(N_GROUPS) if group != without]
        n, mean = self.n[keep].sum(), self.total[keep].sum(0) / self.n[keep].sum()
        covariance = self.second[keep].sum(0) / n - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        basis = vectors[:, -k:]
        moved = (basis * (self.difference[keep].sum(0) @ basis)).sum() / self.n_pairs[keep].sum()
        return float(moved / (2 * values[-k:].sum()))


class TemporalObserver:
    """Sees codes go by (`one_pass.Observer`); afterwards `measures` has each system's figures."""

    looks_back = True

    def __init__(
        self,
        split: Split,
        rules: CountingRules,
        mean: Float64[Tensor, " d_model"],
        n_systems: int,
        device: torch.device | str = "cpu",
        probe_latents: int = probes.PROBE_LATENTS,
    ) -> None:
        """`device`: where codes and activations come from; `probe_latents`: how many a probe reads at most."""
        self.device = torch.device(device)
        self.n_systems = n_systems
        """Codes of systems from this number on are not looked at."""
        self.layout = Layout(split, rules)
        self.plan = probes.plan_probes(split, rules)
        self.probe_latents = probe_latents
        self.mean = mean.float()
        self._mean_there = self.mean.to(self.device)
        self.moments = XMoments(len(mean), self.device)
        self.x, self.smooth_x = (Collector(len(mean), self.layout, self.device) for _ in range(2))
        self._kernel = smoothing_kernel(Smoothing(EMA, probes.EMA_DECAY), split.store.sequence_length).to(self.device)
        self.systems: dict[int, Collector] = {}
        self.read: dict[int, list[Code]] = {}
        self.probe_draws: dict[int, dict[str, Float64[Tensor, " n_rows"]]] = {}
        """Of each system measured: what its probes find on every resampling of the documents."""
        self.view: View | None = None
        self.rows: Int[Tensor, " m"] = torch.arange(0)
        self._speeds: dict[tuple[int | None, int | None], tuple[float, float]] = {}

    def begin(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """The batch's view, and x itself as a code."""
        self.view = self.layout.view(batch).to(self.device)
        self.rows = to_device(self.plan.rows(batch) if self.plan else torch.arange(0), self.device)
        centred = x - self._mean_there
        if self.view.n:
            self.moments.add(self.view, centred)
        self.x.add(self.view, centred)
        self.smooth_x.add(self.view, self._smoothed(centred))
        self.read.setdefault(-1, []).append(centred[self.rows])

    def see(self, system: int, code: Code) -> None:
        """A system's code of the batch that began last."""
        if system >= self.n_systems:
            return
        assert self.view is not None
        self._collector(system, n_latents(code)).add(self.view, code)
        if len(self.rows):
            self.read.setdefault(system, []).append(take(code, self.rows))

    def look_back(self, batch: EvalBatch, x: Float[Tensor, "n d_model"]) -> None:
        """A batch that another process adds up."""
        self.view = self.layout.view(batch).to(self.device)
        centred = x - self._mean_there
        self.x.pass_over(self.view, centred)
        self.smooth_x.pass_over(self.view, self._smoothed(centred))

    def _smoothed(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """With an exponential memory along each run of counted positions: what any slowness has to beat."""
        assert self.view is not None
        return filtered_rows(x, torch.bincount(self.view.sequence.cpu()).tolist(), self._kernel)

    def pass_over(self, system: int, code: Code) -> None:
        """A system's code of the batch last looked back at."""
        if system < self.n_systems:
            assert self.view is not None
            self._collector(system, n_latents(code)).pass_over(self.view, code)

    def _collector(self, system: int, width: int) -> Collector:
        if system not in self.systems:
            self.systems[system] = Collector(width, self.layout, self.device)
        return self.systems[system]

    @torch.inference_mode()
    def add_up(self, part: Part, widths: Sequence[int]) -> None:
        """Bring together in rank 0 what all processes have seen; `widths` are the systems' numbers of latents."""
        collectors = [self.x, self.smooth_x, *(self._collector(i, width) for i, width in enumerate(widths))]
        for each in collectors:
            each.to_cpu()
        self.read = {system: [code.to("cpu") for code in codes] for system, codes in self.read.items()}
        part.add_up([*self.moments.tensors(), *(one for each in collectors for one in each.tensors())])
        read = part.gather(self.read)
        self.read = {
            system: [code for one in read for code in one.get(system, [])] for system in range(-1, len(widths))
        }

    def sample(self, system: int) -> Code | None:
        """A system's code of the tokens that probes read; None where there are none."""
        return join_codes(self.read[system]) if self.plan and self.read.get(system) else None

    def measures(self, system: int, config: SaeConfig) -> dict[str, Any]:
        """All measures of a system, as eval.json has them."""
        sums = self.systems[system].sums
        whole = sums.without(None)
        groups = latent_groups(config, whole.active[0]) | {WITHOUT_WIDEST: ~widest(pool(whole).variance)}
        code = self.sample(system)
        measured = self._rows(sums, groups, config.k)
        measured["all"]["position_removed"] = self._position_removed(self.systems[system])
        if self.plan and code is not None:
            for name, which in groups.items():
                if name == WITHOUT_WIDEST:
                    continue
                rows, draws = probes.probe(self.plan, self._probed(code, which))
                measured[name]["measures"] |= rows
                if name == "all":
                    self.probe_draws[system] = draws
        if self.plan and code is not None:
            for name, smooth in probes.smoothed(self.plan, self._probed(code, groups["all"])).items():
                measured[name] = {"measures": probes.probe(self.plan, smooth)[0]}
        return {
            "groups": measured,
            "x": self.of_x,
            "scale": {
                "mean_squared_norm": _ratio(whole.energy, whole.n),
                "mean_l1_norm": _ratio(whole.magnitude, whole.n),
            },
            "interval_rule": INTERVAL_RULE,
            "pairs": PAIRS_RULE,
            "group_rule": f"{WITHOUT_WIDEST}: all latents but the {WIDEST:.0%} of largest variance",
            "position_rule": position_removed.RULE,
            "nulls": NULLS | dict.fromkeys(probes.DEFINITIONS, COMMONEST),
            "null_definitions": NULL_DEFINITIONS,
        }

    def _probed(self, code: Code, which: Bool[Tensor, " d_sae"]) -> Float[Tensor, "n n_kept"]:
        return probes.largest_columns(code, which, self.probe_latents)

    @cached_property
    def of_x(self) -> dict[str, Any]:
        """The same of x itself; below "smoothed" of x with a memory, and the probes of `probes.smoothed`."""
        of_x, smoothed = self._of_activations(self.x), {"ema": self._of_activations(self.smooth_x)}
        if self.plan:
            x = self._probed(join_codes(self.read[-1]), torch.ones(len(self.mean), dtype=torch.bool))
            of_x["measures"] |= probes.probe(self.plan, x)[0]
            for name, smooth in probes.smoothed(self.plan, x).items():
                smoothed.setdefault(name, {"measures": {}})["measures"] |= probes.probe(self.plan, smooth)[0]
        return of_x | {"smoothed": smoothed}

    def _of_activations(self, collector: Collector) -> dict[str, Any]:
        """As far as measures have a meaning there: no dimension of x fires."""
        everything = torch.ones(len(self.mean), dtype=torch.bool)
        rows, curves = self._rows(collector.sums, {"all": everything}, None)["all"].values()
        rows = {name: row for name, row in rows.items() if not name.startswith(OF_CODES) and not _of_latents(name)}
        return {
            "measures": rows,
            "curves": {name: curve for name, curve in curves.items() if name in rows},
            "position_removed": self._position_removed(collector),
        }

    def _position_removed(self, collector: Collector) -> dict[str, float | None]:
        """What is left of measures once the mean by position is taken out, of a code and of x alike."""
        ours, of_x = (position_removed.figures(one.positions, one.sums.without(None)) for one in (collector, self.x))
        ours["slowness_to_x"] = ours["slowness"] / of_x["slowness"] if of_x["slowness"] else torch.nan
        return {name: _json(ours[name]) for name in POSITION_REMOVED}

    def _rows(
        self, sums: TemporalSums, groups: Mapping[str, Bool[Tensor, " d_sae"]], k: int | None
    ) -> dict[str, dict[str, Any]]:
        """Of each group of latents: measures with nulls and intervals, and curves over lags."""
        filled = [group for group in range(N_GROUPS) if sums.n_documents[group]]
        whole = sums.without(None)
        terms = latent_terms(whole, whole)
        full = {name: self._figures((whole, terms), (name, which), k, None) for name, which in groups.items()}
        left: dict[str, list[dict[str, _Pair]]] = {name: [] for name in groups}
        for without in filled if len(filled) > 1 else []:
            part = whole.less(sums, without, n_lags=FAR)
            terms = latent_terms(part, whole)
            for name, which in groups.items():
                left[name].append(self._figures((part, terms), (name, which), k, without)[0])
        rows = {}
        for name, (pairs, curves) in full.items():
            rows[name] = {
                "measures": {key: _row(pair, [one[key] for one in left[name]]) for key, pair in pairs.items()},
                "curves": {key: [_json(value) for value in curve] for key, curve in curves.items()},
            }
        return rows

    def _figures(
        self,
        sums: tuple[TemporalSums, Mapping[str, Terms]],
        latents: tuple[str, Bool[Tensor, " d_sae"]],
        k: int | None,
        without: int | None,
    ) -> tuple[dict[str, "_Pair"], dict[str, list[float]]]:
        """Values and nulls from (the sums without a group, their terms), of the latents of a name; and curves."""
        name, which = latents
        part, terms = sums
        values, nulls, curves = latent_measures(part, part, which, terms)
        of_x, permuted_x = self._speed(None, without)
        for ending in ("", MEDIAN, MEAN):
            values[f"slowness_to_x{ending}"] = values[f"slowness{ending}"] / of_x
            nulls[f"slowness_to_x{ending}"] = nulls[f"slowness{ending}"] / permuted_x
        if k is not None:
            # Permuted components are as slow as permuted x: without memory, both come to one.
            of_pca, _ = self._speed(min(k, len(self.mean)), without)
            values["slowness_to_pca"] = values["slowness"] / of_pca
            nulls["slowness_to_pca"] = nulls["slowness"] / permuted_x
        if name == "all":
            of_tokens = token_measures(sums[0])
            values, nulls = values | of_tokens.values, nulls | of_tokens.nulls
        return {name: _Pair(values[name], nulls[name]) for name in NULLS if name in values}, curves

    def _speed(self, k: int | None, without: int | None) -> tuple[float, float]:
        """Slowness of x (None) or of k principal components of it, and of permuted x."""
        if (k, without) not in self._speeds:
            every = torch.ones(len(self.mean), dtype=torch.bool)
            of_x = slowness(self.x.sums.without(without), every)
            of_pca = of_x[0] if k is None else self.moments.pca_slowness(k, without)
            self._speeds[k, without] = (of_pca, of_x[1])
        return self._speeds[k, without]


def _of_latents(name: str) -> bool:
    """Whether a measure is of single latents: those of x have no meaning, as any rotation of it is as good."""
    return name.endswith((MEDIAN, MEAN))


class _Pair(NamedTuple):
    value: float
    null: float

    @property
    def difference(self) -> float:
        return self.value - self.null


def _row(pair: _Pair, left: list[_Pair]) -> dict[str, Any]:
    """As eval.json has it; `left`: the same with each group of documents left out."""
    return {
        "value": _json(pair.value),
        "null": _json(pair.null),
        "difference": _json(pair.difference),
        "interval": jackknife(pair.difference, [one.difference for one in left]),
        "replicates": [_json(one.value) for one in left],
    }


def latent_groups(config: SaeConfig, firings: Float64[Tensor, " d_sae"]) -> dict[str, Bool[Tensor, " d_sae"]]:
    """All latents; with several groups also the first, and others that fire as often: a control for frequency."""
    groups = {"all": torch.ones(config.d_sae, dtype=torch.bool)}
    if len(config.groups) > 1:
        stop = config.group_ranges()[0][1]
        groups["first_group"] = torch.arange(config.d_sae) < stop
        groups["frequency_matched"] = matched(firings, groups["first_group"])
    return groups


def matched(firings: Float64[Tensor, " d_sae"], chosen: Bool[Tensor, " d_sae"]) -> Bool[Tensor, " d_sae"]:
    """As many of the other latents as are chosen (or all others), each the one left with the nearest firing rate.

    The most frequent chosen latents pick first: they have the fewest likes.
    """
    rates = firings.numpy()
    others = np.flatnonzero(~chosen.numpy())
    left = list(others[np.argsort(rates[others], kind="stable")])
    left_rates = [rates[one] for one in left]
    matched = torch.zeros_like(chosen)
    for rate in np.sort(rates[chosen.numpy()])[::-1]:
        if not left:
            break
        at = int(np.searchsorted(left_rates, rate))
        if at == len(left) or (at > 0 and rate - left_rates[at - 1] <= left_rates[at] - rate):
            at -= 1
        matched[left.pop(at)] = True
        left_rates.pop(at)
    return matched


def _json(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ratio(total: Tensor, n: Tensor) -> float:
    return float(total[0] / n[0])
