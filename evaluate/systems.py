"""What is evaluated: an SAE, or a baseline, as a function of activations."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tcsae.evaluate.measures.core import Output, join_codes
from tcsae.evaluate.measures.smoothing import (
    EMA_TOPK,
    HYSTERESIS,
    Smoothing,
    filtered,
    keep_largest,
    smoothing_kernel,
    stay_above,
    stay_topk,
)
from tcsae.shared.sae import whole_sequences
from tcsae.shared.sae.crosscoder import read_out
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.ops import Code
from tcsae.shared.sae.sparse import SparseCode, select_topk, threshold_code
from tcsae.shared.sae.whole_sequences import SequenceAutoencoder

BATCH_CODE_ENTRIES = 8 << 20
"""Of a dense code or of pre-activations, at most: 32 MB."""
PART_TOKENS = 1024
"""Encoded at a time, at most: 12% faster than twice as many, at width 128 with 4096 latents."""

System = Callable[[Float[Tensor, "n d_model"]], Output]
"""Activations in, reconstruction and code out."""


class SaeOutput:
    """An SAE as a system, encoding at most BATCH_CODE_ENTRIES of PART_TOKENS at a time."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Output:
        parts = [(decoded(self.sae, code, part), code) for part, code in code_parts(self.sae, x)]
        x_hats, codes = zip(*parts, strict=True)
        return Output(torch.cat(x_hats) if len(parts) > 1 else x_hats[0], join_codes(list(codes)))


class CrosscoderOutput:
    """A temporal crosscoder, read out on the window that ends at each token."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Float[Tensor, "n d_model"], sequence: Int[Tensor, " n"]) -> Output:
        return Output(*read_out(self.sae, x, sequence_lengths(sequence)))


class WholeSequenceOutput:
    """An SAE of whole sequences: the novel code, and the reconstruction from it and the predicted one."""

    def __init__(self, sae: SequenceAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Float[Tensor, "n d_model"], sequence: Int[Tensor, " n"]) -> Output:
        return Output(*whole_sequences.read_out(self.sae, x, sequence_lengths(sequence)))


class SmoothedOutput:
    """An SAE whose codes are smoothed along each sequence before they are decoded."""

    def __init__(self, sae: SparseAutoencoder, smoothing: Smoothing) -> None:
        self.sae, self.smoothing = sae, smoothing

    def __call__(self, x: Float[Tensor, "n d_model"], sequence: Int[Tensor, " n"]) -> Output:
        code = self.code(x, sequence.unique_consecutive(return_counts=True)[1].cpu().tolist()).to(x.device)
        return Output(decoded(self.sae, code, x), code)

    def code(self, x: Float[Tensor, "n d_model"], lengths: Sequence[int]) -> Code:
        """The smoothed code of consecutive sequences of these lengths, on the CPU: it goes from token to token."""
        kind, value = self.smoothing
        if kind == HYSTERESIS and self.sae.config.activation == "topk":
            n = min(round(value * self.sae.config.k), self.sae.config.d_sae)
            return stay_topk(self._joined(x, lambda part: largest(self.sae, part, n)), lengths, self.sae.config.k)
        if kind == HYSTERESIS:
            threshold = self.sae.learned_threshold.detach()
            lower = torch.minimum(threshold, threshold / value)
            above = self._joined(x, lambda part: threshold_code(self.sae.pre_activations(part), lower))
            return stay_above(above, lengths, threshold.cpu())
        kernel = smoothing_kernel(self.smoothing, max(lengths, default=0))
        made = filtered(join_codes([code for _, code in code_parts(self.sae, x)]).to("cpu"), lengths, kernel)
        return keep_largest(made, self.sae.config.k) if kind == EMA_TOPK and isinstance(made, SparseCode) else made

    def _joined(self, x: Float[Tensor, "n d_model"], encode: Callable[[Tensor], SparseCode]) -> SparseCode:
        joined = join_codes([code for _, code in code_parts(self.sae, x, encode)])
        assert isinstance(joined, SparseCode)
        return joined.to("cpu")


def decoded(sae: SparseAutoencoder, code: Code, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    return sae.decode_sparse(code, x) if isinstance(code, SparseCode) else sae.decode(code, x)


def largest(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], n_kept: int) -> SparseCode:
    """The largest pre-activations of each token, whatever their sign."""
    values, latents = select_topk(sae.pre_activations(x), n_kept)
    offsets = torch.arange(0, values.numel() + 1, n_kept, device=values.device)
    return SparseCode(values.flatten(), latents.flatten(), offsets, sae.config.d_sae, per_token=n_kept)


SequenceSystem = SmoothedOutput | CrosscoderOutput | WholeSequenceOutput
"""Systems whose output at a token depends on other tokens of its sequence."""


def output_of(system: System | SequenceSystem, x: Float[Tensor, "n d_model"], sequence: Int[Tensor, " n"]) -> Output:
    """What a system makes of activations; `sequence` numbers each one's sequence, ascending."""
    return system(x, sequence) if isinstance(system, SequenceSystem) else system(x)


def system_of(sae: SparseAutoencoder, smoothing: Smoothing | None = None) -> System | SequenceSystem:
    """An SAE of any kind as a system."""
    if smoothing is not None:
        return SmoothedOutput(sae, smoothing)
    if isinstance(sae, SequenceAutoencoder):
        return WholeSequenceOutput(sae)
    return CrosscoderOutput(sae) if sae.config.window > 1 else SaeOutput(sae)


def sequence_lengths(sequence: Int[Tensor, " n"]) -> Int[ndarray, " n_sequences"]:
    """Tokens of each sequence that has any."""
    return sequence.unique_consecutive(return_counts=True)[1].cpu().numpy()


def sae_code(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], sequence: Int[Tensor, " n"]) -> Code:
    """An SAE's code of every token, whatever it reads of the token's sequence; made on the SAE's device, then brought
    to that of x.
    """
    if (there := sae.W_dec.device) != x.device:
        return sae_code(sae, x.to(there), sequence.to(there)).to(x.device)
    if isinstance(sae, SequenceAutoencoder):
        return whole_sequences.read_out(sae, x, sequence_lengths(sequence))[1]
    if sae.config.window > 1:
        return read_out(sae, x, sequence_lengths(sequence))[1]
    return join_codes([code for _, code in code_parts(sae, x)])


def sae_on(sae: SparseAutoencoder, device: torch.device | str) -> SparseAutoencoder:
    """The SAE itself on the CPU, elsewhere a copy of it."""
    return sae if torch.device(device).type == "cpu" else copy.deepcopy(sae).to(device)


def code_parts(
    sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], encode: Callable[[Tensor], Code] | None = None
) -> Iterator[tuple[Float[Tensor, "n_part d_model"], Code]]:
    """Activations and their code (by default the SAE's own), at most BATCH_CODE_ENTRIES at a time; at least one part,
    which may be empty.
    """
    if encode is None:
        # Next to no entry of a gelu is zero, so its sparse code would cost three times more.
        encode = sae.encode_sparse if sae.kind.mostly_zero else sae.encode
    for part in x.split(max(1, min(PART_TOKENS, BATCH_CODE_ENTRIES // sae.config.d_sae))):
        yield part, encode(part)
