"""What one GPU of H100's class needs: steps a second by FLOPs and bytes, bytes a second from the store, and from how
many SAEs on a cache beats running the language model again.

    python tests/bench/gpu_needs.py [--mfu-step 0.4] [--store-gbps 6] ...

Arithmetic, no measurement: every assumption is a flag, printed with where its default comes from. `make gpu` measures
the rates on a GPU; docs/scaling.md shows the output.
"""

import argparse
from dataclasses import dataclass

from assumptions import Assumption, parse_assumptions

ASSUMPTIONS = {
    "tf32": Assumption(495e12, "FLOP/s of products in tf32, without sparsity", "data sheet, H100 SXM"),
    "bf16": Assumption(989e12, "the same in bfloat16", "data sheet, H100 SXM"),
    "memory": Assumption(3.35e12, "bytes/s of the GPU's memory", "data sheet, H100 SXM"),
    "mfu_lm": Assumption(0.35, "share of bf16 that the language model reaches", "assumed: inference of small models"),
    "mfu_step": Assumption(0.5, "share of tf32 that the encoder's product reaches", "assumed: one large product"),
    "share_memory": Assumption(0.6, "share of the memory's rate in gathers and Adam", "assumed"),
    "store_gbps": Assumption(6.0, "GB/s from the store to one GPU", "assumed: a local NVMe disk or 50 Gbit/s"),
    "batch": Assumption(4096, "tokens of a training batch", "the bench's"),
    "k": Assumption(32, "active latents a token", "the presets'"),
    "bytes_per_number": Assumption(2, "of the codec", "float16 or bfloat16"),
    "padding": Assumption(1.05, "stored over valid positions", "long web pages"),
    "passes": Assumption(1, "epochs of training an SAE", "chosen"),
}


@dataclass(frozen=True)
class Model:
    """A language model up to its hook."""

    name: str
    d_model: int
    parameters: float
    """Of the layers up to the hook, embeddings left out: two FLOPs each a token."""


MODELS = (
    Model("Pythia-70m, block 4", 512, 5 * 12 * 512**2),
    Model("Gemma-2-2B, block 12", 2304, 13 * 78e6),
    Model("Llama-3-8B, block 16", 4096, 17 * 218e6),
)
"""A GPT-NeoX block has 12 d^2 parameters; Gemma's and Llama's are their configs' sizes."""
LATENTS = (16_384, 65_536)


class Needs:
    """Seconds a token of each part, over one set of assumptions."""

    def __init__(self, values: dict[str, float]) -> None:
        self.v = values

    def lm(self, model: Model) -> float:
        """The language model."""
        return 2 * model.parameters / (self.v["bf16"] * self.v["mfu_lm"])

    def step(self, d_model: int, d_sae: int) -> dict[str, float]:
        """A TopK step by what takes its time: the encoder's product, the memory that codes and rows take, Adam."""
        v = self.v
        rate = v["memory"] * v["share_memory"]
        # Pre-activations are written once and read twice by the selection; four times rows of W are read for a token's
        # k latents (decoder, its gradients, the encoder's), as float32.
        codes = 4 * (3 * d_sae + 4 * v["k"] * d_model)
        # Two matrices: gradient written and read twice, weight and two moments read and written, norms and rows again.
        adam = 2 * d_sae * d_model * 4 * (3 + 6 + 3) / v["batch"]
        return {
            "product": 2 * d_model * d_sae / (v["tf32"] * v["mfu_step"]),
            "codes": codes / rate,
            "Adam": adam / rate,
        }

    def bytes_per_token(self, d_model: int) -> float:
        return d_model * self.v["bytes_per_number"] * self.v["padding"]

    def read(self, d_model: int) -> float:
        return self.bytes_per_token(d_model) / (self.v["store_gbps"] * 1e9)

    def break_even(self, model: Model, d_sae: int, together: int) -> int | None:
        """Fewest SAEs, `together` from a pass, from which harvest and training take less time than recomputing."""
        step = sum(self.step(model.d_model, d_sae).values())
        for n in range(1, 1001):
            passes = -(-n // together) * self.v["passes"]
            steps = n * self.v["passes"] * step
            recomputed = passes * self.lm(model) + steps
            waiting = max(0.0, passes * self.read(model.d_model) - steps)
            if self.lm(model) + steps + waiting < recomputed:
                return n
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, values = parse_assumptions(parser, ASSUMPTIONS)
    needs = Needs(values)
    columns = f"{'model and hook':22s} {'d_sae':>6s} {'steps/s':>8s} {'tokens/s':>10s}  {'most time in':12s}"
    print(f"\n{columns} {'GB/s':>5s} {'LM tokens/s':>12s} {'LM share':>8s}  cached is faster from")
    for model in MODELS:
        for d_sae in LATENTS:
            parts = needs.step(model.d_model, d_sae)
            tokens, lm = 1 / sum(parts.values()), 1 / needs.lm(model)
            gbps = tokens * needs.bytes_per_token(model.d_model) / 1e9
            even = {together: needs.break_even(model, d_sae, together) for together in (1, 4)}
            result = ", ".join(f"{n} SAEs at {together} a pass" if n else "-" for together, n in even.items())
            print(
                f"{model.name:22s} {d_sae:6d} {tokens / values['batch']:8.0f} {tokens:10,.0f}  "
                f"{max(parts, key=lambda name: parts[name]):12s} {gbps:5.1f} {lm:12,.0f} "
                f"{needs.lm(model) * tokens / (1 + needs.lm(model) * tokens):8.0%}  {result}"
            )


if __name__ == "__main__":
    main()
