"""The language model with SAEs at its hooks: the code of a text, and what follows where one latent is changed."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tcsae.evaluate.report.pages.page_files import Included
from tcsae.harvest.language_model import LanguageModel, load_bridge
from tcsae.shared.base.errors import ConfigError, unknown
from tcsae.shared.lm.token_text import TokenTexts
from tcsae.shared.sae.module import Edit, SparseAutoencoder, edit_difference
from tcsae.shared.store.reader import Store

MAX_TOKENS = 512
"""Of a text: more is refused."""
MAX_CONTINUED = 48
PER_TOKEN = 64
"""Latents that are listed of a token, the largest first."""
N_CHANGED = 6
"""Predictions that are listed of those that change most."""
KINDS = ("ablate", "clamp", "steer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What is done to one latent, at every position that its SAE applies to."""

    kind: str
    """ablate: its value becomes 0; clamp: it becomes `value`; steer: `value` is added to it."""
    latent: int
    value: float = 0.0

    @property
    def edit(self) -> Edit:
        amounts = {"ablate": Edit("set", 0.0), "clamp": Edit("set", self.value), "steer": Edit("add", self.value)}
        return amounts[self.kind]


class Reading(NamedTuple):
    """A text as one SAE sees it."""

    ids: list[int]
    latents: list[list[tuple[int, float]]]
    """Of each token (latent, value), largest first, PER_TOKEN at most."""
    n_active: list[int]


class Outcome(NamedTuple):
    """What follows from a change."""

    kl: list[float]
    """Of each token: the divergence of the changed next-token predictions from the clean ones, in nats."""
    promoted: list[tuple[int, float]]
    """(token, change of its probability) of the next token after the text."""
    suppressed: list[tuple[int, float]]
    clean: list[int]
    """The continuation, most likely token by most likely token."""
    changed: list[int]


class LiveModel:
    """One language model, its tokenizer, and the SAEs of a report by name. One call at a time."""

    def __init__(self, store: Store, runs: Sequence[Included], model: LanguageModel) -> None:
        self.runs = {one.name: one for one in runs}
        self.texts = TokenTexts(store)
        self._tokenizer = model.tokenizer()
        self._bridge = load_bridge(model)
        config = model.config().get_text_config()
        self.limit = min(MAX_TOKENS, int(getattr(config, "max_position_embeddings", MAX_TOKENS)))
        self.begins = self._tokenizer.bos_token_id if store.manifest.recipe.sequences.prepend_bos else None
        self._lock = threading.Lock()

    def ids(self, text: str) -> list[int]:
        """The tokens of a text. Raises ConfigError for none or too many."""
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ([] if self.begins is None else [self.begins]) + list(encoded)
        if not encoded or len(ids) > self.limit:
            raise ConfigError(f"The text has {len(ids)} tokens; give 1 to {self.limit}.")
        return ids

    @property
    def readable(self) -> list[str]:
        """Names of the SAEs that `read` takes."""
        return [name for name, one in self.runs.items() if not one.loaded.sae.config.reads_neighbours]

    def run(self, name: str) -> Included:
        """Raises ConfigError for an unknown one."""
        if name not in self.runs:
            raise ConfigError(unknown("run", name, self.runs))
        if name not in self.readable:
            raise ConfigError(f"{name} has codes of several tokens: it cannot be read or changed token by token.")
        return self.runs[name]

    def read(self, name: str, text: str) -> Reading:
        """The code of every token of a text. Raises ConfigError for an unknown run or a text without tokens."""
        one, ids = self.run(name), self.ids(text)
        with self._lock, torch.inference_mode():
            caught: list[Tensor] = []
            self._forward(ids, one.hook, lambda x: _kept(x, caught))
            code = one.loaded.sae.encode(caught[0][0].float())
        values, latents = code.topk(min(PER_TOKEN, code.shape[1]), dim=1)
        pairs = [
            [(latent, round(value, 4)) for latent, value in zip(*row, strict=True) if value > 0]
            for row in zip(latents.tolist(), values.tolist(), strict=True)
        ]
        return Reading(ids, pairs, (code > 0).sum(1).tolist())

    def change(self, name: str, text: str, change: Change, n_continued: int) -> Outcome:
        """What a change does to the predictions and to the continuation. Raises ConfigError as `read` does."""
        one, ids = self.run(name), self.ids(text)
        sae = one.loaded.sae
        if change.kind not in KINDS:
            raise ConfigError(unknown("change", change.kind, KINDS))
        if not 0 <= change.latent < sae.config.d_sae:
            raise ConfigError(f"Latent {change.latent}: {name} has latents 0 to {sae.config.d_sae - 1}.")
        n_continued = max(0, min(n_continued, MAX_CONTINUED, self.limit - len(ids)))

        def changed(x: Tensor) -> Tensor:
            return x + changed_by(sae, x, change, one.skip_first).to(x.dtype)

        with self._lock, torch.inference_mode():
            clean = self._forward(ids, one.hook, None).log_softmax(-1)
            after = self._forward(ids, one.hook, changed).log_softmax(-1)
            moved = after[-1].exp() - clean[-1].exp()
            return Outcome(
                (clean.exp() * (clean - after)).sum(-1).clamp(min=0).tolist(),
                _pairs(moved.topk(N_CHANGED)),
                _pairs(moved.topk(N_CHANGED, largest=False)),
                self._continue(ids, one.hook, None, n_continued),
                self._continue(ids, one.hook, changed, n_continued),
            )

    def _continue(self, ids: list[int], hook: str, edit: Callable[[Tensor], Tensor] | None, n: int) -> list[int]:
        grown = list(ids)
        for _ in range(n):
            grown.append(int(self._forward(grown, hook, edit)[-1].argmax()))
        return grown[len(ids) :]

    def _forward(
        self, ids: Sequence[int], hook: str, edit: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "n vocabulary"]:
        """Logits, where `edit` stands between the hook and all that follows."""
        tokens: Int[Tensor, "1 n"] = torch.tensor([list(ids)])
        hooks = [] if edit is None else [(hook, lambda value, hook: edit(value))]  # noqa: ARG005
        with self._bridge.hooks(fwd_hooks=hooks):
            logits: Any = self._bridge.forward(tokens, return_type="logits", use_cache=False)
        return logits[0].float()


def _kept(x: Tensor, caught: list[Tensor]) -> Tensor:
    caught.append(x.clone())  # later layers may work in place
    return x


def changed_by(
    sae: SparseAutoencoder, x: Float[Tensor, "batch position d_model"], change: Change, skip_first: int = 0
) -> Float[Tensor, "batch position d_model"]:
    """What a change adds to x from position `skip_first` on."""
    flat = x.float().flatten(0, 1)
    result = edit_difference(sae, sae.encode_sparse(flat), flat, {change.latent: change.edit}).reshape(x.shape)
    result[:, :skip_first] = 0
    return result


def _pairs(top: Any) -> list[tuple[int, float]]:
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
