"""One run in training: its weights, optimiser and step. The backward pass is written out; nothing builds a graph."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import RunError
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode, batchtopk_code
from tcsae.train.adder import ALONE, Adder
from tcsae.train.auxk import auxk
from tcsae.train.backward import Pass, code_gradient, encode, reconstruct, set_gradients, threshold_gradient
from tcsae.train.batch import Batch
from tcsae.train.buffers import Workspace
from tcsae.train.config import TrainConfig
from tcsae.train.initial import initial_sae
from tcsae.train.losses.difference import difference_dense, l1_sparse
from tcsae.train.temporal import PositionPenalty, dense_term, pairs_of, sparse_term

LOSS_DECAY = 0.98
"""Of the running mean that a loss is held against."""
CALIBRATION_TOKENS = 4096
NO_GRADIENT = 1e-5
"""A gradient this small, times the code's norm and over the term's value, is rounding."""


@dataclass
class StepResult:
    """What a step found out. Losses are means over the batch's tokens, in the units training sees."""

    losses: dict[str, float]
    state: Pass
    l0: float
    grad_norm: float = 0.0
    temporal_weight: float = 0.0

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass
class Progress:
    """How far a run is, and what it remembers besides weights and moments."""

    n_steps: int = 0
    n_tokens: int = 0
    n_left_out: int = 0
    """Tokens of segments that data.max_norm left out."""
    mean_loss: float = 0.0
    n_restored: int = 0
    ended: str = ""
    """Why the run ended before its last step, if it did."""


@dataclass
class Trainer:
    """Trains one SAE, a batch a step, on the device that `sample` and `workspace` are on.

    `sample` [n, d_model] sets the input scale and the first decoder bias.
    """

    config: TrainConfig
    sample: Float[Tensor, "n d_model"]
    workspace: Workspace
    n_positions: int = 128
    """Positions of a sequence (for the position penalty)."""
    initial: SparseAutoencoder | None = None
    """Weights to start from, in the units of the data."""
    progress: Progress = field(default_factory=Progress)
    adder: Adder = ALONE
    """What makes one sum of the parts of a batch that several processes have."""

    def __post_init__(self) -> None:
        config = self.config
        unit = config.init.input_scale == "unit"
        self.scale = math.sqrt(1 / float(self.sample.square().mean())) if unit else 1.0
        if self.initial is None:
            self.sae = initial_sae(config, self.sample * self.scale)
        else:
            self.sae = self.initial.to(self.sample.device)
            self.sae.fold_scale(1 / self.scale)
        self.parameters = [parameter for parameter in self.sae.parameters() if self._learns(parameter)]
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.optimizer.lr, betas=betas, fused=True)
        self.tokens_since_fired = torch.zeros(config.sae.d_sae, dtype=torch.int64, device=self.sample.device)
        ranges = config.sae.group_ranges()
        self.scope = ranges[0] if config.temporal.scope == "first" else (0, config.sae.d_sae)
        self.positions = None
        if config.temporal.position_penalty > 0:
            self.positions = PositionPenalty(self.n_positions, self.scope[1], self.sample.device, self.adder)

    def _learns(self, parameter: Tensor) -> bool:
        """All but a batchtopk's threshold, which is found at the end."""
        return self.config.sae.activation == "jumprelu" or parameter is not getattr(self.sae, "threshold", None)

    @torch.no_grad()
    def step(self, batch: Batch) -> StepResult:
        """One optimiser step.

        Raises RunError, before any weight moves, if loss or gradient is not finite or the loss explodes.
        """
        config, progress = self.config, self.progress
        result = self.gradients(batch)
        W_dec = self.sae.W_dec
        assert W_dec.grad is not None
        if config.optimizer.unit_decoder:
            # Along a unit row the gradient would only be undone by the norm, yet it would feed Adam's moments.
            products = torch.mul(W_dec.grad, W_dec, out=self.workspace.get("rows", *W_dec.shape))
            W_dec.grad.addcmul_(W_dec, products.sum(1)[:, None], value=-1)
        result.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_norm))
        self._guard(result)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate(progress.n_steps, config.steps)
        self.optimizer.step()
        if config.optimizer.unit_decoder:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        if config.sae.activation == "jumprelu":
            self.sae.threshold.clamp_(min=0)
        self.count(batch)
        return result

    def count(self, batch: Batch) -> None:
        """A batch is done with, used or not: schedules and ends go by batches seen."""
        self.progress.n_steps += 1
        self.progress.n_tokens += batch.n_whole
        self.progress.n_left_out += batch.n_left_out

    @torch.no_grad()
    def gradients(self, batch: Batch) -> StepResult:
        """Losses of a batch, with the gradients left in the parameters' `.grad`."""
        if self.config.optimizer.gradients == "autograd":
            from tcsae.train.reference import autograd_gradients  # which imports this module

            return autograd_gradients(self, batch)
        sae, config, n = self.sae, self.config, batch.n_whole
        x = torch.mul(batch.x, self.scale, out=self.workspace.get("x", *batch.x.shape))
        jump = config.sae.activation == "jumprelu"
        state = encode(sae, x, self.workspace, config.sparsity.bandwidth / 2 if jump else 0.0, n, self.adder)
        losses = {"reconstruction": reconstruct(sae, state, config.group_weights, self.workspace)}
        grad = code_gradient(sae, state, self.workspace)
        weight = self._add_terms(losses, state, batch, grad)
        threshold_grad = None
        if jump:
            losses["l0_loss"], threshold_grad = threshold_gradient(sae, state, grad, config)
        dead = self.dead()
        fired, n_active = set_gradients(sae, state, grad, threshold_grad, config.sparsity.l1 / n)
        self.tokens_since_fired.add_(n).masked_fill_(self.adder.any(fired), 0)
        if config.dead.aux_weight and config.sae.activation != "gelu":
            aux_k = min(config.dead.aux_k, config.sae.d_sae)
            losses["aux"] = auxk(sae, state, batch, dead, aux_k, config.dead.aux_weight)
        for parameter in self.parameters:
            assert parameter.grad is not None
            self.adder.tensor(parameter.grad)
        return StepResult(losses, state, self.adder.number(n_active) / n, temporal_weight=weight)

    def _add_terms(self, losses: dict[str, float], state: Pass, batch: Batch, grad: Tensor) -> float:
        """L1, temporal term and position penalty: values into `losses`, gradients onto `grad`."""
        config, code, weight = self.config, state.code, 0.0
        if config.temporal.active and isinstance(code, Tensor) and config.temporal.is_plain:
            # Straight onto the gradient: a buffer of its own would cost a dense code more than the term.
            columns, weight = slice(*self.scope), self._risen(config.temporal.weight)
            pairs = pairs_of(config.temporal, batch)
            value = float(difference_dense(code[:, columns], pairs, grad[:, columns], weight))
            losses["temporal"] = weight * self.adder.number(value)
        elif config.temporal.active:
            value, unit, target, entries = self._temporal(code, batch, grad)
            weight = self.temporal_weight(value, target, unit, entries)
            losses["temporal"] = weight * value
            self._add(grad, unit, weight, code)
        if self.positions is not None:
            if isinstance(code, SparseCode):
                value, unit = self.positions.sparse(code.part(*self.scope)[0], batch)
            else:
                value, unit = self.positions.dense(code[:, slice(*self.scope)], batch)
            losses["position"] = config.temporal.position_penalty * value
            self._add(grad, unit, config.temporal.position_penalty, code)
        if config.sparsity.l1:
            if isinstance(code, SparseCode):
                part = float(l1_sparse(code, config.sparsity.l1, grad, state.n))
            else:  # its gradient is added on the way back through the activation
                assert state.activity is not None
                part = config.sparsity.l1 * state.activity.total / state.n
            losses["l1"] = self.adder.number(part)
        return weight

    def step_seed(self) -> int:
        """Of what a run draws for itself in this step."""
        return hash((self.config.init_seed, self.progress.n_steps)) % 2**32

    def _temporal(self, code: SparseCode | Tensor, batch: Batch, grad: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """Over the scope: value and gradient at weight 1, the reconstruction's gradient, and the code's entries."""
        config, seed = self.config.temporal, self.step_seed()
        if isinstance(code, SparseCode):
            part, at = code.part(*self.scope)
            value, unit = sparse_term(config, part, batch, self.workspace, seed, self.adder)
            return value, unit, grad[at], part.values
        columns = slice(*self.scope)
        value, unit = dense_term(config, code[:, columns], batch, self.workspace, seed, self.adder)
        return value, unit, grad[:, columns], code[:, columns]

    def temporal_weight(self, value: float, target: Tensor, unit: Tensor, code: Tensor) -> float:
        """The weight now: a share of the reconstruction's gradient, or the set one; risen by the warm-up.

        `value` and `unit` are the term and its gradient at weight 1, `target` is the reconstruction's gradient; both
        are with respect to the entries `code`, of which the active ones count. Where nothing but rounding is left of
        the term's gradient (no latent fires twice in a row), it gets no weight: any share would be noise.
        """
        config = self.config.temporal
        if not config.budget:
            return self._risen(config.weight)
        active = code != 0
        norm, size = self.adder.norm(unit * active), self.adder.norm(code)
        if norm * size <= NO_GRADIENT * abs(value):
            return 0.0
        return self._risen(config.budget * self.adder.norm(target * active) / norm)

    def _risen(self, weight: float) -> float:
        return weight * min(
            1.0, (self.progress.n_steps + 1) / max(1.0, self.config.temporal.warmup * self.config.steps)
        )

    def _add(self, grad: Tensor, unit: Tensor, weight: float, code: SparseCode | Tensor) -> None:
        if isinstance(code, SparseCode):
            _, at = code.part(*self.scope)
            grad[at] += weight * unit
        else:
            grad[:, slice(*self.scope)].add_(unit, alpha=weight)

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
        if self.config.sae.activation == "batchtopk":
            parts = [part * self.scale for part in self.sample.split(CALIBRATION_TOKENS)]
            last = [batchtopk_code(sae.pre_activations(part), self.config.sae.k).values for part in parts]
            lowest = [float(values.min()) for values in last if len(values)]
            # The last entry kept has to stay above the threshold: fires on strict >.
            sae.threshold.fill_(0.999999 * sum(lowest) / max(1, len(lowest)))
        sae.fold_scale(self.scale)
        return sae.cpu().eval()
