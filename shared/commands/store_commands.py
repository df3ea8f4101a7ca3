"""The commands that act on what is on disk: verify, copy and inspect a store, export a trained SAE."""

import json
from pathlib import Path

import click

from tcsae.shared.base.cli import Place, StageCommand, codec_option
from tcsae.shared.base.errors import StoreError


@click.command(cls=StageCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of lines.")
@click.pass_obj
def verify(place: Place, as_json: bool) -> None:
    """Check every byte of a store against its digest, and what the bytes say.

    \b
      tcsae verify
      tcsae --store s3://bucket/activations.zarr verify --json

    Checked: the digest of each object, missing and surplus objects, shapes, lengths, ids, finite values, no document in
    both splits, the tails, the manifest. Every object at fault is named, and the exit code is then 1. Nothing is
    changed.
    """
    from tcsae.shared.base.console import progress, size
    from tcsae.shared.store.reader import open_store
    from tcsae.shared.store.verify import find_faults, stored_bytes

    n_bytes, faults = stored_bytes(place.store), []
    with progress(f"verify {place.store}", n_bytes, unit="bytes") as advance:
        for fault in find_faults(place.store, advance):
            faults.append(fault)
            if not as_json:
                click.echo(fault)
    if as_json:
        click.echo(
            json.dumps({"store": place.store, "whole": not faults, "bytes": n_bytes, "faults": faults}, indent=2)
        )
    if faults:
        n = len(faults)
        raise StoreError(f"{place.store} is damaged: {n} fault{'s' * (n > 1)}, named above. Harvest it again.")
    if as_json:
        return
    store = open_store(place.store)
    n_tokens = store.train.n_tokens + store.eval.n_tokens
    click.echo(
        f"{place.store} is whole: {len(store.manifest.objects()) + 3:,} objects, {size(n_bytes)}, {n_tokens:,} tokens"
    )


@click.command(cls=StageCommand)
@click.option("--from", "source", required=True, metavar="STORE", help="A sealed store: a folder, a zip file, a URL.")
@click.option("--to", "target", required=True, metavar="STORE", help="A new place: a folder, a URL, or a file .zip.")
@codec_option("Store the activations anew in this form. Default: as they are.")
@click.option("--codec-error", type=float, metavar="SHARE", help="Of compact, as in harvest.")
def copy(source: str, target: str, codec: str | None, codec_error: float | None) -> None:
    """Copy a store to another place or into another codec, checked and resumable.

    \b
      tcsae copy --from data/activations.zarr --to s3://bucket/activations.zarr
      tcsae copy --from data/activations.zarr --to small.zarr --codec compact
      tcsae copy --from small.zarr --to small.zarr.zip

    Every object is checked against its digest on the way; a copy in the same codec is the same store, byte for byte.
    Interrupted, the same command goes on where it stopped; into a zip, which can be read only, it starts anew.
    """
    from tcsae.shared.base.console import progress, size
    from tcsae.shared.store.copy import copy_bytes, copy_store, encodes_anew, finished_copy
    from tcsae.shared.store.reader import open_store

    store = open_store(source)
    if (done := finished_copy(store, target, codec, codec_error)) is not None:
        click.echo(f"{target} is that copy already, content {done.content[:12]}: nothing was written.")
        return
    anew = encodes_anew(store, codec, codec_error)
    total = store.train.n_tokens + store.eval.n_tokens if anew else copy_bytes(store)
    with progress(f"copy to {target}", total, unit="tokens" if anew else "bytes") as advance:
        copied = copy_store(source, target, advance, codec=codec, error=codec_error)
    click.echo(f"{target}: {size(copy_bytes(copied))}, {copied.manifest.recipe.codec}, content {copied.content[:12]}")


@click.command(cls=StageCommand)
@click.option(
    "--sequences",
    "n_sequences",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Number of sequences shown as text.",
)
@click.option(
    "--split",
    type=click.Choice(("train", "eval")),
    default="eval",
    show_default=True,
    help="Split that the sequences are from.",
)
@click.option("--details", is_flag=True, help="Also print digests and revisions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of text.")
@click.pass_obj
def inspect(place: Place, n_sequences: int, split: str, details: bool, as_json: bool) -> None:
    """Show what the store and the runs hold: recipe, sizes on disk, a few sequences as text, figures of the runs.

    \b
      tcsae inspect
      tcsae inspect --split train --sequences 10
      tcsae inspect --json

    An unfinished store says how far its harvest is. Nothing is changed, and no language model is loaded.
    """
    if as_json:
        from tcsae.shared.commands.store_json import summary

        click.echo(json.dumps(summary(place.store, Path(place.runs)), indent=2))
        return
    from tcsae.shared.store.inspect import show

    show(place.store, Path(place.runs), n_sequences, split, details)
