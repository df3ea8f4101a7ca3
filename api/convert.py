"""An SAE as another kind that computes the same, or nearly: decoder rows of norm 1, a threshold in place of a top-k."""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, StoreError
from tcsae.shared.sae.activations import KINDS
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.saelens import GatedAutoencoder
from tcsae.shared.store.counted import CountingRules, counted, norm_median
from tcsae.shared.store.reader import Store

SAMPLE_TOKENS = 32_768
"""Tokens that a threshold is taken from, as at the end of training a batchtopk."""
CHUNK = 2048
SPARE = 4
"""So many times its share of entries is kept of each part of the sample."""


@torch.no_grad()
def fold_decoder_norms(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy whose decoder rows have norm 1 and whose reconstructions are the same: codes take up the norms.

    A row of norm 0 stays. Raises ConfigError where the codes are no multiples of what they were: gelu; topk with rows
    of different norms, which would select others (`to_jumprelu` first).
    """
    _check_plain(sae)
    norms = sae.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    kind = sae.config.activation
    if kind == "gelu":
        raise ConfigError("A gelu SAE's codes do not scale with its decoder's norms: they cannot be folded.")
    if kind == "topk" and not torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-4):
        raise ConfigError(
            f"A topk SAE with decoder rows of norm {norms.min():.3g} to {norms.max():.3g} would select other latents "
            "with the norms folded. Make a jumprelu of it first: tcsae.to_jumprelu."
        )
    folded = copy.deepcopy(sae)
    folded.W_dec.div_(norms[:, None])
    if isinstance(folded, GatedAutoencoder):  # the gate compares with 0: only the magnitude scales
        folded.r_mag.add_(norms.log())
    else:
        folded.W_enc_rows.mul_(norms[:, None])
        if folded.threshold is not None:
            folded.threshold.mul_(norms)
    folded.b_enc.mul_(norms)
    if kind == "batchtopk":  # it has one threshold for all latents
        return _with_activation(folded, "jumprelu")
    return folded


@torch.no_grad()
def to_jumprelu(
    sae: SparseAutoencoder,
    store: Store,
    *,
    hook: str | None = None,
    k: float | None = None,
    n_tokens: int = SAMPLE_TOKENS,
) -> SparseAutoencoder:
    """A copy with one threshold in place of a top-k, so that a token's code depends on no other latent.

    The threshold is that at which L0 is `k` (default: the SAE's own) on about `n_tokens` tokens of the store's train
    split, from the positions that the SAE was trained on. A batchtopk keeps its threshold unless k is given.
    Raises ConfigError for another kind of SAE, StoreError for a store without its hook, or without such a position.
    """
    _check_plain(sae)
    kind = sae.config.activation
    if not KINDS[kind].uses_k:
        raise ConfigError(f"sae.activation={kind!r} selects no k latents. Give a topk, batchtopk or jumprelu.")
    jump = _with_activation(sae, "jumprelu")
    if kind == "topk" or k is not None:
        wanted = float(sae.config.k if k is None else k)
        if not 0 < wanted <= sae.config.d_sae:
            raise ConfigError(f"k={wanted:g}: must lie in 0..{sae.config.d_sae}, above 0.")
        x = _sample(store, _rules(sae, store, hook or sae.metadata.hook), n_tokens)
        if x.shape[1] != sae.config.d_model:
            raise ConfigError(f"The store's activations are {x.shape[1]} wide; the SAE reads {sae.config.d_model}.")
        jump.learned_threshold.fill_(_threshold(sae, x, wanted))
    return jump


def _check_plain(sae: SparseAutoencoder) -> None:
    if sae.config.reads_neighbours:
        raise ConfigError(
            "The codes of a crosscoder, a TFA or a persistent SAE depend on several positions: it has no such form."
        )


def _with_activation(sae: SparseAutoencoder, activation: str) -> SparseAutoencoder:
    config = replace(sae.config, activation=activation)
    made = SparseAutoencoder(config).to(sae.device, sae.dtype)
    state: dict[str, Any] = dict(sae.state_dict())
    state.setdefault("threshold", torch.zeros_like(sae.b_enc))
    made.load_state_dict(state)
    made.metadata, made.input_scale = sae.metadata, sae.input_scale
    return made.eval()


def _rules(sae: SparseAutoencoder, store: Store, hook: str | None) -> CountingRules:
    """Which positions the SAE was trained on; of one that does not say so, all but the first."""
    names = {one.canonical: one.requested for one in store.manifest.recipe.hooks}
    hook = store.hook(names.get(hook, hook) if hook else None)
    data = sae.metadata.record.get("train", {}).get("data")
    if data is None:
        return CountingRules(skip_first=max(1, sae.metadata.skip_first), hook=hook)
    return CountingRules(
        skip_first=data["skip_first"],
        exclude_tokens=tuple(data.get("exclude_tokens") or ()),
        positions=tuple(data.get("positions") or ()),
        max_norm=data.get("max_norm"),
        hook=hook,
    )


def _sample(store: Store, rules: CountingRules, n_tokens: int) -> Float[Tensor, "n d_model"]:
    """About `n_tokens` counted tokens of the train split, from all over it."""
    parts: list[Tensor] = []
    if (store.train.lengths > rules.skip_first).any():
        parts = _parts(store, rules, n_tokens)
    if not sum(map(len, parts)):
        raise StoreError(
            f"{store.location}: no train token counts, {rules}, as in the SAE's training. Give the store that it was "
            "trained on, or one like it."
        )
    return torch.cat(parts)


def _parts(store: Store, rules: CountingRules, n_tokens: int) -> list[Float[Tensor, "_n d_model"]]:
    assert rules.hook is not None, "`_rules` has named it"
    split = store.train
    usable = torch.from_numpy(counted(split, rules.without_norm())) if rules.has_holes else None
    limit = math.inf if rules.max_norm is None else rules.max_norm * norm_median(store, rules.hook)
    parts: list[Tensor] = []
    for batch in store.iterate("train", batch_tokens=CHUNK, hook=rules.hook, skip_first=rules.skip_first):
        taken = batch.valid & (batch.x.norm(dim=2) <= limit)
        if usable is not None:
            position = batch.starts[:, None] + torch.arange(batch.valid.shape[1])
            taken &= usable[batch.sequences[:, None], position.clamp(max=store.sequence_length - 1)]
        parts.append(batch.x[taken])
        if sum(map(len, parts)) >= n_tokens:
            break
    return parts


def _threshold(sae: SparseAutoencoder, x: Float[Tensor, "n d_model"], k: float) -> float:
    """The value that k entries a token, on average, are above."""
    wanted = max(1, round(k * len(x)))
    best: list[Tensor] = []
    for part in x.split(CHUNK):
        flat = sae.pre_activations(part.to(sae.device)).flatten()
        flat = flat[flat > 0]
        best.append(flat.topk(min(len(flat), round(SPARE * k * len(part)))).values)
    values = torch.cat(best).sort(descending=True).values
    if wanted >= len(values):
        return 0.0
    return float((values[wanted - 1] + values[wanted]) / 2)
