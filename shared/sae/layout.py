"""What an SAE is, where it comes from, and the files that say so: SAELens' layout and our record."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.base.files import file_digest, json_digest, write_atomic, write_json
from tcsae.shared.sae.activations import KINDS

WEIGHTS, CONFIG, RECORD = "sae_weights.safetensors", "cfg.json", "tcsae.json"
METRICS = "metrics.jsonl"
INPUT_SCALE = "activation_normalization_factor"
"""In cfg.json: what x is multiplied by before a TFA reads it."""
SAELENS_LAYOUT = "6.0.0"
"""The SAELens version whose file layout is written; from 6 on, cfg.json has nested metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeConfig:
    """What one sparse autoencoder is: enough to rebuild it, nothing about how it was trained."""

    d_model: int
    """Width of the activations it reads."""
    d_sae: int = 4096
    """Number of latents."""
    activation: str = "topk"
    """A name in `tcsae.shared.sae.activations.KINDS`."""
    k: int = 32
    """Latents kept per token: exactly (topk), on average (batchtopk), or aimed at (jumprelu)."""
    groups: tuple[float, ...] = (1.0,)
    """Shares of the latents, first to last; with several, each prefix learns to reconstruct alone (matryoshka)."""
    layer_norm: Literal["none", "in", "in_out"] = "none"
    """in: the encoder reads layer-normed x (the paper's run 4); in_out: the decoder's output is also scaled back."""
    window: int = 1
    """Consecutive positions that one code stands for; above 1 a temporal crosscoder, with an encoder and a decoder row
    for each latent and position."""
    predictor: Literal["none", "attention", "past", "decay"] = "none"
    """attention: a code predicted from earlier positions' codes besides the novel TopK code (TFA); past: the same
    without a look at the present position. decay: latents keep a learned share of their state (persistent SAE)."""
    n_heads: int = 4
    """Of an attention, as the two below."""
    n_layers: int = 1
    bottleneck: int = 1
    """How many times narrower than d_sae queries and keys are."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_sae", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sae.{name}={getattr(self, name)}: must be at least 1.")
        if self.activation not in KINDS:
            raise ConfigError(unknown("sae.activation", self.activation, KINDS))
        if KINDS[self.activation].uses_k and not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"sae.k={self.k}: must lie in 1..sae.d_sae={self.d_sae}. Lower k or raise d_sae.")
        whole = all(share > 0 for share in self.groups) and math.isclose(sum(self.groups), 1.0, abs_tol=1e-6)
        if not whole or any(first == stop for first, stop in self.group_ranges()):
            raise ConfigError(
                f"sae.groups={self.groups}: shares of {self.d_sae} latents, each at least one latent, that sum to 1."
            )
        self._check_predictor()
        if self.window > 1 and self.layer_norm != "none":
            raise ConfigError(
                f"sae.window={self.window} with sae.layer_norm={self.layer_norm!r}: a crosscoder has no layer norm. "
                "Set sae.layer_norm=none."
            )

    def _check_predictor(self) -> None:
        for name in ("n_heads", "n_layers", "bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sae.{name}={getattr(self, name)}: must be at least 1.")
        if self.predictor == "none":
            return
        if self.attends and self.d_sae % (self.n_heads * self.bottleneck):
            raise ConfigError(
                f"sae.d_sae={self.d_sae} is no multiple of sae.n_heads={self.n_heads} times sae.bottleneck="
                f"{self.bottleneck}. Change one of them."
            )
        plain = {"activation": "topk", "groups": (1.0,), "layer_norm": "none", "window": 1}
        if other := next((name for name, value in plain.items() if getattr(self, name) != value), None):
            raise ConfigError(
                f"sae.predictor={self.predictor!r} with sae.{other}={getattr(self, other)!r}: it is for "
                f"sae.{other}={plain[other]!r} alone."
            )

    @property
    def attends(self) -> bool:
        """Whether attention predicts a code (TFA)."""
        return self.predictor in ("attention", "past")

    @property
    def reads_neighbours(self) -> bool:
        """Whether a token's code depends on other tokens of its sequence (crosscoder, TFA, persistent SAE)."""
        return self.window > 1 or self.predictor != "none"

    @property
    def d_in(self) -> int:
        """Width of what the module reads: the window's activations laid end to end."""
        return self.window * self.d_model

    def group_ranges(self) -> list[tuple[int, int]]:
        """(first, stop) of each group's latents."""
        ends = [round(self.d_sae * share) for share in itertools.accumulate(self.groups)]
        return list(itertools.pairwise([0, *ends]))


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeMetadata:
    """Where an SAE comes from and what it may be applied to, as far as its files say it; None: they do not."""

    form: str = "tcsae"
    """Whose format it was read from: tcsae, saelens, dictionary_learning, sparsify or gemma_scope."""
    hook: str | None = None
    """Where in the model its activations come from, as TransformerLens (sparsify: as the model) names it."""
    model: str | None = None
    """The language model."""
    dataset: str | None = None
    """The text."""
    store: str | None = None
    """Content digest of the activation store that it was trained on."""
    context_size: int | None = None
    """Positions of a sequence in training, at most."""
    prepend_bos: bool | None = None
    """Whether every sequence began with the BOS token."""
    skip_first: int = 0
    """First positions of each sequence that training left out: the SAE is not made for them."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """tcsae.json of a run of ours: settings, steps, tokens, versions; empty for others."""

    def to_saelens(self) -> dict[str, Any]:
        """The metadata of cfg.json."""
        values = {
            "model_name": self.model,
            "hook_name": self.hook,
            "dataset_path": self.dataset,
            "context_size": self.context_size,
            "prepend_bos": self.prepend_bos,
            "seqpos_slice": [self.skip_first, None] if self.skip_first and not self.record else None,
        }
        return {key: value for key, value in values.items() if value is not None}


def write_sae(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], record: Mapping[str, Any] | None
) -> None:
    """Write weights, cfg.json and, unless it is None, tcsae.json, with the digests of all, last."""
    (path / RECORD).unlink(missing_ok=True)
    weights = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    write_atomic(path / WEIGHTS, safetensors.torch.save(weights))
    write_json(path / CONFIG, config)
    if record is not None:
        files = {name: file_digest(path / name) for name in (WEIGHTS, CONFIG, METRICS) if (path / name).is_file()}
        write_json(path / RECORD, {**record, "files": files | {RECORD: record_digest(record)}})


def record_digest(record: Mapping[str, Any]) -> str:
    """sha256 of a record without the digests of files, among which this one stands."""
    return json_digest({key: value for key, value in record.items() if key != "files"})


def saelens_config(config: SaeConfig, metadata: dict[str, Any], input_scale: float = 1.0) -> dict[str, Any]:
    """cfg.json as SAELens 6 reads it: a batchtopk SAE infers as a jumprelu one.

    gelu, layer norms, crosscoders, persistent SAEs and predictors of the past alone have no form there: the
    architecture says so, and SAELens refuses it by that name. `input_scale` is a TFA's.
    """
    architecture = KINDS[config.activation].saelens
    special: dict[str, Any] = {}
    if config.activation == "topk":
        special = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    suffix = "" if config.layer_norm == "none" else f"-layer-norm-{config.layer_norm}"
    suffix += f"-crosscoder-{config.window}" if config.window > 1 else ""
    suffix += "-persistent" if config.predictor == "decay" else ""
    if config.attends:
        architecture, suffix = "temporal", "" if config.predictor == "attention" else f"-{config.predictor}"
        special = {
            "normalize_activations": "constant_scalar_rescale",
            INPUT_SCALE: input_scale,
            "n_heads": config.n_heads,
            "n_attn_layers": config.n_layers,
            "bottleneck_factor": config.bottleneck,
            "sae_diff_type": "topk",
            "kval_topk": config.k,
            "tied_weights": True,
        }
    return {
        "architecture": architecture + suffix,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **special,
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "training_architecture": config.activation, **metadata},
    }
