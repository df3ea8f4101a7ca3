"""Promise: whatever a store, a run, an SAE of another tool or a setting says, a command ends with exit code 0, 1 or 2
and a line that says why: no traceback, no endless work, no memory beyond measure, no file elsewhere.

TCSAE_FUZZ=2000: number of examples, over all tests (default 40). TCSAE_FUZZ_SEED=7: other examples. A failure prints
the example and the seed. TCSAE_FUZZ_FINDINGS=FILE: failures become lines of a file, and the search goes on. Signatures
are checked here (jaxtyping): a value of a wrong type that passes one is a failure as well.
"""

import json
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
import toy_fuzz as fuzz
import toy_place as toy
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

FINDINGS = os.environ.get("TCSAE_FUZZ_FINDINGS")
N_EXAMPLES, SEED = int(os.environ.get("TCSAE_FUZZ", "40")), int(os.environ.get("TCSAE_FUZZ_SEED", "0"))
randoms = st.randoms(use_true_random=True)


def share(percent: int) -> Callable:
    """So much of N_EXAMPLES, from SEED."""

    def decorate(test: Callable) -> Callable:
        test = settings(
            max_examples=max(1, N_EXAMPLES * percent // 100),
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(test)
        return hypothesis.seed(SEED)(test)

    return decorate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.make_place(tmp_path_factory.mktemp("fuzz") / "place")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Fetched files of zips land in a cache of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCSAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def attempt(place: Path, change: Callable[[Path], str], command: tuple[str, ...], store: str = "a.zarr") -> None:
    """Change a copy of the place, then give a command, which must end as promised. `change` returns what it did."""
    with fuzz.sandbox(place, Path(tempfile.mkdtemp(prefix="fuzz"))) as copy:
        changed = change(copy)
        note(changed)
        arguments = [argument.replace("{place}", str(copy)) for argument in command]
        wrong = fuzz.complaint(lambda: toy.call(copy, *arguments, store=store), "".join(arguments))
    if wrong is not None and FINDINGS:
        with Path(FINDINGS).open("a") as file:
            file.write(json.dumps({"command": command, "changed": changed, "wrong": wrong}) + "\n")
    else:
        assert wrong is None, f"{' '.join(command)}: {wrong} (TCSAE_FUZZ_SEED={SEED})"


def nothing(_: Path) -> str:
    return "nothing"


def train(*more: str) -> tuple[str, ...]:
    return ("train", "--preset", "relu-l1", "--steps", "1", *toy.TRAIN[:2], *toy.TRAIN[4:], *more)


READ_STORE = [
    ("inspect",),
    ("verify",),
    ("eval", "--force", "--run", "topk"),
    train(),
    ("copy", "--from", "{place}/a.zarr", "--to", "{place}/b.zarr"),
    ("copy", "--from", "{place}/a.zarr", "--to", "{place}/b.zarr", "--codec", "int8"),
    ("feature", "--run", "topk", "--id", "1"),
    ("report", "--run", "topk", "--force"),
]
WEIGHTS = [4, 4, 4, 4, 2, 1, 2, 1]
store_commands = st.sampled_from([c for c, n in zip(READ_STORE, WEIGHTS, strict=True) for _ in range(n)])


@pytest.mark.slow
@share(30)
@given(randoms, st.integers(1, 3), st.sampled_from([True, True, True, False]), store_commands, st.booleans())
def test_manifests(place, rng, n_changes, honest, command, zipped):
    def change(copy: Path) -> str:
        manifest = copy / "a.zarr" / "zarr.json"
        before = json.loads(manifest.read_text())["attributes"]["tcsae"]
        fuzz.change_manifest(manifest, rng, n_changes, honest)
        if zipped:
            fuzz.zip_store(copy / "a.zarr", copy / "a.zarr.zip")
        return differences(before, json.loads(manifest.read_text())["attributes"]["tcsae"])

    attempt(place, change, command, store="a.zarr.zip" if zipped else "a.zarr")


@pytest.mark.slow
@share(20)
@given(randoms, store_commands)
def test_files_of_a_store(place, rng, command):
    def change(copy: Path) -> str:
        file = rng.choice(fuzz.files_of(copy / "a.zarr"))
        return f"{file.relative_to(copy)}: {fuzz.damage(file, rng)}"

    attempt(place, change, command)


def differences(before: object, after: object, where: str = "") -> str:
    """Where two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in before | after if before.get(key, differences) != after.get(key, differences)]
        return "; ".join(differences(before.get(key), after.get(key), f"{where}.{key}") for key in keys)
    return f"{where}: {before!r:.100} -> {after!r:.100}"


READ_RUNS = [
    ("inspect",),
    ("eval",),
    ("eval", "--compare", "topk", "--with", "temporal-topk"),
    ("export", "--to", "saelens", "--run", "topk"),
    ("export", "--to", "dictionary_learning", "--run", "topk"),
    ("feature", "--run", "topk", "--id", "1"),
    ("train", "--preset", "topk", "--steps", "4", "--init-from", "topk", *toy.TRAIN),
    ("report",),
]
run_commands = st.sampled_from([c for c, n in zip(READ_RUNS, [4, 4, 2, 2, 2, 2, 3, 1], strict=True) for _ in range(n)])


@pytest.mark.slow
@share(20)
@given(randoms, run_commands)
def test_files_of_a_run(place, rng, command):
    def change(copy: Path) -> str:
        file = rng.choice(fuzz.files_of(copy / "runs" / "topk"))
        return f"{file.relative_to(copy)}: {fuzz.damage(file, rng)}"

    attempt(place, change, command)


CHECKPOINTED = ("train", "--preset", "topk", "--steps", "6", "--set", "guard.checkpoint_steps=2", *toy.TRAIN)


@pytest.fixture(scope="module")
def interrupted(place, tmp_path_factory):
    """A place with a run that ended at a checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted") / "place"
    shutil.copytree(place, folder)
    rename = Path.replace

    def interrupt(self: Path, target: Path) -> Path:
        if Path(target).name == "sae_weights.safetensors":
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        assert toy.call(folder, *CHECKPOINTED).exit_code == 130
    (run,) = (folder / "runs").glob("topk-*")
    assert list(run.glob("checkpoint-*"))
    return folder


@pytest.mark.slow
@share(10)
@given(randoms)
def test_files_of_a_run_that_was_interrupted(interrupted, rng):
    def change(copy: Path) -> str:
        (run,) = (copy / "runs").glob("topk-*")
        file = rng.choice(fuzz.files_of(run))
        return f"{file.relative_to(copy)}: {fuzz.damage(file, rng)}"

    attempt(interrupted, change, CHECKPOINTED)


# SAEs of other tools

ARCHITECTURES = ["standard", "topk", "jumprelu", "batchtopk", "gated", "gelu", "transcoder", "matryoshka", "", None, 3]
CONFIG = {
    "architecture": st.sampled_from(ARCHITECTURES),
    "d_in": st.sampled_from([toy.WIDTH, toy.WIDTH + 1]) | fuzz.weird,
    "d_sae": st.sampled_from([toy.LATENTS, 1]) | fuzz.weird,
    "k": st.integers(-1, 99) | fuzz.weird,
    "dtype": st.sampled_from(["float32", "bfloat16", "torch.float16"]) | fuzz.weird,
    "activation_fn_str": st.sampled_from(["relu", "topk", "tanh-relu"]) | fuzz.weird,
    "activation_fn": st.sampled_from(["relu", "topk"]) | fuzz.weird,
    "activation_fn_kwargs": st.just({"k": 3}) | fuzz.weird,
    "apply_b_dec_to_input": st.booleans() | fuzz.weird,
    "normalize_activations": st.sampled_from(["none", "layer_norm", "expected_average_only_in"]) | fuzz.weird,
    "reshape_activations": st.sampled_from(["none", "hook_z"]) | fuzz.weird,
    "rescale_acts_by_decoder_norm": st.booleans() | fuzz.weird,
    "finetuning_scaling_factor": st.booleans() | fuzz.weird,
    "prepend_bos": st.booleans() | fuzz.weird,
    "seqpos_slice": st.sampled_from([[None], [None, None, None], [1, None]]) | fuzz.weird,
    "hook_name": st.just(toy.HOOK) | fuzz.weird,
    "hook_point": st.just(toy.HOOK) | fuzz.weird,
    "hook_head_index": st.none() | fuzz.weird,
    "metadata": st.just({"hook_name": toy.HOOK, "prepend_bos": True}) | fuzz.weird,
}
configs = st.fixed_dictionaries({}, optional=CONFIG)
NAMES = [
    "W_enc",
    "W_dec",
    "b_enc",
    "b_dec",
    "threshold",
    "topk_threshold",
    "b_gate",
    "b_mag",
    "r_mag",
    "scaling_factor",
]
shapes = st.sampled_from(
    [(toy.WIDTH, toy.LATENTS), (toy.LATENTS, toy.WIDTH), (toy.LATENTS,), (toy.WIDTH,), (), (0,), (2, 3, 4)]
)
dtypes = st.sampled_from([torch.float32] * 6 + [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
FITTING = {"W_enc": (toy.WIDTH, toy.LATENTS), "W_dec": (toy.LATENTS, toy.WIDTH), "b_dec": (toy.WIDTH,)}


@st.composite
def tensors(draw) -> dict[str, torch.Tensor]:
    """Mostly what an SAE has; now and then a tensor is missing, of another shape or dtype, or holds NaN."""
    made = {}
    for name in NAMES:
        if draw(st.integers(0, 9)):
            shape = draw(shapes) if not draw(st.integers(0, 9)) else FITTING.get(name, (toy.LATENTS,))
            made[name] = torch.full(shape, draw(st.sampled_from([0.1] * 8 + [0.0, float("nan"), float("inf"), 1e38])))
            made[name] = made[name].to(draw(dtypes) if not draw(st.integers(0, 5)) else torch.float32)
    return made


def write_pickle(file: Path, content: object) -> None:
    """A torch checkpoint, or a plain pickle, or what looks like one."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))


FOREIGN_FILES = ["sae_weights.safetensors", "sae.safetensors", "model.safetensors"]
pickles = tensors() | st.sampled_from([Path("x"), [1], b"", b"garbage", b"PK\x03\x04broken", os.getcwd])
FOREIGN_COMMANDS = st.sampled_from(
    [("eval", "--run", "foreign")] * 4
    + [("inspect",), ("export", "--to", "saelens", "--run", "foreign"), ("feature", "--run", "foreign", "--id", "0")]
    + [("train", "--init-from", "foreign", "--steps", "0", *toy.TRAIN)]
)


@pytest.mark.slow
@share(20)
@given(configs | fuzz.weird, tensors(), st.sampled_from(FOREIGN_FILES[:1] * 8 + FOREIGN_FILES), FOREIGN_COMMANDS)
def test_saes_in_saelens_layout(place, config, weights, name, command):
    def change(copy: Path) -> str:
        folder = copy / "runs" / toy.FOREIGN
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "cfg.json").write_text(json.dumps(config))
        safetensors.torch.save_file(weights, folder / name)
        return f"{name}, cfg.json: {config}"

    attempt(place, change, command)


@share(5)
@given(st.sampled_from(["ae.pt", "sae_weights.pt", "sae.pt"]), pickles, configs | fuzz.weird, FOREIGN_COMMANDS)
def test_saes_in_pickles(place, name, content, config, command):
    def change(copy: Path) -> str:
        folder = copy / "runs" / toy.FOREIGN
        shutil.rmtree(folder)
        folder.mkdir()
        write_pickle(folder / name, content)
        (folder / "config.json").write_text(json.dumps({"trainer": config}))
        return f"{name}: {content!r:.200}, config: {config!r:.200}"

    attempt(place, change, command)


# Settings


def known_settings() -> dict[str, str]:
    """Every setting but `steps`, with the default of the default preset, as text."""
    from tcsae.shared.base.settings import to_settings
    from tcsae.train.presets import preset

    pairs = [line.partition("=") for line in to_settings(preset("temporal-topk", toy.WIDTH))]
    return {name: default for name, _, default in pairs if name != "steps"}


def is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return text in ("None", "none", "")


SETTINGS = known_settings()
ODD_KEYS = ["sae", "data", "sea.k", "", ".", "sae.", "data.seed.x", "__class__"]
COUNTS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "0.5",
    "0.99",
    "1e-9",
    "1e9",
    "1e400",
    "1K",
    "1M",
    "1G",
    "1000G",
    "nan",
    "inf",
    "none",
]
WORDS = ["relu", "topk", "batchtopk", "jumprelu", "gelu", "difference", "gated", "relative", "contrastive", "segment"]
WORDS += ["batch", "all", "linear", "cosine", "none", "mean", "restore", "end", "xavier", "zero", "true", "false"]
ODD = ["", ",", "8,16", "0.5,0.5", "x", "\x1b[31m", "é" * 99]


def pair(rng: random.Random) -> str:
    """KEY=VALUE; mostly a known setting, and a value of its kind."""
    key = rng.choice(sorted(SETTINGS) if rng.random() < 0.95 else ODD_KEYS)
    likely = COUNTS if is_number(SETTINGS.get(key, "")) else WORDS
    return f"{key}={rng.choice(likely if rng.random() < 0.9 else COUNTS + WORDS + ODD)}"


toml_values = st.sampled_from([*COUNTS, *WORDS, *ODD, 0, 1, -1, 0.5, 10**12, True, [], [1], {}])
toml_keys = st.sampled_from([*sorted(SETTINGS), *ODD_KEYS, "preset"])
tomls = st.dictionaries(toml_keys | st.text(max_size=4), toml_values, max_size=3)


def to_toml(table: dict[str, object]) -> str:
    """Lines KEY = VALUE, of which some are no TOML."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


@pytest.mark.slow
@share(25)
@given(randoms)
def test_settings(place, rng):
    chosen = [f"--set={pair(rng)}" for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    chosen += [f"--sweep={pair(rng)}"] * (rng.random() < 0.1)
    preset, steps = rng.choice(["temporal-topk", "relu-l1", "temporal-matryoshka", "written-run3"]), rng.choice("0112")
    attempt(place, nothing, ("train", "--preset", preset, *toy.TRAIN, *chosen, "--steps", steps))


@share(5)
@given(tomls.map(to_toml) | st.text(max_size=30) | st.binary(max_size=30))
def test_files_of_settings(place, content):
    def change(copy: Path) -> str:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (copy / "a.toml").write_bytes(data)
        return repr(content)

    attempt(place, change, ("train", "--config", "{place}/a.toml", "--steps", "1", *toy.TRAIN))


NAMES_GIVEN = st.sampled_from(
    [*toy.RUNS, "foreign", "nobody", "../a.zarr", "", ".", "..", "\x1b[31m", "a" * 300]
) | st.text(max_size=5)
SMOOTH = st.sampled_from(["ema=0.3", "ema=2", "ema", "mean=0", "mean=1G", "hysteresis=nan", "x=1", "=", "scale=-1"])


@pytest.mark.slow
@share(15)
@given(NAMES_GIVEN, NAMES_GIVEN, SMOOTH | st.text(max_size=5), st.integers(-1, 40), st.integers(0, 5))
def test_options(place, name, other, smooth, number, which):
    commands = [
        ("eval", f"--compare={name}", f"--with={other}"),
        ("eval", f"--run={name}", f"--smooth={smooth}", f"--skip-first={number}"),
        ("feature", f"--run={name}", f"--id={number}"),
        ("export", "--to", "saelens", f"--run={name}", f"--out={{place}}/{other}"),
        ("train", f"--preset={name}", "--steps", "0"),
        ("inspect", f"--sequences={number}"),
    ]
    attempt(place, nothing, commands[which])
