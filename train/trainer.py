"""One run in training: weights, optimiser, and the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.device import Readout, compiled, static_shapes, sum_dtype
from tcsae.shared.base.errors import ConfigError
from tcsae.shared.sae.activations import Encoded
from tcsae.shared.sae.build import new_sae
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.ops import Code, part, permuted
from tcsae.shared.sae.sparse import SparseCode, batchtopk_code
from tcsae.shared.sae.whole_sequences import SequenceAutoencoder
from tcsae.train.batch import Batch, far_apart, shuffled
from tcsae.train.config import TrainConfig
from tcsae.train.guard import DeviceGuard, judged, verdict_of
from tcsae.train.losses import temporal_term
from tcsae.train.losses.auxk import auxk
from tcsae.train.losses.position import PositionPenalty
from tcsae.train.losses.reconstruction import (
    Autoencoded,
    BatchTopk,
    Recipe,
    autoencode,
    encode,
    encoder_input,
    norm_rows,
    prefix_error,
    without_radial,
)
from tcsae.train.losses.state import BilinearHead, TermState
from tcsae.train.losses.t_sae import next_threshold, paired, residual_variance
from tcsae.train.start.first_weights import initial_sae
from tcsae.train.start.linear import LinearPart

CALIBRATION_TOKENS = 4096
NO_GRADIENT = 1e-5
"""A gradient this small, times the code's norm and over the term's value, is rounding."""


class StepResult:
    """The figures of a step, read from its device when they are asked for.

    Losses are means over the whole batch's tokens, in the units of training; l0: active latents a token.
    """

    def __init__(
        self,
        names: Iterable[str],
        figures: Float[Tensor, " n_figures"],
        x: Tensor,
        x_hat: Tensor,
        code: Code,
        batch: Batch,
    ) -> None:
        """`figures`: each loss by its name, then l0; `batch`: what the SAE read."""
        self.figures = figures
        self.x: Float[Tensor, "n d_model"] = x
        """What was to be reconstructed, in the units of training."""
        self.x_hat: Float[Tensor, "n d_model"] = x_hat
        """The whole SAE's reconstruction."""
        self.code = code
        self.batch = batch
        self._names = tuple(names)
        self._grad_norm: Tensor | float = 0.0
        self._temporal_weight: Tensor | float = 0.0

    @cached_property
    def _read(self) -> list[float]:
        return Readout(self.figures, "log").values().tolist()

    @property
    def losses(self) -> dict[str, float]:
        return dict(zip(self._names, self._read[:-1], strict=True))

    @property
    def loss(self) -> float:
        return sum(self._read[:-1])

    @property
    def loss_there(self) -> Float[Tensor, ""]:
        """The loss where it was computed."""
        return self.figures[:-1].sum()

    @property
    def l0(self) -> float:
        return self._read[-1]

    @property
    def grad_norm(self) -> float:
        return float(self._grad_norm)

    @property
    def temporal_weight(self) -> float:
        return float(self._temporal_weight)


@dataclass
class Progress:
    """How far a run is, and its state besides weights and moments."""

    n_steps: int = 0
    n_tokens: int = 0
    n_left_out: int = 0
    """Tokens that data.max_norm left out."""
    mean_loss: float = 0.0
    mean_correlation: float | None = None
    """Running mean of the code's adjacent correlation, where guard.correlation watches it."""
    n_restored: int = 0
    ended: str = ""
    """Why the run ended before its last step, if it did."""


class _Pending(NamedTuple):
    """A step whose verdict is on its way."""

    readout: Readout
    batch: Batch
    before: tuple[int, int, int]
    """Steps, tokens and tokens left out before it."""


@dataclass
class Trainer:
    """Trains one SAE, a batch a step, on the device that `sample` is on.

    `sample` [n, d_model] sets the input scale and the first decoder bias.
    """

    config: TrainConfig
    sample: Float[Tensor, "n d_model"]
    n_positions: int = 128
    """Positions of a sequence (for the position penalty)."""
    initial: SparseAutoencoder | None = None
    """Weights to start from, in the units of the data."""
    progress: Progress = field(default_factory=Progress)
    linear: LinearPart | None = None
    """What `config.linear` asks for (tcsae.train.start.linear.fit_linear)."""

    def __post_init__(self) -> None:
        config = self.config
        if self.linear is not None:
            self.linear = self.linear.to(self.sample)
            self.sample = self.linear.rest(self.sample)
        self.scale = 1.0 if config.init.input_scale == "none" else self._unit_scale()
        if self.initial is None:
            self.sae = initial_sae(config, self.sample * self.scale)
        else:
            self.sae = self.initial.to(self.sample.device)
            self.sae.fold_scale(1 / self.scale)
        if self.sae.threshold is not None and self.sae.kind.threshold == "calibrated":
            self.sae.threshold.requires_grad_(False)
        self.parameters = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        device = self.sample.device
        self.tokens_since_fired = torch.zeros(config.sae.d_sae, dtype=torch.int64, device=device)
        self.guard = DeviceGuard(config.guard.explode, device) if static_shapes(self.sample) else None
        self._recipe = Recipe(config.group_weights, config.sparsity.bandwidth)
        self._autoencode, self._without_radial = compiled(autoencode), compiled(without_radial)
        self._norm_rows = compiled(norm_rows)
        self._pending: _Pending | None = None
        self._most_dead: int | None = None
        """Latents that may be dead in this step, at most; None: not known."""
        ranges = config.sae.group_ranges()
        self.scope = ranges[0] if config.temporal.scope == "first" else (0, config.sae.d_sae)
        self.head: BilinearHead | None = None
        if config.temporal.active and config.temporal.kind == "direction":
            self.head = BilinearHead(self.scope[1], config.temporal.contrast.rank, config.init_seed, device)
            self.parameters += self.head.parameters()
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        fused = device.type != "meta"  # which has none, and no numbers either
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.optimizer.lr, betas=betas, fused=fused, foreach=not fused
        )
        self.positions = None
        centred = config.temporal.active and config.temporal.contrast.centred
        if config.temporal.position_penalty > 0 or centred:
            self.positions = PositionPenalty(self.n_positions, self.scope[1], self.sample.device)

    def _unit_scale(self) -> float:
        """What brings the sample to a mean square of 1. Raises ConfigError for a sample of zeros."""
        mean_square = float(self.sample.square().mean())
        if not mean_square:
            hook = self.config.data.hook
            of = "the store's first hook" if hook is None else f"data.hook={hook}"
            raise ConfigError(
                "All activations of the sample are zero, or too small to square "
                f"({of}): init.input_scale='unit' has nothing "
                "to scale. Set data.hook to another, or init.input_scale=none."
            )
        return math.sqrt(1 / mean_square)

    def step(self, batch: Batch) -> StepResult:
        """One optimiser step.

        Raises UnstableError, before any weight moves, if loss or gradient is not finite or the loss explodes. On a
        device other than a CPU that is known one step later: then this step, too, has moved nothing, and the counters
        are those before the bad one. `settle` asks for the verdict on the last step.
        """
        config = self.config.optimizer
        result = self.gradients(batch)
        with torch.no_grad():
            if config.unit_decoder:
                self._project_decoder_gradient()
            result._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
            readout = self._guard(result, batch)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(self.progress.n_steps, self.config.steps)
            self.optimizer.step()
            if config.unit_decoder:
                self._norm_decoder()
            if self.sae.threshold is not None:
                self._average_threshold(result, batch)
                self.sae.threshold.clamp_(min=0)
        progress, earlier = self.progress, self._pending
        if readout is not None:
            self._pending = _Pending(readout, batch, (progress.n_steps, progress.n_tokens, progress.n_left_out))
        self.count(batch)
        if earlier is not None:
            self._read(earlier)
        return result

    def settle(self) -> None:
        """Wait for the verdict on the last step: before weights are saved or figures shown.

        Raises UnstableError, with the counters as they were before that step.
        """
        if self._pending is not None:
            self._read(self._pending)
            self._pending = None

    def restart(self) -> None:
        """Take `progress` as what it is now: weights, moments and counters were replaced."""
        self._pending = self._most_dead = None
        if self.guard is not None:
            self.guard.start(self.progress.mean_loss)

    def _read(self, pending: _Pending) -> None:
        """Raises UnstableError for a bad verdict."""
        progress, verdict = self.progress, verdict_of(pending.readout)
        if verdict.bad:
            progress.n_steps, progress.n_tokens, progress.n_left_out = pending.before
            self._pending = None
        progress.mean_loss, self._most_dead = verdict.mean_after, verdict.most_dead
        verdict.check(progress.n_steps, self.config.guard.explode, pending.batch)

    def gradients(self, batch: Batch) -> StepResult:
        """Losses of a batch, with the gradients left in the parameters' `.grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        given, batch = batch, self._rows(batch)
        x, n_rows = batch.x * self.scale, max(1, batch.n_whole)
        inputs, encoded, x_hats, error = self._autoencoded(x, batch)
        losses = {"reconstruction": error / n_rows}
        temporal_weight = self._add_code_losses(losses, encoded, batch)
        x_hat = x_hats[-1].detach()
        if self.config.dead.aux_weight and self.sae.kind.mostly_zero:
            losses["aux"] = self._aux(inputs, x, x_hat, batch)
        sum(losses.values(), start=torch.zeros((), device=x.device)).backward()
        for parameter in self.parameters:
            assert parameter.grad is not None
            batch.group.sum_(parameter.grad)
        fired = batch.group.any(encoded.activity.fired)
        self.tokens_since_fired.add_(given.n_whole if batch.partners is None else n_rows).masked_fill_(fired, 0)
        n_linear = 0 if self.linear is None else self.linear.W.shape[1]
        l0 = encoded.activity.n_active / n_rows + n_linear / batch.group.world
        figures = self._whole_batch([*losses.values(), l0], batch)
        code = encoded.code.detached() if isinstance(encoded.code, SparseCode) else encoded.code.detach()
        if self.linear is not None:
            x, x_hat = given.x * self.scale, x_hat + (given.x * self.scale - x)
        result = StepResult(losses, figures, x, x_hat, code, batch)
        result._temporal_weight = temporal_weight
        return result

    def _autoencoded(self, x: Float[Tensor, "n d_model"], batch: Batch) -> Autoencoded:
        if not isinstance(self.sae, SequenceAutoencoder):
            return self._autoencode(self.sae, x, self._recipe, self._batchtopk(batch))
        encoded, x_hat = self.sae.train_pass(x, batch.lengths)
        return Autoencoded(x, encoded, [x_hat], prefix_error([x_hat], x, self.config.group_weights))

    def _batchtopk(self, batch: Batch) -> BatchTopk:
        return batchtopk_code if batch.group.alone else partial(batch.group.batchtopk, n_whole=batch.n_whole)

    def _aux(self, inputs: Tensor, x: Tensor, x_hat: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """AuxK at its weight."""
        config = self.config.dead
        k = config.aux_k or max(1, self.config.sae.d_model // 2)
        aux = config.aux_weight * auxk(self.sae, inputs, x, x_hat, batch, self.dead(), k, self._most_dead)
        return aux / residual_variance(x - x_hat, batch) if config.aux_relative else aux

    def _rows(self, batch: Batch) -> Batch:
        """What the SAE reads: tokens (of t-sae's pairs the current ones), what a linear part leaves of them, or windows
        from a position of each segment that is drawn anew every step.
        """
        temporal = self.config.temporal
        if temporal.active and temporal.kind == "t-sae":
            current, partners = paired(temporal, batch, self.step_seed())
            return current._replace(partners=partners)
        if self.linear is not None:
            return batch._replace(x=self.linear.rest(batch.x))
        window, order = self.config.sae.window, self.config.temporal.order
        if self.config.sae.reads_neighbours and order != "text":
            _, batch = shuffled(order, batch, self.step_seed())
        if window == 1:
            return batch
        n_offsets = min(window, batch.longest - window + 1)
        assert n_offsets > 0, "no segment of the batch holds a window"
        return batch.windows(window, self.step_seed() % n_offsets)

    def _add_code_losses(self, losses: dict[str, Tensor], encoded: Encoded, batch: Batch) -> Tensor | float:
        """Temporal term, position penalty, L1 and L0 of a code into `losses`; returns the temporal term's weight."""
        config = self.config
        weight: Tensor | float = 0.0
        code = part(encoded.tap, *self.scope)
        if config.temporal.active:
            term = self._temporal(code, batch)
            weight = self.temporal_weight(losses["reconstruction"], term, encoded, batch)
            losses["temporal"] = weight * term
        if self.positions is not None:
            penalty = self.positions(code, batch)
            if config.temporal.position_penalty > 0:
                losses["position"] = config.temporal.position_penalty * penalty
        if config.sparsity.l1:  # eq. 4, second term
            losses["l1"] = config.sparsity.l1 * encoded.size / batch.n_whole
        if encoded.n_active is not None:  # Rajamanoharan et al. 2024, with a target for L0
            l0 = batch.group.sum(encoded.n_active) / batch.n_whole
            losses["l0_loss"] = batch.group.share(config.sparsity.l0 * (l0 / config.sae.k - 1).square())
        return weight

    def _temporal(self, code: Code, batch: Batch) -> Float[Tensor, ""]:
        """The term at weight 1, over the scope's code; in another order of positions if a control asks for it."""
        config, seed = self.config.temporal, self.step_seed()
        state = TermState(head=self.head)
        if batch.partners is not None:
            inputs, _ = encoder_input(self.sae, batch.partners * self.scale)
            partners = encode(self.sae, inputs, self._recipe, self._batchtopk(batch))
            state = state._replace(partner=part(partners.tap, *self.scope))
        if config.contrast.centred and self.positions is not None:
            state = state._replace(position=batch.positions(), means=self.positions.means())
        if config.order != "text" and not self.config.sae.reads_neighbours and batch.partners is None:
            if config.order == "document":
                tokens, batch = far_apart(batch, config.contrast.distance)
            else:
                tokens, batch = shuffled(config.order, batch, seed)
            code = permuted(code, tokens)
            if state.position is not None:
                state = state._replace(position=state.position[tokens])
        return temporal_term(config.kind, state)(config, code, batch, seed)

    def temporal_weight(self, reconstruction: Tensor, term: Tensor, encoded: Encoded, batch: Batch) -> Tensor | float:
        """The weight now, risen by the warm-up: the set one, or with a budget such that the term's gradient at the
        active entries has that share of the reconstruction's norm.

        Where nothing but rounding is left of the term's gradient (no latent fires twice in a row), it gets no weight:
        any share would be noise.
        """
        config = self.config.temporal
        risen = min(1.0, (self.progress.n_steps + 1) / max(1.0, config.warmup * self.config.steps))
        if not config.budget:
            return risen * config.weight
        if not term.requires_grad:
            return 0.0
        first, stop = self.scope
        code, tap = (one.values if isinstance(one, SparseCode) else one for one in (encoded.code, encoded.tap))
        if isinstance(encoded.code, SparseCode):
            latents = encoded.code.latents
        else:
            latents = torch.arange(code.shape[1], device=code.device)
        read_by = ((term, tap), (reconstruction, code))
        grads = [torch.autograd.grad(loss, entries, retain_graph=True)[0] for loss, entries in read_by]
        active = (code.detach() != 0) & (latents >= first) & (latents < stop)
        unit, target, size = (batch.group.norm(one * active) for one in (*grads, code.detach()))
        value = batch.group.sum_(term.detach().clone())
        rounding = unit * size <= NO_GRADIENT * value.abs()
        return torch.where(rounding, 0.0, risen * config.budget * target / unit).to(term.dtype)

    def _average_threshold(self, result: StepResult, batch: Batch) -> None:
        """A batchtopk's threshold as a running mean, where sparsity.threshold says so."""
        threshold = self.sae.learned_threshold
        if self._averages and isinstance(result.code, SparseCode):
            step, steps = self.progress.n_steps, self.config.steps
            now = threshold[0].clone()
            after = next_threshold(now, result.code.values, batch, step, steps)
            threshold.copy_(after if self.guard is None else torch.where(self.guard.halted > 0, now, after))

    @property
    def _averages(self) -> bool:
        return self.sae.kind.threshold == "calibrated" and self.config.sparsity.threshold == "average"

    def _project_decoder_gradient(self) -> None:
        assert self.sae.W_dec.grad is not None
        self._without_radial(self.sae.W_dec, self.sae.W_dec.grad)

    def _norm_decoder(self) -> None:
        self._norm_rows(self.sae.W_dec, None if self.guard is None else self.guard.halted)

    def _whole_batch(self, parts: list[Tensor | float], batch: Batch) -> Float[Tensor, " n_parts"]:
        """Sums over all processes' parts, where they were computed."""
        wide, device = sum_dtype(self.sample.device), self.sample.device
        scalars = [
            one.detach().to(wide) if isinstance(one, Tensor) else torch.full((), one, dtype=wide, device=device)
            for one in parts
        ]
        return batch.group.sum_(torch.stack(scalars))

    def step_seed(self) -> int:
        """Seed of what a run draws for itself in this step."""
        return hash((self.config.init_seed, self.progress.n_steps)) % 2**32

    def count(self, batch: Batch) -> None:
        """A batch is done with, used or not: schedules and ends go by batches seen."""
        self.progress.n_steps += 1
        self.progress.n_tokens += batch.n_whole
        self.progress.n_left_out += batch.n_left_out

    def _guard(self, result: StepResult, batch: Batch) -> Readout | None:
        """Raises UnstableError for bad figures; a device guard masks the update, and its verdict is returned."""
        progress, explode = self.progress, self.config.guard.explode
        if self.guard is None:
            verdict = judged(result.loss, result.grad_norm, progress.mean_loss, explode)
            progress.mean_loss = verdict.mean_after
            verdict.check(progress.n_steps, explode, batch)
            return None
        assert isinstance(result._grad_norm, Tensor)
        readout = self.guard.judge(result.loss_there, result._grad_norm, self._may_die(batch))
        if self.optimizer.defaults["fused"]:  # as torch.amp's scaler does
            self.optimizer.found_inf = self.guard.halted  # type: ignore[attr-defined]
        return readout

    def _dead_limit(self) -> float:
        """Tokens after which a latent that has not fired counts as dead."""
        config, progress = self.config.dead, self.progress
        per_step = progress.n_tokens / max(1, progress.n_steps)
        return min(config.after_tokens, config.after_share * per_step * self.config.steps)

    def _may_die(self, batch: Batch) -> Tensor:
        """How many latents may be dead two steps from now: those silent for half as long as that takes, or all, where
        two batches are as long.
        """
        half = self._dead_limit() / 2 if self.progress.n_steps else 0.0
        if 4 * batch.n_whole > half:
            half = -1.0
        return (self.tokens_since_fired > half).sum()

    def dead(self) -> Tensor:
        """Latents that have not fired for so long that they count as dead."""
        if not self.progress.n_steps:
            return torch.zeros_like(self.tokens_since_fired).bool()
        return self.tokens_since_fired > self._dead_limit()

    @torch.no_grad()
    def finished_sae(self) -> SparseAutoencoder:
        """A copy on the CPU that reads unscaled activations.

        A batchtopk's gets the threshold at which L0 is k on the sample.
        """
        sae = new_sae(self.config.sae).to(self.sample.device)
        sae.input_scale = self.sae.input_scale
        sae.load_state_dict(self.sae.state_dict())
        if sae.threshold is not None and sae.kind.threshold == "calibrated" and not self._averages:
            parts = [part * self.scale for part in self.sample.split(CALIBRATION_TOKENS)]
            last = [batchtopk_code(sae.pre_activations(part), self.config.sae.k).values for part in parts]
            lowest = [float(values[values > 0].min()) for values in last if (values > 0).any()]
            # The last entry kept has to stay above the threshold: fires on strict >.
            sae.threshold.fill_(0.999999 * sum(lowest) / max(1, len(lowest)))
        sae.fold_scale(self.scale)
        sae = sae.cpu().eval()
        return sae if self.linear is None else LinearPart(*(one.cpu() for one in self.linear)).folded(sae)
