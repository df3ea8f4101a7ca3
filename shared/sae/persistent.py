"""Persistent SAE (arXiv:2607.17117), on whole sequences: every latent has a state that decays at a rate it learns.

With a = TopK(relu((x - b_dec) W_enc + b_enc)) and lam = sigmoid(decay_logit), both [d_sae], from h_0 = 0 on,

    h_t = lam * h_{t-1} + (1 - lam) * a_t,    x_hat_t = h_t W_dec + b_dec

(1 - lam) a_t is the *novel* code, sparse; lam h_{t-1} is the *predicted* one, dense, a function of the past alone. At
lam = 0 it is a TopK SAE. The recurrence is the paper's; how it parametrises lam and where that starts was not to be
had: the sigmoid keeps lam in 0..1, and init.decay is lam's first value.
"""

import itertools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tcsae.shared.base.device import to_device
from tcsae.shared.base.windows import positions
from tcsae.shared.sae.activations import Encoded, Encoder, encoded
from tcsae.shared.sae.layout import SaeConfig
from tcsae.shared.sae.ops import EncoderWeights, decode_code
from tcsae.shared.sae.sparse import SparseCode
from tcsae.shared.sae.whole_sequences import SequenceAutoencoder

NOTHING = 1e-30
"""A state that has decayed to this is 0: at 1e-38 numbers leave the normal range, and matrix products take 5 times as
long."""


class PersistentAutoencoder(SequenceAutoencoder):
    """A TopK SAE whose latents keep a share of their state from token to token."""

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.decay_logit = nn.Parameter(torch.zeros(config.d_sae))

    @property
    def decay(self) -> Float[Tensor, " d_sae"]:
        """lam: the share of its state that a latent keeps from one token to the next."""
        return self.decay_logit.sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"decay_logit": self.decay_logit.detach()}

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The novel code, as a dense tensor."""
        return super().encode(x) * (1 - self.decay)

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseCode:
        """The novel code's entries, of the tokens of all leading axes laid end to end."""
        return self._novel(super().encode_sparse(x))

    def forward(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        """The reconstruction from both codes."""
        n, length, _ = x.shape
        novel, predicted = self.codes(x.flatten(0, 1), np.full(n, length))
        return self.decode(novel.dense() + predicted).view_as(x)

    def codes(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[SparseCode, Float[Tensor, "n d_sae"]]:
        """(novel, predicted) codes of sequences laid end to end, with gradients."""
        novel, order = self._novel(self._trained(x)), TimeOrder(lengths, x.device)
        h = run_states(novel, self.decay, order)
        return novel, torch.where(order.first[:, None], 0.0, self.decay * h[order.before])

    def train_pass(
        self, x: Float[Tensor, "n d_model"], lengths: Int[ndarray, " n_sequences"]
    ) -> tuple[Encoded, Float[Tensor, "n d_model"]]:
        """Novel code and reconstruction, with gradients."""
        novel, order = self._novel(self._trained(x)), TimeOrder(lengths, x.device)
        x_hat = decode_code(run_states(novel, self.decay, order), self.W_dec, self.b_dec)
        return encoded(novel), x_hat[order.row]

    def _trained(self, x: Float[Tensor, "n d_model"]) -> SparseCode:
        """a, with gradients to the encoder and both biases."""
        weights = EncoderWeights(self.W_enc_rows, self.b_enc, self.b_dec)
        code = self.kind.train(Encoder(x - self.b_dec.detach(), weights, self.config.k)).code
        assert isinstance(code, SparseCode)
        return code

    def _novel(self, code: SparseCode) -> SparseCode:
        return code.with_values(code.values * (1 - self.decay).index_select(0, code.columns))


class TimeOrder:
    """Rows of sequences in order of position, longer sequences first: the rows of a position follow one another, and
    those that go on at the next are the first of them, in the same order.
    """

    row: Int[Tensor, " n"]
    """Of each token of sequences laid end to end."""
    first: Tensor
    """Whether a token is its sequence's first, bool [n]."""
    before: Int[Tensor, " n"]
    """Row of the token before; of a first token, any."""
    counts: list[int]
    """Sequences that have a token at each position."""

    def __init__(self, lengths: Int[ndarray, " n_sequences"], device: torch.device) -> None:
        longest = int(lengths.max(initial=0))
        rank = np.empty(len(lengths), np.int64)
        rank[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
        counts = (lengths > np.arange(longest)[:, None]).sum(1)
        starts = np.cumsum(counts) - counts
        position, rank = positions(lengths), np.repeat(rank, lengths)
        row, before = starts[position] + rank, starts[np.maximum(position - 1, 0)] + rank
        self.row, self.before, self.first = (to_device(one, device) for one in (row, before, position == 0))
        self.counts = counts.tolist()


def run_states(code: SparseCode, decay: Float[Tensor, " d_sae"], order: TimeOrder) -> Float[Tensor, "n d_sae"]:
    """h_t = decay * h_{t-1} + code_t of every token, in the rows of `order`, with gradients to entries and decay."""
    return _States.apply(code.values, decay, code, order)


class _States(torch.autograd.Function):
    """A position at a time, in place on rows that follow one another: an operation of [n_sequences, d_sae] each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decay: Tensor, code: SparseCode, order: TimeOrder) -> Tensor:
        h = values.new_zeros(code.n_tokens, code.d_sae)
        at = order.row[code.rows] * code.d_sae + code.columns
        h.view(-1).index_copy_(0, at, values)
        states = h.split(order.counts)
        for before, now in itertools.pairwise(states):
            now.addcmul_(before[: len(now)], decay)
            torch.hardshrink(now, NOTHING, out=now)
        ctx.save_for_backward(h, decay, at)
        ctx.counts = order.counts
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With D_t = dL/dh_t + decay * D_{t+1}: D at the entries, and sum D_t * h_{t-1}."""
        (h, decay, at), grad = ctx.saved_tensors, grads[0]
        D = torch.empty_like(h)
        given, states, carried = (one.split(ctx.counts) for one in (grad, h, D))
        total = h.new_zeros(ctx.counts[0] if ctx.counts else 0, len(decay))
        for t in range(len(states) - 1, -1, -1):
            n_on = ctx.counts[t + 1] if t + 1 < len(states) else 0
            carried[t][n_on:].copy_(given[t][n_on:])
            if n_on:
                torch.addcmul(given[t][:n_on], carried[t + 1], decay, out=carried[t][:n_on])
            if t:
                total[: ctx.counts[t]].addcmul_(carried[t], states[t - 1][: ctx.counts[t]])
        return D.view(-1)[at], total.sum(0), None, None
