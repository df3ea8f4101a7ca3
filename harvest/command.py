"""The command `harvest`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tcsae.shared.base.cli import Count, Place, StageCommand, codec_option, device_option

if TYPE_CHECKING:
    from tcsae.harvest.cost import Plan
    from tcsae.harvest.resolve import HarvestConfig
    from tcsae.shared.store.format import Recipe
    from tcsae.shared.store.reader import Store


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
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model. Read it before you do."
)
@click.option(
    "--dataset",
    default="pydocs",
    show_default=True,
    metavar="NAME",
    help="The text: pydocs (the documentation installed here), openwebtext, a file or folder of .txt, .md, .rst, "
    ".jsonl, .json or .parquet, or a Hub id.",
)
@click.option("--dataset-revision", metavar="REV", help="Branch, tag or commit of a Hub dataset.")
@click.option(
    "--dataset-config", "--dataset-name", "dataset_config", metavar="NAME", help="Configuration of a Hub dataset."
)
@click.option(
    "--split",
    "--dataset-split",
    "split",
    default="train",
    show_default=True,
    metavar="NAME",
    help="Split of a Hub dataset.",
)
@click.option(
    "--text-field",
    "--dataset-column",
    "text_field",
    default="text",
    show_default=True,
    metavar="NAME",
    help="The column that holds the text.",
)
@click.option(
    "--tokens-field", metavar="NAME", help="The column that holds token ids of this model, where there is no text."
)
@click.option(
    "--chat-template",
    metavar="own|FILE",
    help="Read conversations, a list of messages a row: by the tokenizer's own template, or that of a file (Jinja).",
)
@click.option(
    "--messages-field",
    default="messages",
    show_default=True,
    metavar="NAME",
    help="With --chat-template: the column that holds the messages.",
)
@click.option(
    "--roles",
    metavar="ROLE,...",
    help="With --chat-template: mark whose tokens are whose, e.g. assistant,user, for train and eval --positions ROLE.",
)
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
    help="Tokens to store, over both splits; K, M and G are powers of 1000. A finished store of fewer is extended.",
)
@click.option("--sequences", type=Count(), help="Sequences to store, in place of --tokens.")
@click.option("--sequence-length", default=128, show_default=True, help="Positions of a sequence, at most.")
@click.option(
    "--min-length",
    default=3,
    show_default=True,
    help="Leave out a document's last piece if it has fewer tokens (a window has 3).",
)
@click.option(
    "--prepend-bos/--no-prepend-bos",
    default=False,
    show_default=True,
    help="Begin every sequence with the tokenizer's BOS token.",
)
@click.option(
    "--lm-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The model's dtype; bfloat16 and float16 need a GPU.",
)
@device_option("the model runs")
@click.option("--batch-size", default=32, show_default=True, help="Sequences in one forward pass.")
@click.option(
    "--eval-every",
    default=20,
    show_default=True,
    help="One document in so many, chosen by the hash of its text, goes to the eval split.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Shuffles the documents; 0 keeps their order. Also the seed of --control.",
)
@click.option(
    "--control",
    type=click.Choice(["permuted", "random-weights"]),
    help="A null in place of the store: each document's tokens in random order, or the model as it is before training.",
)
@codec_option(
    "How activations are stored; compact takes about a fifth of float16's bytes. The eval split is float16 or "
    "float32 whatever the codec.  [default: float16; with --lm-dtype bfloat16 bfloat16, which has its range and "
    "precision]",
)
@click.option(
    "--codec-error",
    type=float,
    metavar="SHARE",
    help="Of compact: mean squared error relative to the variance.  [default: 0.01]",
)
@click.option("--exact", is_flag=True, help="Fail if the corpus has less text than --tokens.")
@click.option("--dry-run", is_flag=True, help="Print size and time, measured on a batch. Leaves nothing behind.")
@click.option(
    "--force",
    is_flag=True,
    help="Begin even if the disk is too small; take the lock of a dead process in an object store.",
)
@click.option("--fresh", is_flag=True, help="Delete the activation store that is there and start anew.")
@click.pass_context
def harvest(ctx: click.Context, **options: Any) -> None:
    """Run a language model over text once and store its activations.

    \b
      tcsae harvest                                  the embedded model and corpus, no network
      tcsae --store pythia.zarr harvest --model EleutherAI/pythia-70m --dataset openwebtext --tokens 50M
      tcsae --store mine.zarr harvest --model ./model --dataset texts.jsonl --hook blocks.2.hook_mlp_out
      tcsae --store big.zarr harvest --model ./model --dataset texts.jsonl --tokens 1G --dry-run    size and time alone

    Documents become sequences, one document in each, in a train and an eval split. The model runs up to the deepest
    hook. Killed at any moment, the same command goes on where it stopped; a finished store of the same settings is used
    as it is.

    In several processes, `torchrun --nproc-per-node N -m tcsae harvest ...` or anything that sets RANK and WORLD_SIZE,
    the same store is made by all of them, each going on by itself; sequences by rank 0, then activations.
    """
    from tcsae.harvest.run import harvest as run
    from tcsae.harvest.run import plan_harvest

    if options["sequences"] is not None and ctx.get_parameter_source("tokens") is ParameterSource.COMMANDLINE:
        raise click.UsageError("Give --tokens or --sequences, not both.", ctx)
    place: Place = ctx.obj
    config, fresh, exact = config_of(options), options["fresh"], options["exact"]
    if options["dry_run"]:
        print_plan(plan_harvest(place.store, config, fresh=fresh, exact=exact))
    else:
        print_summary(run(place.store, config, fresh=fresh, exact=exact, force=options["force"]))


def config_of(options: Mapping[str, Any]) -> "HarvestConfig":
    """What the command's options ask for. Raises ConfigError for some that exclude each other."""
    from tcsae.harvest.chat import ChatChoice
    from tcsae.harvest.documents import CorpusChoice
    from tcsae.harvest.resolve import HarvestConfig, ModelChoice
    from tcsae.shared.base.errors import ConfigError
    from tcsae.shared.store.format import ControlRecipe, SequenceRecipe

    if options["roles"] and not options["chat_template"]:
        raise ConfigError(f"--roles {options['roles']} needs --chat-template: without one there are no roles.")
    if options["chat_template"] and options["tokens_field"]:
        raise ConfigError(
            f"--chat-template {options['chat_template']} and --tokens-field {options['tokens_field']} are two ways to "
            "come by tokens. Give one."
        )
    roles = tuple(options["roles"].split(",")) if options["roles"] else ()
    chat = ChatChoice(template=options["chat_template"], roles=roles) if options["chat_template"] else None
    return HarvestConfig(
        model=ModelChoice(
            name=options["model"],
            revision=options["revision"],
            batch_size=options["batch_size"],
            dtype=options["lm_dtype"],
            device=options["device"],
            trust_remote_code=options["trust_remote_code"],
        ),
        corpus=CorpusChoice(
            name=options["dataset"],
            revision=options["dataset_revision"],
            config=options["dataset_config"],
            split=options["split"],
            field=options["messages_field"] if chat else options["tokens_field"] or options["text_field"],
            tokenized=options["tokens_field"] is not None,
            chat=chat is not None,
            seed=options["seed"],
        ),
        sequences=SequenceRecipe(
            length=options["sequence_length"],
            min_length=options["min_length"],
            prepend_bos=options["prepend_bos"],
            eval_every=options["eval_every"],
        ),
        chat=chat,
        hooks=options["hooks"],
        n_tokens=options["tokens"],
        n_sequences=options["sequences"],
        codec=options["codec"] or ("bfloat16" if options["lm_dtype"] == "bfloat16" else "float16"),
        codec_error=options["codec_error"],
        control=ControlRecipe(kind=options["control"], seed=options["seed"]) if options["control"] else None,
    )


def print_plan(plan: "Plan") -> None:
    """What a harvest will hold, and what it will take, on stdout."""
    from tcsae.harvest.cost import is_exact
    from tcsae.shared.base.console import duration, echo, size, table

    rows = [
        (name, values["train"], values["eval"])
        for name, values in (("sequences", plan.sequences), ("tokens", plan.tokens))
    ]
    table(f"{plan.location}: the plan", ["", "train", "eval"], rows)
    _print_control(plan.recipe)
    n_tokens = max(1, sum(plan.tokens.values()))
    for codec, n_bytes in plan.activations.items():
        chosen = " (chosen)" if codec == plan.recipe.codec else ""
        about = "" if is_exact(codec) else "about "
        echo(f"  {codec:9s} {about}{size(n_bytes)}, {n_bytes / n_tokens:.0f} bytes a token{chosen}")
    probe = plan.probe
    room = "" if plan.free is None else f"; the disk has {size(plan.free)}"
    echo(f"  still to be written: {size(plan.needed)}, tails included{room}")
    echo(
        f"  measured on a batch, per token: the model {probe.model * 1e6:.3g} us, writing {probe.write * 1e6:.3g} us, "
        f"reading {probe.read * 1e6:.3g} us"
    )
    echo(f"  {plan.left:,} tokens to go: {duration(plan.seconds)}")
    ratio = "(model + writing) / (model - reading)"
    echo(
        f"  the store is ahead of running the model again from {probe.break_even} passes over the tokens on, {ratio}; "
        "an SAE trained alone is one"
        if probe.break_even
        else "  reading takes as long as the model: a store will not pay"
    )


def print_summary(store: "Store") -> None:
    """What the store holds, what was left out, and what it costs on disk."""
    from tcsae.shared.base.console import echo, size, table

    counts = store.manifest.counts
    title = f"{store.location}: {store.manifest.recipe.model.name} over {store.manifest.recipe.corpus.name}"
    names = ["sequences", "tokens", "documents", *(f"tokens_of_{role}" for role in store.manifest.recipe.roles)]
    rows = [(name, counts["train"].get(name, 0), counts["eval"].get(name, 0)) for name in names]
    table(title, ["", "train", "eval"], rows)
    _print_control(store.manifest.recipe)
    n_tokens = counts["train"]["tokens"] + counts["eval"]["tokens"]
    parts = store.n_bytes()
    echo(f"  {size(sum(parts.values()))} on disk, {sum(parts.values()) / n_tokens:.0f} bytes a token")
    for hook in store.hooks:
        tail = store.manifest.tails[hook]
        after = (
            tail.get("none") or f"tail saved (layers: {tail['layers']}, off by {tail['max_difference']:g} nats at most)"
        )
        echo(f"  {hook}: {size(parts.get(f'activations {hook}', 0))}, width {store.d_model(hook)}; {after}")
    echo(f"  {counts['documents_read']:,} documents read; {', '.join(_left_out(counts)) or 'all of them stored'}")


def _left_out(counts: Mapping[str, Any]) -> list[str]:
    """What of the text is not stored, and why; nothing of what is 0."""
    reasons = {
        "documents_skipped": "documents came after their split had all its tokens",
        "documents_empty": "documents are too short for a sequence",
        "tokens_beyond_budget": "tokens came after their split had all of its own",
        "tokens_dropped_short": "tokens are ends of documents too short for a sequence",
    }
    return [f"{counts[name]:,} {reason}" for name, reason in reasons.items() if counts[name]]


def _print_control(recipe: "Recipe") -> None:
    if recipe.control:
        from tcsae.shared.base.console import echo

        echo(f"  control {recipe.control}")
