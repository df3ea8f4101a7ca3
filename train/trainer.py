"""One run in training: weights, optimiser, and the step."""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tcsae.shared.base.device import sum_dtype
from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.activations import Encoded, Encoder
from tcsae.shared.sae.module import SparseAutoencoder, layer_normed
from tcsae.shared.sae.ops import Code, EncoderWeights, decode_code, part, take
from tcsae.shared.sae.sparse import SparseCode, batchtopk_code
from tcsae.train.batch import Batch, shuffled
from tcsae.train.config import TrainConfig
from tcsae.train.losses import temporal_term
from tcsae.train.losses.auxk import auxk
from tcsae.train.losses.position import PositionPenalty

LOSS_DECAY = 0.98
"""Of the running mean that a loss is held against."""
CALIBRATION_TOKENS = 4096
MEDIAN_STEPS = 50
FIRST_THRESHOLD = 0.1
NO_GRADIENT = 1e-5
"""A gradient this small, times the code's norm and over the term's value, is rounding."""


@dataclass
class StepResult:
    """The figures of a step. Losses are means over the whole batch's tokens, in the units of training."""

    losses: dict[str, float]
    x: Float[Tensor, "n d_model"]
    """What was to be reconstructed, in the units of training."""
    x_hat: Float[Tensor, "n d_model"]
    """The whole SAE's reconstruction."""
    code: Code
    l0: float
    grad_norm: float = 0.0
    temporal_weight: float = 0.0

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass
class Progress:
    """How far a run is, and its state besides weights and moments."""

    n_steps: int = 0
    n_tokens: int = 0
    n_left_out: int = 0
    """Tokens that data.max_norm left out."""
    mean_loss: float = 0.0
    n_restored: int = 0
    ended: str = ""
    """Why the run ended before its last step, if it did."""


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

    def __post_init__(self) -> None:
        config = self.config
        unit = config.init.input_scale == "unit"
        self.scale = math.sqrt(1 / float(self.sample.square().mean())) if unit else 1.0
        if self.initial is None:
            self.sae = initial_sae(config, self.sample * self.scale)
        else:
            self.sae = self.initial.to(self.sample.device)
            self.sae.fold_scale(1 / self.scale)
        if self.sae.threshold is not None and self.sae.kind.threshold == "calibrated":
            self.sae.threshold.requires_grad_(False)
        self.parameters = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.optimizer.lr, betas=betas, fused=True)
        self.tokens_since_fired = torch.zeros(config.sae.d_sae, dtype=torch.int64, device=self.sample.device)
        ranges = config.sae.group_ranges()
        self.scope = ranges[0] if config.temporal.scope == "first" else (0, config.sae.d_sae)
        self.positions = None
        if config.temporal.position_penalty > 0:
            self.positions = PositionPenalty(self.n_positions, self.scope[1], self.sample.device)

    def step(self, batch: Batch) -> StepResult:
        """One optimiser step.

        Raises RunError, before any weight moves, if loss or gradient is not finite or the loss explodes.
        """
        config = self.config.optimizer
        result = self.gradients(batch)
        with torch.no_grad():
            if config.unit_decoder:
                self._project_decoder_gradient()
            result.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm))
            self._guard(result)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(self.progress.n_steps, self.config.steps)
            self.optimizer.step()
            if config.unit_decoder:
                self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
            if self.sae.threshold is not None:
                self.sae.threshold.clamp_(min=0)
        self.count(batch)
        return result

    def gradients(self, batch: Batch) -> StepResult:
        """Losses of a batch, with the gradients left in the parameters' `.grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        x = batch.x * self.scale
        inputs, scaling = self._encoder_input(x)
        encoded = self._encode(inputs, batch)
        x_hats = self._reconstructions(encoded.code, scaling)
        losses = {"reconstruction": prefix_error(x_hats, x, self.config.group_weights) / batch.n_whole}
        temporal_weight = self._add_code_losses(losses, encoded, batch)
        x_hat, dead, config = x_hats[-1].detach(), self.dead(), self.config.dead
        if config.aux_weight and self.sae.kind.mostly_zero:
            losses["aux"] = config.aux_weight * auxk(self.sae, inputs, x, x_hat, batch, dead, config.aux_k)
        sum(losses.values(), start=torch.zeros((), device=x.device)).backward()
        for parameter in self.parameters:
            assert parameter.grad is not None
            batch.group.sum_(parameter.grad)
        fired = batch.group.any(encoded.activity.fired)
        self.tokens_since_fired.add_(batch.n_whole).masked_fill_(fired, 0)
        *values, n_active = self._whole_batch([*losses.values(), encoded.activity.n_active], batch)
        code = encoded.code.detached() if isinstance(encoded.code, SparseCode) else encoded.code.detach()
        return StepResult(
            dict(zip(losses, values, strict=True)), x, x_hat, code, n_active / batch.n_whole, 0.0, temporal_weight
        )

    def _encoder_input(self, x: Float[Tensor, "n d_model"]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What the encoder reads before b_dec is taken away, and (scale, shift) of the decoder's output, if any."""
        if self.sae.config.layer_norm == "none":
            return x, None
        inputs, mean, spread = layer_normed(x)
        return inputs, (spread, mean) if self.sae.config.layer_norm == "in_out" else None

    def _encode(self, inputs: Float[Tensor, "n d_model"], batch: Batch) -> Encoded:
        sae = self.sae
        centred = inputs - sae.b_dec.detach()
        weights = EncoderWeights(sae.W_enc_rows, sae.b_enc, sae.b_dec)
        batchtopk = partial(batch.group.batchtopk, n_whole=batch.n_whole)
        return sae.kind.train(
            Encoder(centred, weights, sae.config.k, sae.threshold, self.config.sparsity.bandwidth, batchtopk)
        )

    def _reconstructions(self, code: Code, scaling: tuple[Tensor, Tensor] | None) -> list[Float[Tensor, "n d_model"]]:
        """Of every prefix of the groups: prefix g decodes the latents of groups 0..g."""
        sae, ranges = self.sae, self.config.sae.group_ranges()
        weights = sae.W_dec.split([stop - first for first, stop in ranges]) if len(ranges) > 1 else [sae.W_dec]
        x_hats: list[Tensor] = []
        for (first, stop), W_dec in zip(ranges, weights, strict=True):
            one = decode_code(part(code, first, stop), W_dec, None if x_hats else sae.b_dec)
            x_hats.append(x_hats[-1] + one if x_hats else one)
        if scaling is None:
            return x_hats
        spread, mean = scaling
        return [x_hat * spread + mean for x_hat in x_hats]

    def _add_code_losses(self, losses: dict[str, Tensor], encoded: Encoded, batch: Batch) -> float:
        """Temporal term, position penalty, L1 and L0 of a code into `losses`; returns the temporal term's weight."""
        config, weight = self.config, 0.0
        code = part(encoded.tap, *self.scope)
        if config.temporal.active:
            term = self._temporal(code, batch)
            weight = self.temporal_weight(losses["reconstruction"], term, encoded, batch)
            losses["temporal"] = weight * term
        if self.positions is not None:
            losses["position"] = config.temporal.position_penalty * self.positions(code, batch)
        if config.sparsity.l1:  # eq. 4, second term
            losses["l1"] = config.sparsity.l1 * encoded.size / batch.n_whole
        if encoded.n_active is not None:  # Rajamanoharan et al. 2024, with a target for L0
            l0 = batch.group.sum(encoded.n_active) / batch.n_whole
            losses["l0_loss"] = batch.group.share(config.sparsity.l0 * (l0 / config.sae.k - 1).square())
        return weight

    def _temporal(self, code: Code, batch: Batch) -> Float[Tensor, ""]:
        """The term at weight 1, over the scope's code; in another order of positions if a control asks for it."""
        config, seed = self.config.temporal, self.step_seed()
        if config.order != "text":
            tokens = shuffled(config.order, batch, seed)
            code, batch = take(code, tokens), batch._replace(x=batch.x[tokens])
        return temporal_term(config.kind)(config, code, batch, seed)

    def temporal_weight(self, reconstruction: Tensor, term: Tensor, encoded: Encoded, batch: Batch) -> float:
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
        return 0.0 if unit * size <= NO_GRADIENT * abs(float(value)) else risen * config.budget * target / unit

    def _project_decoder_gradient(self) -> None:
        """Take the gradient along each unit row away: the norm would undo it, yet it would feed Adam's moments."""
        W_dec = self.sae.W_dec
        assert W_dec.grad is not None
        W_dec.grad.addcmul_(W_dec, (W_dec.grad * W_dec).sum(1)[:, None], value=-1)

    def _whole_batch(self, parts: list[Tensor | int], batch: Batch) -> list[float]:
        """Sums over all processes' parts, read from the device in one go."""
        wide = sum_dtype(self.sample.device)
        scalars = [torch.as_tensor(one, dtype=wide, device=self.sample.device).detach() for one in parts]
        return batch.group.sum_(torch.stack(scalars)).cpu().tolist()

    def step_seed(self) -> int:
        """Seed of what a run draws for itself in this step."""
        return hash((self.config.init_seed, self.progress.n_steps)) % 2**32

    def count(self, batch: Batch) -> None:
        """A batch is done with, used or not: schedules and ends go by batches seen."""
        self.progress.n_steps += 1
        self.progress.n_tokens += batch.n_whole
        self.progress.n_left_out += batch.n_left_out

    def _guard(self, result: StepResult) -> None:
        progress, limit = self.progress, self.config.guard.explode
        finite = math.isfinite(result.loss + result.grad_norm)
        if not finite or (progress.mean_loss and result.loss > limit * progress.mean_loss):
            raise RunError(
                f"step {progress.n_steps}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}, the mean loss "
                f"so far {progress.mean_loss:.4g} and {limit:g} times that is allowed (guard.explode). "
                "No weight was touched; lower optimizer.lr."
            )
        decay = LOSS_DECAY if progress.mean_loss else 0.0
        progress.mean_loss = decay * progress.mean_loss + (1 - decay) * result.loss

    def dead(self) -> Tensor:
        """Latents that have not fired for so long that they count as dead."""
        config, progress = self.config.dead, self.progress
        per_step = progress.n_tokens / max(1, progress.n_steps)
        limit = min(config.after_tokens, config.after_share * per_step * self.config.steps)
        return self.tokens_since_fired > limit if progress.n_steps else torch.zeros_like(self.tokens_since_fired).bool()

    @torch.no_grad()
    def finished_sae(self) -> SparseAutoencoder:
        """A copy on the CPU that reads unscaled activations.

        A batchtopk's gets the threshold at which L0 is k on the sample.
        """
        sae = SparseAutoencoder(self.config.sae).to(self.sample.device)
        sae.load_state_dict(self.sae.state_dict())
        if sae.threshold is not None and sae.kind.threshold == "calibrated":
            parts = [part * self.scale for part in self.sample.split(CALIBRATION_TOKENS)]
            last = [batchtopk_code(sae.pre_activations(part), self.config.sae.k).values for part in parts]
            lowest = [float(values.min()) for values in last if len(values)]
            # The last entry kept has to stay above the threshold: fires on strict >.
            sae.threshold.fill_(0.999999 * sum(lowest) / max(1, len(lowest)))
        sae.fold_scale(self.scale)
        return sae.cpu().eval()


def prefix_error(
    x_hats: list[Float[Tensor, "n d_model"]], x: Float[Tensor, "n d_model"], weights: tuple[float, ...]
) -> Float[Tensor, ""]:
    """sum over prefixes g of w_g ||x - x_hat_g||^2 (matryoshka; one prefix is the plain autoencoder)."""
    errors = [F.mse_loss(x_hat, x, reduction="sum") for x_hat in x_hats]
    return sum((weight * error for weight, error in zip(weights, errors, strict=True)), start=x.new_zeros(()))


@torch.no_grad()
def initial_sae(config: TrainConfig, sample: Float[Tensor, "n d_model"]) -> SparseAutoencoder:
    """Fresh weights by `config.init`, on the device of `sample`, which is in the units that training sees.

    They are drawn on the CPU: a seed gives the same weights on every device.
    """
    sae = SparseAutoencoder(config.sae)
    generator = torch.Generator().manual_seed(config.init_seed)
    match config.init.weights:
        case "xavier":
            torch.nn.init.xavier_normal_(sae.W_enc_rows, generator=generator)
            torch.nn.init.xavier_normal_(sae.W_dec, generator=generator)
            if config.optimizer.unit_decoder:
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        case "transpose":
            sae.W_dec.normal_(generator=generator)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            sae.W_enc_rows.copy_(sae.W_dec)
    match config.init.b_dec:
        case "mean":
            sae.b_dec.copy_(sample.mean(0))
        case "median":
            sae.b_dec.copy_(geometric_median(sample))
    if sae.threshold is not None and sae.kind.threshold == "learned":
        sae.threshold.fill_(FIRST_THRESHOLD)
    return sae.to(sample.device)


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(MEDIAN_STEPS):
        nearness = 1 / (x - point).norm(dim=1).clamp_(min=1e-8)
        point = nearness @ x / nearness.sum()
    return point
