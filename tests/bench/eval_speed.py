"""What evaluation costs beside the work that nobody can leave out.

    python tests/bench/eval_speed.py --store STORE [--d-sae 4096] [--k 32] [--sequences 1024] [--rounds 5] [--only NAME]

One core; the store needs a tail. The SAE is random: directions of norm 1, encoder = decoder transposed. Bars:

    core      metrics without the tail, one SAE: at most 1.3 of encoder matmul + selection + sparse decode
    temporal  the full temporal and probe suite with them: at most 3 of the same. Probes read at most 128 tokens of at
              most 128 documents and 512 latents, so their part is fixed: the smaller the split, the larger the ratio
    tail      cross-entropy and KL: at most 1.2 of the bare tail forwards (x and xhat, all logits)
    ten       ten SAEs in one pass: at most 0.85 of ten passes, and the store's bytes read once (TEN_SEQUENCES of it)
    model     the tail against the whole language model with the SAE hooked in (embedded model; no bar)
"""

import argparse
import copy
from collections.abc import Callable

import torch
from alternate import alternate, one_core, report

from tcsae.evaluate.batches import Settings, batches
from tcsae.evaluate.measures.core import Output
from tcsae.evaluate.measures.cross_entropy import Reference, sequence_losses, splice
from tcsae.evaluate.measures.temporal_run import TemporalObserver
from tcsae.evaluate.one_pass import measure
from tcsae.evaluate.systems import SaeOutput
from tcsae.shared.lm.tail import Tail
from tcsae.shared.sae.module import SaeConfig, SparseAutoencoder
from tcsae.shared.store.counted import CountingRules
from tcsae.shared.store.reader import Split, open_store

RULES = CountingRules(skip_first=1)
TEN_SEQUENCES = 128
BARS = {"core": 1.3, "temporal": 3.0, "tail": 1.2, "ten": 0.85, "model": None}


def first_sequences(split: Split, n: int) -> Split:
    """A split of its first sequences."""
    part = copy.copy(split)
    part.n_sequences = min(n, split.n_sequences)
    for name in ("tokens", "lengths", "documents", "starts"):
        setattr(part, name, getattr(split, name)[: part.n_sequences])
    return part


def random_sae(d_model: int, d_sae: int, k: int, mean: torch.Tensor, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d_model=d_model, d_sae=d_sae, activation="topk", k=k))
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(seed))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc_rows.copy_(sae.W_dec)
        sae.b_dec.copy_(mean)
    return sae.eval()


class Contest:
    """The store's part, the SAE, and what is timed; every callable returns the tokens that it did."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.store = open_store(arguments.store)
        self.hook = self.store.hook()
        self.split = first_sequences(self.store.eval, arguments.sequences)
        mean = torch.from_numpy(self.store.array(f"statistics/{self.hook}/mean")[:]).double()
        self.settings = Settings(hook=self.hook, rules=RULES, splice_all=False, mean=mean)
        shape = self.store.d_model(self.hook), arguments.d_sae, arguments.k
        self.saes = [random_sae(*shape, mean.float(), seed) for seed in range(10)]
        self.tail = Tail.load(self.store.tail_path(self.hook))
        self.batches = list(batches(self.split, self.hook, RULES))
        self.n_tokens = sum(int(batch.counted.sum()) for batch in self.batches)
        self.reference: Reference | None = None

    @torch.inference_mode()
    def bare(self) -> int:
        """Encoder matmul, selection and sparse decode, on activations in memory."""
        for batch in self.batches:
            SaeOutput(self.saes[0])(batch.x[batch.counted])
        return self.n_tokens

    def run(self, n_saes: int = 1, temporal: bool = False, tail: bool = False) -> int:
        """An evaluation as the command makes it, from the store's bytes on."""
        observer = TemporalObserver(self.split, RULES, self.settings.mean, n_saes) if temporal else None
        systems = [SaeOutput(sae) for sae in self.saes[:n_saes]]
        with_tail = (self.tail, self.reference) if tail else (None, None)
        measured = measure(
            self.split, self.settings, systems, *with_tail, [observer] if observer else [], lambda _: None
        )
        if observer is not None:
            with torch.inference_mode():
                observer.measures(0, self.saes[0].config)
        self.reference = measured.reference or self.reference
        return self.n_tokens

    @torch.inference_mode()
    def bare_tail(self) -> int:
        """The tail's forwards of x and of a reconstruction, with all logits of the counted positions."""
        for batch in self.batches:
            for x in (batch.x, self._spliced(batch)):
                for _, _ in self.tail.slices(self.tail.hidden(x)[batch.counted]):
                    pass
        return self.n_tokens

    @torch.inference_mode()
    def tail_metrics(self) -> int:
        """The same with cross-entropy and KL of every position."""
        for batch in self.batches:
            others = [self._spliced(batch)]
            sequence_losses(self.tail, batch.x, others, batch.tokens, batch.counted, batch.has_next)
        return self.n_tokens

    def _spliced(self, batch: object) -> torch.Tensor:
        return splice(batch.x, batch.counted, batch.x[batch.counted] * 0.9)  # type: ignore[attr-defined]

    def bytes_read(self, work: Callable[[], object]) -> int:
        """Bytes of activations that `work` reads from the store."""
        total, read = 0, Split.read

        def counting(split: Split, hook: str, start: int, stop: int) -> object:
            nonlocal total
            block = read(split, hook, start, stop)
            total += block.nbytes
            return block

        Split.read = counting  # type: ignore[method-assign, assignment]
        try:
            work()
        finally:
            Split.read = read  # type: ignore[method-assign]
        return total


def whole_model(contest: Contest) -> tuple[Callable[[], int], Callable[[], int]]:
    """(the tail on x with the SAE in front, the language model with the SAE hooked in), losses of every token."""
    from transformers import AutoModelForCausalLM

    from tcsae.data.model import embedded_model_path

    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    system, tail = SaeOutput(contest.saes[0]), contest.tail

    def hook(_module: object, _inputs: object, out: object) -> object:
        x = out if torch.is_tensor(out) else out[0]  # type: ignore[index]
        x_hat = torch.cat([x[:, :1], system(x[:, 1:].flatten(0, 1)).x_hat.view(len(x), -1, x.shape[2])], 1)
        return x_hat if torch.is_tensor(out) else (x_hat, *out[1:])  # type: ignore[index]

    @torch.inference_mode()
    def with_tail() -> int:
        for batch in contest.batches:
            x_hat: Output = system(batch.x[batch.counted])
            spliced = splice(batch.x, batch.counted, x_hat.x_hat)
            sequence_losses(tail, spliced, [], batch.tokens, batch.counted | batch.skipped, batch.has_next)
        return contest.n_tokens

    @torch.inference_mode()
    def with_model() -> int:
        layer = model.gpt_neox.layers[4]
        for batch in contest.batches:
            handle = layer.register_forward_hook(hook)
            hidden = model.gpt_neox(batch.tokens.long()).last_hidden_state
            handle.remove()
            for _, (logits,) in tail.slices(hidden[:, :-1][batch.has_next[:, :-1]]):
                logits.log_softmax(-1)
        return contest.n_tokens

    return with_tail, with_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("core", "temporal", "tail", "ten", "model"))
    arguments = parser.parse_args()
    one_core()
    contest = Contest(arguments)
    contest.run(tail=True)  # the losses that no SAE changes, kept for the rest
    once, ten = contest.bytes_read(contest.run), contest.bytes_read(lambda: contest.run(10))
    with_tail, with_model = whole_model(contest)
    few = Contest(argparse.Namespace(**vars(arguments) | {"sequences": min(TEN_SEQUENCES, arguments.sequences)}))
    few.run(tail=True)

    def ten_passes() -> int:
        for _ in range(10):
            few.run(tail=True)
        return few.n_tokens

    contests: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {
        "core": (contest.run, contest.bare),
        "temporal": (lambda: contest.run(temporal=True), contest.bare),
        "tail": (contest.tail_metrics, contest.bare_tail),
        "ten": (lambda: few.run(10, tail=True), ten_passes),
        "model": (with_tail, with_model),
    }
    print(f"{contest.n_tokens:,} tokens; ten SAEs read {ten / once:.2f} times the bytes of one")
    result: dict[str, object] = {"bytes_of_ten_over_one": ten / once}
    for name, (ours, theirs) in contests.items():
        if arguments.only in (None, name):
            times = alternate({name: ours, "bare": theirs}, arguments.rounds)
            bar, ratio = BARS[name], times.ratio(name, "bare")
            verdict = "" if bar is None else f", {ratio.verdict(bar)} the bar of {bar}"
            print(f"{name:10s} {ratio}{verdict}", flush=True)
            result[name] = ratio._asdict() | {"bar": bar, "tokens_per_s": 1 / times.median(name)}
    report("eval_speed", figures=result, options=vars(arguments))


if __name__ == "__main__":
    main()
