"""The command `import`."""

from typing import Any

import click

from tcsae.shared.base.cli import Place, StageCommand, codec_option


@click.command(name="import", cls=StageCommand, short_help="Make a store of activations that another program saved.")
@click.option(
    "--from",
    "source",
    type=(click.Choice(["saelens", "vllm", "nnsight", "npy", "safetensors"]), str),
    required=True,
    metavar="FORM PATH",
    help="saelens, vllm, nnsight (.pt), npy or safetensors, and the file or folder.",
)
@click.option(
    "--hook",
    "hooks",
    multiple=True,
    metavar="NAME",
    help="What the store calls the activations, as TransformerLens does; repeatable. Default: as the source does.",
)
@click.option(
    "--model", default="unknown", show_default=True, metavar="NAME", help="The language model, for the record."
)
@click.option(
    "--tokenizer", metavar="NAME", help="Keep this model's tokenizer in the store, so that tokens show as text."
)
@click.option(
    "--sequence-length", type=click.IntRange(min=1), help="Cut longer sequences. Default: the source's, or 128."
)
@click.option(
    "--min-length", default=3, show_default=True, type=click.IntRange(min=1), help="Leave out shorter sequences."
)
@click.option(
    "--start-token", type=click.IntRange(min=0), metavar="ID", help="A document begins at each token of this id."
)
@click.option(
    "--eval-every", default=20, show_default=True, help="One document in so many, by a hash, goes to the eval split."
)
@codec_option("How activations are stored, as in harvest.", default="float16")
@click.option("--codec-error", type=float, metavar="SHARE", help="Of compact, as in harvest.")
@click.pass_obj
def import_(place: Place, source: tuple[str, str], **options: Any) -> None:
    """Make a store of activations that another program saved; train and eval take it as any other.

    \b
      tcsae --store a.zarr import --from saelens cached_activations --hook blocks.4.hook_resid_post --start-token 0
      tcsae --store b.zarr import --from vllm hidden_states --hook layer8 --hook layer16
      tcsae --store c.zarr import --from npy folder

    \b
    saelens      the folder of CacheActivationsRunner (Arrow)
    vllm         hidden states of extract_hidden_states, a .safetensors file a request
    nnsight      .pt files: a tensor, or tensors by name
    npy          .npy or .npz, files side by side: NAME.npy, tokens.npy, documents.npy; NAME_0.npy, tokens_0.npy, ...
    safetensors  the same by name inside each file

    Activations are [sequences, positions, width] or [tokens, width]; tokens (token_ids, input_ids), attention_mask,
    documents (document_ids) and, of sequences, lengths are optional. Without sequences or documents the vectors are
    stored one by one: no windows. There is no tail, so no cross-entropies.
    """
    from pathlib import Path

    from tcsae.harvest.imports.run import ImportRequest, import_store
    from tcsae.shared.base.console import echo, size, table

    form, path = source
    request = ImportRequest(form=form, path=Path(path), **options)  # type: ignore[arg-type]  # click has checked it
    store, counts = import_store(place.store, request)
    of = store.manifest.counts
    rows = [(name, of["train"][name], of["eval"][name]) for name in ("sequences", "tokens", "documents")]
    table(f"{store.location}: from {form} {path}", ["", "train", "eval"], rows)
    widths = ", ".join(f"{hook} of width {store.d_model(hook)}" for hook in store.hooks)
    echo(f"  {widths}; {size(sum(store.n_bytes().values()))} on disk")
    echo(
        f"  {counts['tokens_read']:,} tokens read = {counts['train'] + counts['eval']:,} stored + "
        f"{counts['tokens_dropped_short']:,} in sequences shorter than --min-length"
    )
