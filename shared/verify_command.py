"""The command `verify`."""

import click

from tcsae.shared.cli import Place, StageCommand
from tcsae.shared.errors import StoreError


@click.command(cls=StageCommand)
@click.pass_obj
def verify(place: Place) -> None:
    """Check the store against what was written: every byte of it, and what the bytes say.

    Each object's bytes against its digest, and that no object lacks or is too many; shapes, lengths, ids, finite
    values, no document in both splits, the tails, the manifest. Every object at fault is named, and the
    exit code is then 1. Nothing is changed.
    """
    from tcsae.shared.console import progress, size
    from tcsae.shared.store import open_store
    from tcsae.shared.verification import find_faults, stored_bytes

    n_bytes = stored_bytes(place.store)
    n_faults = 0
    with progress(f"verify {place.store}", n_bytes, unit="bytes") as advance:
        for fault in find_faults(place.store, advance):
            click.echo(fault)
            n_faults += 1
    if n_faults:
        raise StoreError(
            f"{place.store} is damaged: {n_faults} fault{'s' * (n_faults > 1)}, named above. Harvest it again."
        )
    store = open_store(place.store)
    n_tokens = store.train.n_tokens + store.eval.n_tokens
    click.echo(
        f"{place.store} is whole: {len(store.manifest.objects()) + 3:,} objects, {size(n_bytes)}, {n_tokens:,} tokens, "
        f"content {store.content[:12]}"
    )
