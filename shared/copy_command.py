"""The command `copy`."""

import click

from tcsae.shared.cli import StageCommand


@click.command(cls=StageCommand)
@click.option("--from", "source", required=True, metavar="STORE", help="A sealed store: a folder, a zip file, a URL.")
@click.option("--to", "target", required=True, metavar="STORE", help="A new place: a folder, a URL, or a file .zip.")
@click.option(
    "--codec",
    type=click.Choice(["float16", "float32", "bfloat16", "int8", "compact"]),
    help="Store the activations anew in this form. Default: as they are.",
)
@click.option("--codec-error", type=float, metavar="SHARE", help="Of compact, as in harvest.")
def copy(source: str, target: str, codec: str | None, codec_error: float | None) -> None:
    """Copy a store to another place, or into another codec.

    \b
      tcsae copy --from data/activations.zarr --to s3://bucket/activations.zarr
      tcsae copy --from data/activations.zarr --to small.zarr --codec compact
      tcsae copy --from small.zarr --to small.zarr.zip

    Every object is checked against its digest on the way; a copy in the same codec is the same store, byte for byte.
    Interrupted, the same command goes on where it stopped; into a zip, which can be read only, it starts anew.
    """
    from tcsae.shared.console import progress, size
    from tcsae.shared.copying import copy_bytes, copy_store
    from tcsae.shared.store import open_store

    store = open_store(source)
    anew = codec is not None and (codec != store.manifest.recipe.codec or codec_error is not None)
    total = store.train.n_tokens + store.eval.n_tokens if anew else copy_bytes(store)
    with progress(f"copy to {target}", total, unit="tokens" if anew else "bytes") as advance:
        made = copy_store(source, target, advance, codec=codec, error=codec_error)
    click.echo(f"{target}: {size(copy_bytes(made))}, {made.manifest.recipe.codec}, content {made.content[:12]}")
