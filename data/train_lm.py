"""Train the embedded language model: a 6-layer GPT-NeoX (Pythia's architecture) on Python documentation.

    python -m tcsae.data.train_lm --out FOLDER --minutes 80

The corpus is the raw stage of `pydocs`: docstrings and pydoc topics of at least 200 characters, each text once. The
shipped weights were made under that rule, before there was one against near-duplicates; so some held-out documents have
a near-duplicate in training (`python -m tcsae.data.pydocs` counts them). A document is held out iff
int(sha256(text)) % 20 == 0: neither the tokenizer nor the weights ever see it.

Writes a Hugging Face checkpoint (float16), its tokenizer, and log.jsonl. The learning rate follows the clock, so two
machines do not make the same weights.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tcsae.data.measure_lm import CONTEXT, bits_per_byte, held_out_nats, token_stream
from tcsae.data.model import is_eval
from tcsae.data.pydocs import read_installed

END = "<|endoftext|>"
"""Id 0: begin, end and padding, as in Pythia."""

BATCH_SIZE = 24
PEAK_RATE = 3e-3
WARM_UP_STEPS = 200
LOG_EVERY = 500
LOG_TOKENS = 40_000
"""Held-out tokens measured for each line of the log; the last line measures all."""


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens that can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def new_model(d_model: int, vocabulary: int) -> GPTNeoXForCausalLM:
    """An untrained model: 6 layers, 4 heads, rotary on a quarter of each, context 256."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=d_model,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=4 * d_model,
            vocab_size=vocabulary,
            max_position_embeddings=256,
            rotary_pct=0.25,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def learning_rate(step: int, elapsed: float) -> float:
    """Linear warm-up over 200 steps, times a cosine from 1 to 0.05 over the time given (`elapsed` from 0 to 1)."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * elapsed))
    return PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * cosine


def train(
    model: GPTNeoXForCausalLM,
    ids: Int[Tensor, " n_tokens"],
    minutes: float,
    on_step: Callable[[int, float], None],
) -> int:
    """Train for `minutes` on random contexts of `ids` (int64); calls on_step(steps done, minutes). Returns the steps.

    AdamW (0.9, 0.98), weight decay 0.1, gradients clipped to norm 1, 24 contexts of 128 predicted tokens a step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start, step = time.time(), 0
    while (elapsed := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed)
        model.train()
        at = torch.randint(0, len(ids) - CONTEXT - 1, (BATCH_SIZE,), generator=generator)
        rows = ids[at[:, None] + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        on_step(step, (time.time() - start) / 60)
    return step


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the model goes.")
@click.option("--minutes", type=float, default=80.0, show_default=True, help="How long to train.")
@click.option("--d-model", type=int, default=128, show_default=True, help="Width of the residual stream.")
@click.option("--vocabulary", type=int, default=4096, show_default=True, help="Number of tokens.")
def main(out: Path, minutes: float, d_model: int, vocabulary: int) -> None:
    """Train the embedded language model and write it to --out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    out.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in read_installed().documents]
    train_texts, held_texts = [t for t in texts if not is_eval(t)], [t for t in texts if is_eval(t)]
    tokenizer = train_tokenizer(train_texts, vocabulary)
    tokenizer.save_pretrained(out)
    for part in (train_texts, held_texts):
        random.Random(0).shuffle(part)
    ids, held = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_texts)
    n_bytes = sum(len(text.encode()) for text in held_texts)
    click.echo(f"{len(texts)} documents; {len(ids)} training tokens, {len(held)} held out ({n_bytes} bytes)")
    model = new_model(d_model, vocabulary)

    with (out / "log.jsonl").open("w") as log:

        def record(step: int, nats: float, **more: float) -> None:
            line: dict[str, Any] = {"step": step, "tokens": step * BATCH_SIZE * CONTEXT}
            line |= {"held_out_nats_per_token": round(nats, 4), **more}
            log.write(json.dumps(line) + "\n")
            click.echo(json.dumps(line))

        def on_step(step: int, minutes_done: float) -> None:
            if step % LOG_EVERY == 0:
                record(step, held_out_nats(model, held[:LOG_TOKENS]), minutes=round(minutes_done, 1))

        n_steps = train(model, ids, minutes, on_step)
        nats = held_out_nats(model, held)
        record(n_steps, nats, held_out_bits_per_byte=round(bits_per_byte(nats, len(held), n_bytes), 4))
    model.half().save_pretrained(out)


if __name__ == "__main__":
    main()
