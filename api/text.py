"""What an SAE makes of a text that a live model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tcsae.api.attach import attach, has_place
from tcsae.api.shading import ShadedText
from tcsae.shared.base.errors import ConfigError, DataError, ModelError
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.sparse import SparseCode

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult

    from tcsae.harvest.language_model import LanguageModel

SHOWN = 5
"""Latents that are shown when none is named."""


class Peak(NamedTuple):
    """A latent's strongest firing in a text."""

    latent: int
    value: float
    position: int
    token: str


@dataclass(frozen=True, repr=False)
class TextActivations:
    """The code of one text, token by token. Printed, or as a cell's value in a notebook: the text, shaded by latent."""

    ids: Int[Tensor, " n"]
    tokens: Sequence[str]
    """Their texts."""
    code: SparseCode
    skip_first: int
    """First positions that the SAE was not trained on: they are in the code, and in nothing else here."""

    def latent(self, latent: int) -> Float[Tensor, " n"]:
        """A latent's value at each token. Raises ConfigError for one that the SAE has not."""
        if not 0 <= latent < self.code.d_sae:
            raise ConfigError(f"Latent {latent}: this SAE has latents 0 to {self.code.d_sae - 1}.")
        values = self.code.values.new_zeros(len(self.ids))
        at = self.code.latents == latent
        values[self.code.rows[at]] = self.code.values[at]
        values[: self.skip_first] = 0
        return values

    def top(self, n: int = SHOWN) -> list[Peak]:
        """The n latents with the largest values, each where it has it."""
        counted = (self.code.rows >= self.skip_first) & (self.code.values > 0)
        order = (self.code.values * counted).argsort(descending=True, stable=True)[: int(counted.sum())]
        peaks: dict[int, Peak] = {}
        for at in order.tolist():
            latent, position = int(self.code.latents[at]), int(self.code.rows[at])
            if latent not in peaks:
                peaks[latent] = Peak(latent, float(self.code.values[at]), position, self.tokens[position])
                if len(peaks) == n:
                    break
        return list(peaks.values())

    def shaded(self, *latents: int) -> list[ShadedText]:
        """The text shaded by each of these latents, by default by those with the largest values."""
        texts = []
        for latent in latents or [peak.latent for peak in self.top()]:
            values = self.latent(latent)
            peak = float(values.max()) if len(values) else 0.0
            shares = (values.clamp(min=0) / (peak or 1.0)).tolist()
            texts.append(ShadedText(self.tokens, shares, f"latent {latent}, peak {peak:.3g}"))
        return texts

    def to_pandas(self) -> "pd.DataFrame":
        """A row for each active latent of each token."""
        import pandas as pd

        on = (self.code.values > 0) & (self.code.rows >= self.skip_first)
        rows, latents = self.code.rows[on].tolist(), self.code.latents[on].tolist()
        values = {"position": rows, "token": [self.tokens[row] for row in rows], "latent": latents}
        return pd.DataFrame(values | {"value": self.code.values[on].tolist()})

    def __repr__(self) -> str:
        return "\n".join(map(str, self.shaded())) or "no latent is active"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield from self.shaded()

    def _repr_html_(self) -> str:
        return "".join(one._repr_html_() for one in self.shaded()) or "no latent is active"


@torch.no_grad()
def activations(
    sae: SparseAutoencoder,
    model: "nn.Module | str | LanguageModel",
    text: str,
    *,
    hook: str | None = None,
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
) -> TextActivations:
    """Run a text through a live model and the SAE: its code, and the text shaded by the latents that are on.

    `model`: as in `attach`, or a name as `tcsae.harvest` takes it (embedded, a folder, a Hub id). `tokenizer`: default
    the model's. `prepend_bos`: default as the SAE was trained.
    Raises DataError for a text without a token, ModelError if model, tokenizer or hook cannot be had.
    """
    if not isinstance(model, nn.Module):
        model, tokenizer = _loaded(model, tokenizer, hook or sae.metadata.hook)
    tokenizer = tokenizer or _tokenizer_of(model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError("The text has no token. Give some.")
    if sae.metadata.prepend_bos if prepend_bos is None else prepend_bos:
        if tokenizer.bos_token_id is None:
            raise ModelError("The tokenizer has no BOS token to begin the text with. Give prepend_bos=False.")
        ids = [tokenizer.bos_token_id, *ids]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with attach(sae, model, hook) as live:
        model(tokens)
    texts = TokenTexts.of(tokenizer)
    return TextActivations(tokens[0].cpu(), [texts[one] for one in ids], live.code.to("cpu"), live.skip_first)


def _loaded(model: "str | LanguageModel", tokenizer: Any, hook: str | None) -> tuple[nn.Module, Any]:
    """A named model: the plain one where `hook` can be found in it, else TransformerLens' bridge."""
    from tcsae.harvest.language_model import find_model, load_bridge, load_plain
    from tcsae.shared.lm.tail import TailError

    named = find_model(model) if isinstance(model, str) else model
    tokenizer = tokenizer or named.tokenizer()
    try:
        plain = load_plain(named)
    except TailError:
        return load_bridge(named), tokenizer
    return (plain if hook and has_place(plain, hook) else load_bridge(named, plain=plain)), tokenizer


def _tokenizer_of(model: nn.Module) -> Any:
    if (tokenizer := getattr(model, "tokenizer", None)) is not None:
        return tokenizer
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"The model's tokenizer is not at {name or 'any place'}. Give tokenizer=.") from error
