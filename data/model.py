"""The embedded language model: where it lies, and the rule under which it was trained."""

import hashlib
from pathlib import Path

from tcsae.shared.base.errors import ModelError

EVAL_EVERY = 20
"""The embedded model saw no document with int(sha256(text)) % 20 == 0, neither its tokenizer nor its weights.

A store of the same rule therefore has an eval split that the language model never read. Under any other modulus some of
the eval documents were training text, and figures on them flatter the model.
"""

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def embedded_model_path() -> Path:
    """Folder of the embedded model: a Hugging Face checkpoint with its tokenizer.

    Its weights are float16 on disk; load them with `dtype=torch.float32`, since float16 is slow on a CPU.

    Raises ModelError if the folder was removed or lacks a file.
    """
    path = Path(__file__).parent / "embedded"
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        what = "is gone" if len(missing) == len(FILES) else f"lacks {', '.join(missing)}"
        raise ModelError(f"The embedded model {what} ({path}). Install tcsae again, or name another --model.")
    return path


def is_eval(text: str, every: int = EVAL_EVERY) -> bool:
    """Whether a document belongs to eval: int(sha256(text)) % every == 0, the digest of its UTF-8 read big-endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % every == 0
