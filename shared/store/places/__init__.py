"""Where a store lies: a folder, an object store or a zip file. Only `objects_at` knows these kinds."""

from tcsae.shared.store.places.base import Objects, is_remote
from tcsae.shared.store.places.local import LocalObjects


def objects_at(location: str) -> Objects:
    """What is at a location: a folder, an object store's URL, or a zip file.

    Raises StoreError for a URL of an unknown kind, or one that takes a library which is not installed.
    """
    if is_remote(location):
        from tcsae.shared.store.places.remote import remote_objects

        return remote_objects(location)
    if location.endswith(".zip"):
        from tcsae.shared.store.places.zip import ZipObjects

        return ZipObjects(location)
    return LocalObjects(location)
