"""What all measures of latents start from: the tokens looked at, and one SAE's code and error on them."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from tcsae.evaluate.probing.suite import Tokens
from tcsae.evaluate.systems import output_of, system_of
from tcsae.shared.sae.module import SparseAutoencoder, layer_normed
from tcsae.shared.sae.sparse import SparseCode

MIN_FIRINGS = 10
"""Tokens from which on a latent counts as live here."""


class Sequences:
    """Whole documents of the eval split, all their positions in memory; shared by all SAEs that read one hook."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        split, n = tokens.split, tokens.n_sequences
        chunk = max(1, split.store.sequences_per_chunk)
        blocks = [split.read(tokens.hook, start, min(start + chunk, n)) for start in range(0, n, chunk)]
        self.whole: Float[ndarray, "n_sequences sequence_length d_model"] = np.concatenate(blocks)
        self.lengths: Int[ndarray, " n_sequences"] = split.lengths[:n].astype(np.int64)
        self.ids: Int[ndarray, "n_sequences sequence_length"] = split.tokens[:n]
        self.sequence: Int[ndarray, " n"] = np.repeat(np.arange(n), tokens.lengths)
        """Of each counted token."""
        self.starts: Int[ndarray, " n_sequences_plus_1"] = np.append(0, tokens.lengths.cumsum())
        """The first counted token of each sequence."""
        self.position: Int[ndarray, " n"] = (
            np.arange(len(self.sequence)) - self.starts[self.sequence] + tokens.skip_first
        )

    @cached_property
    def x(self) -> Float[Tensor, "n d_model"]:
        return torch.from_numpy(self.whole[self.sequence, self.position]).float()

    @property
    def n_predictions(self) -> int:
        """Counted positions whose next token lies in the same sequence."""
        return int(np.maximum(self.tokens.lengths - 1, 0).sum())

    @cached_property
    def total_variation(self) -> float:
        """Sum of squares of x around its mean."""
        wide = self.x.double()
        return float((wide - wide.mean(0)).square().sum())

    def activations(self, sequence: int) -> Float[Tensor, "length d_model"]:
        return torch.from_numpy(self.whole[sequence, : self.lengths[sequence]]).float()

    def targets(self, sequence: int) -> Int[Tensor, " length_less_1"]:
        """The token that each position but the last predicts."""
        return torch.from_numpy(self.ids[sequence, 1 : self.lengths[sequence]].astype(np.int64))


class Coded:
    """One SAE on the counted tokens: its code, what entries add to the reconstruction, and what that leaves of x."""

    def __init__(self, sequences: Sequences, sae: SparseAutoencoder) -> None:
        self.sequences, self.sae = sequences, sae
        x = sequences.x
        with torch.inference_mode():
            output = output_of(system_of(sae), x, torch.from_numpy(sequences.sequence))
        code = output.code
        assert isinstance(code, SparseCode), "dense codes are refused before"
        values, latents, offsets = (one.numpy() for one in (code.values, code.latents, code.offsets))
        on = values != 0  # a top-k that found fewer than k has explicit zeros
        counts = np.append(0, on.cumsum())[offsets]
        self.code = csr_array((values[on], latents[on], counts), shape=(len(x), code.d_sae))
        self.code.sort_indices()
        self.error: Float[ndarray, "n d_model"] = (x - output.x_hat).numpy()
        self._gain = self._gain_of(x)

    def _gain_of(self, x: Float[Tensor, "n d_model"]) -> Float[ndarray, " n"] | None:
        """What each token's decoded code is multiplied by; None: 1."""
        if self.sae.config.layer_norm == "in_out":
            return layer_normed(x)[2].squeeze(1).numpy()
        scale = self.sae.input_scale
        return None if scale == 1 else np.full(len(x), 1 / scale, np.float32)

    @cached_property
    def added(self) -> csr_array:
        """The code in units of the decoder rows: xhat without its biases is `added @ rows`."""
        if self._gain is None:
            return self.code
        scaled = self.code.copy()
        scaled.data = scaled.data * np.repeat(self._gain, np.diff(scaled.indptr))
        return scaled

    @cached_property
    def by_latent(self) -> csc_array:
        return csc_array(self.added)

    @property
    def rows(self) -> Float[ndarray, "d_sae d_model"]:
        return self.sae.W_dec.detach().cpu().float().numpy()

    @cached_property
    def n_firings(self) -> Int[ndarray, " d_sae"]:
        return np.diff(self.by_latent.indptr).astype(np.int64)

    @cached_property
    def widths(self) -> Float[ndarray, " d_sae"]:
        """Variance of what each latent adds to the reconstruction, summed over dimensions."""
        n = self.code.shape[0]
        mean, square = (one.sum(0) / n for one in (self.added, self.added.power(2)))
        return (square - mean**2) * np.square(self.rows).sum(1)

    @cached_property
    def live(self) -> Int[ndarray, " n_live"]:
        return np.flatnonzero(self.n_firings >= MIN_FIRINGS)

    def firing(self, latents: Sequence[int]) -> Int[ndarray, " n_firing"]:
        """Tokens on which any of some latents is on, ascending."""
        columns = [
            self.by_latent.indices[self.by_latent.indptr[one] : self.by_latent.indptr[one + 1]] for one in latents
        ]
        return np.unique(np.concatenate(columns)) if columns else np.zeros(0, np.int64)

    def contribution(self, latents: Sequence[int], first: int, stop: int) -> Float[ndarray, "n_tokens d_model"]:
        """What some latents add to the reconstruction of tokens first..stop-1."""
        return self.added[first:stop][:, np.asarray(latents)].toarray() @ self.rows[np.asarray(latents)]
