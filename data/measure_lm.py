"""Measure a language model on the documents of `pydocs` that the embedded model never saw.

    python -m tcsae.data.measure_lm [--model FOLDER]

Documents with int(sha256(text)) % 20 == 0 are laid end to end, each after the tokenizer's begin token, and cut into
contexts of 128 tokens. Bits per byte also charge the begin tokens, and compare across tokenizers.
"""

import math
from pathlib import Path

import click
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tcsae.shared.base.errors import ModelError, TcsaeError

CONTEXT = 128


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Int[Tensor, " n_tokens"]:
    """int64 token ids of the documents end to end, each after the begin token. Raises ModelError if there is none."""
    begin = tokenizer.bos_token_id
    if begin is None:
        raise ModelError("The tokenizer has no begin token; the measure puts one before every document.")
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (begin, *row)])


def held_out_nats(model: PreTrainedModel, ids: Int[Tensor, " n_tokens"], context: int = CONTEXT) -> float:
    """Mean cross-entropy in nats per token over contexts of `context` tokens that do not overlap.

    The first token of a context is never predicted, a last incomplete context is left out. Leaves the model in
    evaluation mode.
    """
    model.eval()
    rows = ids[: len(ids) // (context + 1) * (context + 1)].view(-1, context + 1)
    with torch.inference_mode():
        losses = [
            F.cross_entropy(model(part[:, :-1]).logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
            for part in rows.split(32)
        ]
    return sum(losses) / (rows.shape[0] * context)


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """Nats per token as bits per byte of the text that the tokens stand for."""
    return nats_per_token / math.log(2) * n_tokens / n_bytes


@click.command()
@click.option(
    "--model",
    "model_path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face checkpoint with its tokenizer.  [default: the embedded model]",
)
def main(model_path: Path | None) -> None:
    """Print nats per token and bits per byte on the held-out documents of pydocs, and how much text that is."""
    try:
        click.echo(measure(model_path))
    except TcsaeError as error:
        raise click.ClickException(str(error)) from error


def measure(model_path: Path | None) -> str:
    """The figures as text. Raises ModelError for a missing embedded model."""
    import datasets

    from tcsae.data.model import EVAL_EVERY, embedded_model_path, is_eval
    from tcsae.data.pydocs import pydocs_file, pydocs_revision

    path = model_path or embedded_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    corpus = datasets.load_dataset("json", data_files=str(pydocs_file()), split="train")
    texts = [text for text in corpus["text"] if is_eval(text)]
    ids = token_stream(tokenizer, texts)
    all_ids = token_stream(tokenizer, list(corpus["text"]))
    n_bytes = sum(len(text.encode()) for text in texts)
    nats = held_out_nats(model, ids)
    rule = f"int(sha256(text)) % {EVAL_EVERY} == 0"
    return (
        f"pydocs {pydocs_revision()}: {len(corpus)} documents, {len(all_ids)} tokens\n"
        f"held out ({rule}): {len(texts)} documents, {len(ids)} tokens, {n_bytes} bytes\n"
        f"{nats:.3f} nats per token, {bits_per_byte(nats, len(ids), n_bytes):.3f} bits per byte"
    )


if __name__ == "__main__":
    main()
