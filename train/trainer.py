"""One run in training: its weights, optimiser and step. The backward pass is written out; nothing builds a graph."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.codes import SparseCode, decode, positive_code, topk_code
from tcsae.shared.errors import RunError
from tcsae.shared.sae import SparseAutoencoder
from tcsae.shared.windows import pair_weights
from tcsae.train.config import TrainConfig
from tcsae.train.kernels import LatentOrder, entry_gradients, gelu_backward_, relu_backward_
from tcsae.train.loader import Batch
from tcsae.train.losses import Pairs, l1_dense, l1_sparse, temporal_dense, temporal_sparse

SPARSE_DENSITY = 0.10
"""Below this share of active latents a relu code takes the sparse path (break-even measured at 0.14)."""


class Workspace:
    """Code-sized buffers, made once and shared by all runs of a pass: a fresh one costs more than the work on it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, n: int, width: int) -> Float[Tensor, "n width"]:
        """A contiguous [n, width] view of the buffer `name`, content undefined."""
        if name not in self._buffers or self._buffers[name].numel() < n * width:
            self._buffers[name] = torch.empty(n * width)
        return self._buffers[name][: n * width].view(n, width)

    def zeros(self, n: int, width: int) -> Float[Tensor, "n width"]:
        """An all-zero view; whoever writes to it has to leave it all zero."""
        if "zeros" not in self._buffers or self._buffers["zeros"].numel() < n * width:
            self._buffers["zeros"] = torch.zeros(n * width)
        return self._buffers["zeros"][: n * width].view(n, width)


@dataclass
class StepResult:
    """What a step found out. Losses are means over the batch's tokens, in the units training sees."""

    losses: dict[str, float]
    grad_norm: float
    l0: float
    x: Float[Tensor, "n d_model"]
    error: Float[Tensor, "n d_model"]

    @property
    def loss(self) -> float:
        return sum(self.losses.values())

    def explained_variance(self) -> float:
        """Centred explained variance of this batch."""
        total = (self.x - self.x.mean(0)).square().sum()
        return float(1 - self.error.square().sum() / total)


class Trainer:
    """Trains one SAE, a batch a step. `sample` [n, d_model] sets the input scale and the first decoder bias."""

    def __init__(self, config: TrainConfig, sample: Float[Tensor, "n d_model"], workspace: Workspace) -> None:
        self.config = config
        self.workspace = workspace
        self.scale = math.sqrt(1 / float(sample.square().mean())) if config.input_norm == "unit" else 1.0
        self.sae = initial_sae(config, sample * self.scale)
        self.parameters = [self.sae.W_enc_rows, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        betas = (config.optimizer.beta1, config.optimizer.beta2)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.optimizer.lr, betas=betas, fused=True)
        self.n_steps = 0
        self.n_tokens = 0
        self.tokens_since_fired = torch.zeros(config.sae.d_sae, dtype=torch.int64)

    @torch.no_grad()
    def step(self, batch: Batch) -> StepResult:
        """One optimiser step. Raises RunError, before any weight moves, if the loss or gradient is not finite."""
        result = self.gradients(batch)
        W_dec = self.sae.W_dec
        assert W_dec.grad is not None
        # Along a unit row the gradient would only be undone by the renormalisation, yet it would feed Adam's moments.
        W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        result.grad_norm = float(norm)
        if not math.isfinite(result.loss + result.grad_norm):
            raise RunError(
                f"Step {self.n_steps}: the loss is {result.loss:g}, the gradient's norm {result.grad_norm:g}. "
                "The weights were not touched; lower optimizer.lr."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate(self.n_steps, self.config.steps)
        self.optimizer.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        self.n_steps += 1
        self.n_tokens += len(batch.x)
        return result

    @torch.no_grad()
    def gradients(self, batch: Batch) -> StepResult:
        """Losses of a batch, with the gradients left in the parameters' `.grad`."""
        sae, n = self.sae, len(batch.x)
        d_model, d_sae = self.config.sae.d_model, self.config.sae.d_sae
        x = torch.mul(batch.x, self.scale, out=self.workspace.get("x", n, d_model))
        centred = torch.sub(x, sae.b_dec, out=self.workspace.get("centred", n, d_model))
        pre = torch.addmm(sae.b_enc, centred, sae.W_enc_rows.T, out=self.workspace.get("pre", n, d_sae))
        code = self._sparse_code(pre)
        if code is None:
            return self._dense_gradients(batch, x, centred, pre)
        return self._sparse_gradients(batch, x, centred, code)

    def _sparse_code(self, pre: Float[Tensor, "n d_sae"]) -> SparseCode | None:
        """The code where it is sparse (relu overwrites `pre`), else None."""
        if self.config.sae.activation == "topk":
            return topk_code(pre, self.config.sae.k)
        if self.config.sae.activation == "relu" and int(pre.relu_().count_nonzero()) < SPARSE_DENSITY * pre.numel():
            return positive_code(pre)
        return None

    def _sparse_gradients(self, batch: Batch, x: Tensor, centred: Tensor, code: SparseCode) -> StepResult:
        sae, config, n = self.sae, self.config, len(x)
        error = decode(code, sae.W_dec, sae.b_dec).sub_(x)
        losses = {"reconstruction": float(error.square().sum()) / n}
        grad_x_hat = error * (2 / n)
        grad = entry_gradients(code, grad_x_hat, sae.W_dec)
        if config.l1:
            losses["l1"] = float(l1_sparse(code, config.l1, grad))
        if config.temporal.weight:
            zeros = self.workspace.zeros(n, code.d_sae)
            losses["temporal"] = float(temporal_sparse(code, self._pairs(batch), config.temporal.weight, grad, zeros))
        active = code.values > 0
        grad.mul_(active)  # relu's own gradient: explicit zeros do not move
        order = LatentOrder(code)
        self._set_gradients(
            grad_x_hat,
            order.weighted_rows(code.values, grad_x_hat),
            order.weighted_rows(grad, centred),
            torch.zeros_like(sae.b_enc).index_add_(0, code.latents, grad),
        )
        fired = torch.bincount(code.latents[active], minlength=code.d_sae) > 0
        self._note_fired(fired, n)
        return StepResult(losses, 0.0, float(active.sum()) / n, x, error)

    def _dense_gradients(self, batch: Batch, x: Tensor, centred: Tensor, pre: Tensor) -> StepResult:
        sae, config, n = self.sae, self.config, len(x)
        gelu = config.sae.activation == "gelu"
        code = torch.ops.aten.gelu.out(pre, out=self.workspace.get("code", *pre.shape)) if gelu else pre
        error = torch.addmm(sae.b_dec, code, sae.W_dec).sub_(x)
        losses = {"reconstruction": float(error.square().sum()) / n}
        grad_x_hat = error * (2 / n)
        grad = torch.mm(grad_x_hat, sae.W_dec.T, out=self.workspace.get("grad", *pre.shape))
        if config.l1:
            losses["l1"] = float(l1_dense(code, config.l1, grad))
        if config.temporal.weight:
            losses["temporal"] = float(temporal_dense(code, self._pairs(batch), config.temporal.weight, grad))
        active = (code > 0).sum(0)
        if gelu:
            gelu_backward_(grad, pre)
        else:
            relu_backward_(grad, code)
        self._set_gradients(grad_x_hat, code.T @ grad_x_hat, grad.T @ centred, grad.sum(0))
        self._note_fired(active > 0, n)
        return StepResult(losses, 0.0, float(active.sum()) / n, x, error)

    def _set_gradients(self, grad_x_hat: Tensor, grad_W_dec: Tensor, grad_W_enc: Tensor, grad_b_enc: Tensor) -> None:
        self.sae.W_dec.grad = grad_W_dec
        self.sae.W_enc_rows.grad = grad_W_enc
        self.sae.b_enc.grad = grad_b_enc
        # b_dec is added to the reconstruction and taken from the encoder's input.
        self.sae.b_dec.grad = grad_x_hat.sum(0) - grad_b_enc @ self.sae.W_enc_rows

    def _pairs(self, batch: Batch) -> Pairs:
        window = self.config.temporal.window
        weights = pair_weights(batch.lengths, window)
        return Pairs(torch.from_numpy(weights / max(1, weights.sum())).to(batch.x.dtype))

    def dead_fraction(self) -> float:
        """Share of latents that have not fired for a tenth of the run's tokens, or 10M if that is less."""
        per_step = self.n_tokens / max(1, self.n_steps)
        limit = min(10_000_000, 0.1 * per_step * self.config.steps)
        return float((self.tokens_since_fired > limit).float().mean())

    def _note_fired(self, fired: Tensor, n: int) -> None:
        self.tokens_since_fired.add_(n).masked_fill_(fired, 0)

    def finished_sae(self) -> SparseAutoencoder:
        """A copy that reads unscaled activations."""
        sae = SparseAutoencoder(self.config.sae)
        sae.load_state_dict(self.sae.state_dict())
        sae.fold_scale(self.scale)
        return sae.eval()


@torch.no_grad()
def initial_sae(config: TrainConfig, sample: Float[Tensor, "n d_model"]) -> SparseAutoencoder:
    """The SAE before the first step; `sample` is in the units that training sees. Decoder rows have norm 1."""
    sae = SparseAutoencoder(config.sae)
    generator = torch.Generator().manual_seed(config.init_seed)
    if config.init == "xavier":
        torch.nn.init.xavier_normal_(sae.W_enc_rows, generator=generator)
        torch.nn.init.xavier_normal_(sae.W_dec, generator=generator)
    else:
        sae.W_dec.normal_(generator=generator)
        sae.b_dec.copy_(sample.mean(0))
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    if config.init == "transpose":
        sae.W_enc_rows.copy_(sae.W_dec)
    return sae
