"""What many tests share: a language model, a corpus and a store so small that they take a second to make."""

import gc
import json
import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says what else the machine does, not whether the promise holds.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25)  # of `make fast`
hypothesis.settings.load_profile("no deadline")

# Before torch and the Hub's libraries are imported: tests use one thread, and no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

n_frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Keep imported libraries out of every later gc.collect, of which a harvest makes two: 0.45 s each with them."""
    global n_frozen_modules
    if len(sys.modules) > n_frozen_modules:
        n_frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """End on the names of what failed: where messages are long, the last lines of a log show nothing else."""
    yield
    failures = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    for report in failures:
        terminalreporter.write_line(f"failed: {report.nodeid[:150]}")


WORDS = ["the", "a", "model", "stream", "reads", "writes", "each", "token", "of", "one", "sequence", "and", "window"]
TINY_HOOKS = ("blocks.2.hook_resid_post", "blocks.4.hook_mlp_out", "blocks.1.attn.hook_z")


def sentence(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=n_words))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 entries, <|endoftext|> (id 0) being begin, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(random.Random(0), 2000)], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end).save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def make_lm():
    """make_lm(folder, config): saves a language model with random weights, and a tokenizer; returns `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(folder: Path, config) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_lm(make_lm, tmp_path_factory) -> Path:
    """Folder of a GPT-NeoX: 6 layers, d_model 16, context 64, vocabulary 300, random weights."""
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return make_lm(tmp_path_factory.mktemp("models") / "tiny", config)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A .jsonl of 160 documents: mostly of 1 to 90 words, two empty ones, one of a single letter, one very long."""
    rng = random.Random(1)
    texts = [sentence(rng, rng.randint(1, 90)) for _ in range(160)]
    texts[3], texts[5], texts[8], texts[11] = "", "a", sentence(rng, 700), ""
    path = tmp_path_factory.mktemp("corpora") / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_lm, tiny_corpus):
    """A harvest of some 3,000 tokens: sequences of 32 positions, one document in 4 is eval, three hooks."""
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.run import HarvestConfig, ModelChoice
    from tcsae.shared.store.format import SequenceRecipe

    return HarvestConfig(
        model=ModelChoice(name=str(tiny_lm), batch_size=4),
        corpus=CorpusChoice(name=str(tiny_corpus)),
        sequences=SequenceRecipe(length=32, eval_every=4),
        hooks=TINY_HOOKS,
        n_tokens=3000,
    )


@pytest.fixture(scope="session")
def tiny_store(tiny_config, tmp_path_factory) -> str:
    """Location of a sealed store of `tiny_config`, with 8 sequences a chunk."""
    from tcsae.harvest.run import harvest
    from tcsae.shared.store.format import Layout

    location = str(tmp_path_factory.mktemp("stores") / "tiny.zarr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.shared.store.writer.layout_for", lambda recipe: Layout(sequences_per_chunk=8))  # noqa: ARG005
        harvest(location, tiny_config)
    return location


@pytest.fixture(scope="session")
def toy_report():
    """The module tests/toy_report.py."""
    import toy_report as module

    return module


@pytest.fixture(scope="session")
def evaluated(toy_report, tiny_lm, tmp_path_factory) -> Path:
    """A folder with a store of hostile text (a.zarr) and evaluated runs (runs/). Copy it before changing it."""
    return toy_report.make(tmp_path_factory.mktemp("evaluated"), tiny_lm)


@pytest.fixture(scope="session")
def reported(evaluated, toy_report, tmp_path_factory) -> Path:
    """A report of all runs of `evaluated`, in a folder with an odd name. Copy it before changing it."""
    out = tmp_path_factory.mktemp("out") / "a report & more"
    done = toy_report.call(evaluated, "report", "--out", str(out))
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return out


@pytest.fixture(scope="session")
def toy_browser():
    """The module tests/toy_browser.py; without a browser the test is skipped, or fails where TCSAE_BROWSER is set."""
    import toy_browser as module

    module.need_browser()
    return module


@pytest.fixture(scope="session")
def chromium(toy_browser, tmp_path_factory):
    driver = toy_browser.tools.open_browser(tmp_path_factory.mktemp("profile"))
    driver.get("about:blank")  # in place of the browser's first page, which goes on loading
    yield driver
    driver.quit()


@pytest.fixture
def browser(toy_browser, chromium):
    """The browser; afterwards, whatever a test did: no error was logged, and nothing was read but local files."""
    toy_browser.forget(chromium)
    yield chromium
    toy_browser.check_quiet(chromium)
