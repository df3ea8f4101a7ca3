"""What is trained for the paper's questions: arms, each a preset with settings, over several seeds.

Arms that differ in one setting share seeds, data order and steps, so that they are compared seed by seed. Weights are
chosen on the *choose* half of the eval documents, with a seed that no table uses; figures are of the *report* half.
"""

from dataclasses import dataclass, replace

from tcsae.evaluate.halves import Documents
from tcsae.train.presets import WRITTEN_STEPS

TEXT, PERMUTED, RANDOM, MOMENTS = "text", "permuted", "random-weights", "moments"
"""Stores: the text, its tokens in random order, a model that was never trained, and synthetic activations of the
moments that the paper's had."""
CENTRED = f"{RANDOM}-centred"
"""RANDOM's activations less a mean for each token id and one for each position. Made from that store, so after it."""
NO_HARVEST = (MOMENTS, CENTRED)
SMALL = ("sae.d_sae=1024", "sae.k=16")


@dataclass(frozen=True)
class Arm:
    """One line of a table: the same SAE under several seeds."""

    label: str
    preset: str = "topk"
    settings: tuple[str, ...] = SMALL
    store: str = TEXT
    n_seeds: int = 3
    n_steps: int = 1250
    temporal: bool = True
    """Whether temporal measures are taken of it."""
    smooth: str = ""
    """How its codes are smoothed after training, as `tcsae eval --smooth` says it."""
    documents: Documents = "report"
    """Documents of the eval split that its figures are of."""
    vary: tuple[str, ...] = ("init_seed",)
    """Settings that take the seed's number."""
    first_seed: int = 0
    ce_tokens: int | None = None
    """Its cross-entropies are of the first documents that hold so many tokens; None: all."""

    def on(self, store: str) -> "Arm":
        return replace(self, store=store)


def topk(label: str, *settings: str, preset: str = "topk") -> Arm:
    return Arm(label, preset, (*SMALL, *settings))


def weighted(kind: str, weight: float, *settings: str) -> Arm:
    """TopK with a temporal term."""
    about = f"{NAMES[kind]}, weight {weight:g}"
    if kind == "contrastive" and weight == 3.0 and not settings:
        return topk(about, preset="temporal-topk")
    at = ("temporal.contrast.temperature=0.3",) if kind == "contrastive" else ()
    return topk(about, f"temporal.kind={kind}", f"temporal.weight={weight:g}", *at, *settings)


NAMES = {"difference": "eq. 3", "relative": "relative slowness", "contrastive": "contrastive"}
WEIGHTS = {"difference": (0.03, 0.1, 0.3), "relative": (1.0, 3.0, 10.0), "contrastive": (1.0, 3.0, 10.0)}

PLAIN = topk("no temporal term")
FRONTIER = {kind: [weighted(kind, weight) for weight in weights] for kind, weights in WEIGHTS.items()}
FEWER = [Arm(f"no temporal term, k = {k}", settings=("sae.d_sae=1024", f"sae.k={k}")) for k in (12, 8)]
CONTRASTIVE, RELATIVE, EQUATION_3 = FRONTIER["contrastive"][1], FRONTIER["relative"][1], FRONTIER["difference"][1]
CHOOSING = {
    arm: replace(arm, label=f"{arm.label}, choosing", n_seeds=1, first_seed=100, documents="choose")
    for arm in (PLAIN, *(arm for arms in FRONTIER.values() for arm in arms))
}
"""The frontier on the other half of the documents: there each kind's weight is chosen."""
SHUFFLED = {
    (kind, order): replace(weighted(kind, 3.0, f"temporal.order={order}"), label=f"{NAMES[kind]}, {about}")
    for kind in ("relative", "contrastive")
    for order, about in (("segment", "pairs at most 15 apart"), ("batch", "pairs of any documents"))
}
FAR = {
    (kind, order): replace(
        weighted(kind, 3.0, *("data.document_segments=4", f"temporal.order={order}")), label=f"{NAMES[kind]}, {about}"
    )
    for kind in ("relative", "contrastive")
    for order, about in (
        ("text", "4 segments of each document"),
        ("document", "4 segments of each document, pairs 64 or more apart"),
    )
}
"""What is left of a term whose pairs share the document alone, beside the same term on the same batches."""
SMOOTHINGS = ("ema=0.1", "ema=0.3", "ema-topk=0.2", "ema-topk=0.4", "mean=2", "hysteresis=1.5", "hysteresis=3")
SCALED = [replace(PLAIN, label=f"no temporal term, code times {c:g}", smooth=f"scale={c:g}") for c in (0.9, 0.8)]
SMOOTHED = [replace(PLAIN, label=f"no term, codes smoothed: {rule}", smooth=rule) for rule in SMOOTHINGS]
LOCAL, TOPIC = topk("local contrast", preset="local-contrast"), topk("topic", preset="topic")
"""Terms that tell neighbours from far pairs of the same sequence (order), and documents from ones of similar words."""
MATRYOSHKA = Arm("matryoshka, contrastive", "temporal-matryoshka")
MATRYOSHKA_PLAIN = Arm("matryoshka, no temporal term", "temporal-matryoshka", (*SMALL, "temporal.weight=0"))
PENALISED = topk("position penalty", "temporal.position_penalty=1")
BOTH = topk("contrastive and position penalty", "temporal.position_penalty=1", preset="temporal-topk")
WINDOWS = [
    topk(f"eq. 3, w = {window}, {pairs} pairs", "temporal.weight=0.1", *settings)
    for window, pairs, settings in (
        (2, "adjacent", ("temporal.window=2",)),
        (8, "adjacent", ("temporal.window=8",)),
        (3, "all", ("temporal.pairs=all",)),
        (8, "all", ("temporal.window=8", "temporal.pairs=all")),
    )
]

RUNGS = [
    Arm(f"temporal-topk, k = {k}", "temporal-topk", ("sae.d_sae=1024", f"sae.k={k}"), n_seeds=n_seeds)
    for k, n_seeds in ((8, 1), (32, 1), (64, 1), (128, 1), (249, 3))
]
FIXED = Arm(
    "sequences of 128 only",
    settings=(*SMALL, "data.segment_length=128", "data.n_segments=16", "data.min_sequence_length=128"),
)
NATURAL = Arm("all lengths, as many tokens", settings=(*SMALL, "data.segment_length=128", "data.n_segments={natural}"))
"""{natural}: as many segments as hold the tokens of FIXED's batches, on average."""
WITHOUT = [
    topk(about, *settings)
    for about, settings in (
        ("Xavier initialisation, not the transpose", ("init.weights=xavier",)),
        ("decoder bias from 0, not from the mean", ("init.b_dec=zero",)),
        ("inputs not scaled", ("init.input_scale=none",)),
        ("gradients not clipped", ("optimizer.clip_norm=1e9",)),
        ("rate constant after the warm-up", ("optimizer.decay=none",)),
        ("no warm-up", ("optimizer.warmup_steps=0",)),
        ("decoder rows of any norm", ("optimizer.unit_decoder=false",)),
        ("no AuxK", ("dead.aux_weight=0",)),
    )
]
BATCHTOPK = topk("BatchTopK, no temporal term", preset="batchtopk")
BATCHTOPK_CONTRASTIVE = topk(
    "BatchTopK, contrastive",
    "temporal.kind=contrastive",
    "temporal.weight=3",
    "temporal.contrast.temperature=0.3",
    preset="batchtopk",
)
LARGE_PLAIN = Arm("4096 latents, k = 32, no temporal term", "topk", ())
LARGE = Arm("4096 latents, k = 32, contrastive", "temporal-topk", ())

PAPER_RUNS = ("run0", "run1", "run2", "run3", "run4")
UNLOGGED = "run1"
"""It took no step and has no figure."""
LOGGED = {
    (store, run): Arm(
        f"no step, {store}", f"logged-{run}", (), store, n_seeds=8, n_steps=0, temporal=False, documents="all"
    )
    for store in (MOMENTS, TEXT)
    for run in PAPER_RUNS
    if run != UNLOGGED
}


def written(run: str, label: str = "trained as written", *settings: str, n_seeds: int = 2) -> Arm:
    return Arm(label, f"written-{run}", settings, n_seeds=n_seeds, n_steps=WRITTEN_STEPS, documents="all")


WRITTEN = {run: written(run) for run in PAPER_RUNS}
RESCALED = written("run3", "trained, lambda_1 rescaled", "sparsity.l1={rescaled}", n_seeds=1)
"""{rescaled}: lambda_1 = 0.1 times the root of this store's mean squared norm over Pythia's 372: the ratio of the two
terms is then what it is there."""
NARROW = written("run3", "trained, as many latents as dimensions", "sae.d_sae={d_model}")
"""As in the paper, 512 on 512; 512 latents on fewer dimensions are overcomplete, and explain what any such code
does."""
NO_TERM = written("run3", "trained, lambda_2 = 0", "temporal.weight=0")
TWO_PHASE = written("two-phase", "trained in two phases", n_seeds=1)
