"""The command `harvest`."""

from typing import TYPE_CHECKING, Any

import click

from tcsae.shared.cli import Count, Place, StageCommand

if TYPE_CHECKING:
    from tcsae.shared.store import Store


@click.command(cls=StageCommand, short_help="Run a language model over text once and store its activations.")
@click.option(
    "--model",
    default="embedded",
    show_default=True,
    metavar="NAME",
    help="The language model: embedded, a Hugging Face folder, or a Hub id such as EleutherAI/pythia-70m.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
@click.option(
    "--dataset",
    default="pydocs",
    show_default=True,
    metavar="NAME",
    help="The text: pydocs (the documentation installed here), openwebtext, a file or folder of .txt, .jsonl, .json or "
    ".parquet, or a Hub id.",
)
@click.option("--dataset-revision", metavar="REV", help="Branch, tag or commit of a Hub dataset.")
@click.option("--dataset-config", metavar="NAME", help="Configuration of a Hub dataset.")
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Split of a Hub dataset.")
@click.option("--text-field", default="text", show_default=True, metavar="NAME", help="The column that holds the text.")
@click.option(
    "--hook",
    "hooks",
    multiple=True,
    default=("blocks.4.hook_resid_post",),
    show_default=True,
    metavar="NAME",
    help="Where in the model, as TransformerLens names it. Repeatable: all come from one pass, which stops after the "
    "deepest.",
)
@click.option(
    "--tokens",
    type=Count(),
    default="1M",
    show_default=True,
    help="Tokens to store, over both splits; K, M and G are powers of 1000.",
)
@click.option("--sequence-length", default=128, show_default=True, help="Positions of a sequence, at most.")
@click.option(
    "--min-length",
    default=3,
    show_default=True,
    help="Leave out a document's last piece if it is shorter (a window is 3 long).",
)
@click.option(
    "--prepend-bos/--no-prepend-bos",
    default=False,
    show_default=True,
    help="Begin every sequence with the tokenizer's BOS token.",
)
@click.option("--batch-size", default=32, show_default=True, help="Sequences in one forward pass.")
@click.option(
    "--eval-every",
    default=20,
    show_default=True,
    help="One document in so many, chosen by the hash of its text, goes to the eval split.",
)
@click.option("--seed", default=0, show_default=True, help="0 keeps the corpus's order, another number shuffles it.")
@click.option(
    "--codec",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="How activations are stored.",
)
@click.option("--exact", is_flag=True, help="Fail if the corpus has less text than --tokens.")
@click.option("--fresh", is_flag=True, help="Delete the activation store that is there and start anew.")
@click.pass_obj
def harvest(place: Place, **options: Any) -> None:
    """Run a language model over text once and store its activations.

    Documents become sequences, one document in each, in a train and an eval split. The model runs up to the deepest
    hook. Killed at any moment, the same command goes on where it stopped; a finished store of the same settings is used
    as it is.
    """
    from tcsae.harvest.corpus import CorpusChoice
    from tcsae.harvest.run import HarvestConfig, ModelChoice
    from tcsae.harvest.run import harvest as run
    from tcsae.shared.manifest import SequenceRecipe

    config = HarvestConfig(
        model=ModelChoice(name=options["model"], revision=options["revision"], batch_size=options["batch_size"]),
        corpus=CorpusChoice(
            name=options["dataset"],
            revision=options["dataset_revision"],
            config=options["dataset_config"],
            split=options["split"],
            field=options["text_field"],
            seed=options["seed"],
        ),
        sequences=SequenceRecipe(
            length=options["sequence_length"],
            min_length=options["min_length"],
            prepend_bos=options["prepend_bos"],
            eval_every=options["eval_every"],
        ),
        hooks=options["hooks"],
        n_tokens=options["tokens"],
        codec=options["codec"],
    )
    print_summary(run(place.store, config, fresh=options["fresh"], exact=options["exact"]))


def print_summary(store: "Store") -> None:
    """What the store holds, what was left out, and what it costs on disk."""
    from tcsae.shared.console import size, table

    counts = store.manifest.counts
    title = f"{store.location}: {store.manifest.recipe.model.name} over {store.manifest.recipe.corpus.name}"
    rows = [(name, counts["train"][name], counts["eval"][name]) for name in ("sequences", "tokens", "documents")]
    table(title, ["", "train", "eval"], rows)
    n_tokens = counts["train"]["tokens"] + counts["eval"]["tokens"]
    parts = store.n_bytes()
    click.echo(f"  {size(sum(parts.values()))} on disk, {sum(parts.values()) / n_tokens:.0f} bytes a token")
    for hook in store.hooks:
        tail = store.manifest.tails[hook]
        after = (
            tail.get("none") or f"tail saved (layers: {tail['layers']}, off by {tail['max_difference']:g} nats at most)"
        )
        click.echo(f"  {hook}: {size(parts.get(f'activations {hook}', 0))}, width {store.d_model(hook)}; {after}")
    click.echo(
        f"  read {counts['documents_read']:,} documents; left out {counts['documents_skipped']:,} of a full split, "
        f"{counts['documents_empty']:,} without a sequence, {counts['tokens_dropped_short']:,} tokens in short ends, "
        f"{counts['tokens_beyond_budget']:,} beyond the asked"
    )
