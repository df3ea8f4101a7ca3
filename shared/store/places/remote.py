"""Object stores: s3://, gs://, az:// and, to read, http(s)://. Requests, signatures and retries are obstore's."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore as ZarrObjectStore

from tcsae.shared.base.errors import DeniedError, RemoteError
from tcsae.shared.store.places.base import BLOCK_BYTES, Lock, Objects, T, in_thread
from tcsae.shared.store.places.leases import Lease, alive, describe

if TYPE_CHECKING:
    from obstore.store import ObjectStore


Tag = dict[str, str]
"""What tells one state of an object from the next: S3 and Azure have an e_tag, Google a version."""
SCHEMES = ("s3", "gs", "az", "http", "https")
N_READERS = 64
"""Requests under way at once, at most."""
RETRY_S = 120.0
"""A request that is throttled (503) or dropped is made again, with growing pauses, for so long."""
FIRST_PAUSE_S = 0.1
TIMEOUT_S = 120.0
"""Of one request; a chunk has some 4 MiB."""
CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile (AWS_PROFILE), or for a public bucket "
    "AWS_SKIP_SIGNATURE=true.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or for a public bucket GOOGLE_SKIP_SIGNATURE=true.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or what else Azure takes.",
}
MULTIPART_BYTES = 1 << 30


def remote_objects(location: str) -> "RemoteObjects":
    """The objects below a URL.

    Raises RemoteError for an unknown kind of URL, or if obstore is not installed.
    """
    scheme = location.partition("://")[0]
    if scheme not in SCHEMES:
        raise RemoteError(f"{location!r}: unknown kind of URL. There is {', '.join(f'{one}://' for one in SCHEMES)}.")
    if not location.partition("://")[2].partition("/")[0]:
        raise RemoteError(
            f"{location!r} names no {'host' if 'http' in scheme else 'bucket'}. Write {scheme}://NAME/PATH."
        )
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise RemoteError(f"{location}: object stores take obstore. Install it: pip install 'tcsae[remote]'") from error
    options: dict[str, Any] = {"timeout": timedelta(seconds=TIMEOUT_S), "pool_max_idle_per_host": str(N_READERS)}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if location.startswith("http://") or endpoint.startswith("http://"):
        options["allow_http"] = True  # asked for by whoever wrote that address
    retry = {
        "max_retries": 1000,  # the time is what counts
        "retry_timeout": timedelta(seconds=RETRY_S),
        "backoff": {"init_backoff": timedelta(seconds=FIRST_PAUSE_S), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    more: dict[str, Any] = {}
    if scheme == "s3":
        more = _profile()
        if not more:
            _check_credentials()
        more |= {"endpoint": endpoint} if endpoint else {}
    try:
        make: Any = from_url  # typed by kind of URL, which is known at run time only
        store = make(location.rstrip("/"), client_options=options, retry_config=retry, **more)
    except Exception as error:  # its own kinds for a URL or an environment variable that cannot be
        raise RemoteError(f"{location} cannot be used: {_brief(error)}") from error
    return RemoteObjects(location, store, writable=not scheme.startswith("http"))


def _profile() -> dict[str, Any]:
    """Credentials of ~/.aws, where the environment has none; obstore itself knows the environment and the machine's."""
    if "AWS_ACCESS_KEY_ID" in os.environ or os.environ.get("AWS_SKIP_SIGNATURE"):
        return {}
    files = (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), "~/.aws/config")
    if not any(Path(file).expanduser().is_file() for file in files):
        return {}
    from obstore.auth.boto3 import Boto3CredentialProvider

    with contextlib.suppress(ValueError):  # a profile without credentials
        return {"credential_provider": Boto3CredentialProvider()}
    return {}


def _check_credentials() -> None:
    """Raises RemoteError if there is nowhere for S3 credentials to come from: obstore would ask for minutes."""
    given = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_METADATA_ENDPOINT")
    container = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(os.environ.get(name) for name in (*given, *container)):
        return
    try:
        socket.create_connection(("169.254.169.254", 80), timeout=1).close()  # a machine of the cloud gives its own
    except OSError as error:
        raise RemoteError(f"There are no credentials for S3. {CREDENTIALS['s3']}") from error


class RemoteObjects(Objects):
    """Objects below a prefix of a bucket. Raises RemoteError, in one line, for what the store refuses."""

    n_readers = N_READERS

    def __init__(self, location: str, store: "ObjectStore", writable: bool) -> None:
        super().__init__(location.rstrip("/"))
        self.store = store
        self.writable = self.listable = writable

    def name(self, key: str) -> str:
        return f"{self.location}/{key}"

    def get(self, key: str) -> bytes:
        return bytes(self._bytes(key))

    def read_into(self, key: str, *views: memoryview) -> int:
        data, at = self._bytes(key), 0
        for view in views:
            n = min(len(view), len(data) - at)
            view[:n] = data[at : at + n]
            at += n
        return at

    def blocks(self, key: str) -> Iterator[bytes | memoryview]:
        import obstore

        at, size = 0, self.size(key)
        if size is None:
            raise FileNotFoundError(self.name(key))
        if size <= BLOCK_BYTES or not self.listable:  # a plain web server may not know ranges
            yield self._bytes(key)
            return
        while at < size:
            start, stop = at, min(at + BLOCK_BYTES, size)
            yield memoryview(
                self._asked(key, lambda: obstore.get_range(self.store, key, start=start, end=stop))  # noqa: B023
            )
            at = stop

    def size(self, key: str) -> int | None:
        import obstore

        try:
            return self._asked(key, lambda: obstore.head(self.store, key)["size"])
        except FileNotFoundError:
            return None

    def listed(self, prefix: str = "") -> dict[str, int]:
        import obstore

        def ask() -> dict[str, int]:
            batches = obstore.list(self.store, prefix or None)
            return {one["path"]: one["size"] for batch in batches for one in batch}

        return dict(sorted(self._asked(prefix, ask).items()))

    def zarr_store(self) -> Any:
        return RemoteStore(self, read_only=not self.writable)

    def lock(self, name: str, *, shared: bool = False, force: bool = False) -> Lock | None:
        return Lease.take(self, name, shared, force)

    def holder(self, name: str) -> str:
        return describe(alive(self, name))

    def get_with_tag(self, key: str) -> tuple[bytes, Tag, datetime]:
        """An object, its tag and when it was written. Raises FileNotFoundError."""
        import obstore

        def ask() -> tuple[bytes, Tag, datetime]:
            answer = obstore.get(self.store, key)
            return bytes(answer.bytes()), _tag(answer.meta), answer.meta["last_modified"]

        return self._asked(key, ask)

    def put_if(self, key: str, data: bytes, tag: Tag | None) -> Tag | None:
        """Create an object (`tag` None), or replace it if it is what it was; the new tag, or None if not done."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def ask() -> Tag:
            return _tag(obstore.put(self.store, key, data, mode=tag or "create"))  # type: ignore[arg-type]

        try:
            return self._asked(key, ask)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None

    @contextlib.contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Turn what obstore raises into one line; FileNotFoundError and unmet conditions stay what they are."""
        import obstore.exceptions as kinds

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                bucket = self.location.partition("://")[2].partition("/")[0]
                raise RemoteError(
                    f"{self.location}: there is no bucket {bucket!r}. Make it, or give another --store."
                ) from error
            raise FileNotFoundError(self.name(key)) from error
        except (kinds.AlreadyExistsError, kinds.PreconditionError):
            raise
        except kinds.BaseError as error:
            refused = isinstance(error, kinds.PermissionDeniedError | kinds.UnauthenticatedError)
            if refused or ("list request" in str(error) and "403 Forbidden" in str(error)):  # of no kind of its own
                raise DeniedError(
                    f"{self.name(key)}: access denied. Look at the credentials in the environment and at what the "
                    "bucket allows them; where it may not be listed, it says so of what is missing, too."
                ) from error
            raise RemoteError(f"{self.name(key)}: {_explanation(self.location, str(error))}") from error

    def _asked(self, key: str, ask: Callable[[], T]) -> T:
        """`ask`, made again where an answer was torn: obstore itself asks again for the rest of what can go wrong."""
        import obstore.exceptions as kinds

        start, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                with self.explained(key):
                    return ask()
            except RemoteError as error:
                over = time.monotonic() - start + pause > RETRY_S
                if (
                    over
                    or not isinstance(error.__cause__, kinds.GenericError)
                    or " status code: 4" in str(error.__cause__)
                ):
                    raise
                time.sleep(pause)
                pause = min(5.0, 2 * pause)

    def _bytes(self, key: str) -> memoryview:
        import obstore

        return memoryview(self._asked(key, lambda: obstore.get(self.store, key).bytes()))

    def _put(self, key: str, data: bytes) -> None:
        import obstore

        # Whole or absent either way; one PUT as far as S3 takes it (5 GB).
        many = len(data) > MULTIPART_BYTES
        self._asked(key, lambda: obstore.put(self.store, key, data, use_multipart=many))

    def _delete(self, keys: Sequence[str]) -> None:
        import obstore

        for start in range(0, len(keys), 1000):
            part = list(keys[start : start + 1000])
            with contextlib.suppress(FileNotFoundError):
                self._asked(part[0], partial(obstore.delete, self.store, part))


def _tag(meta: Any) -> Tag:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _explanation(location: str, text: str) -> str:
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return f"there are no credentials. {CREDENTIALS.get(location.partition('://')[0], '')}"
    if "SlowDown" in text or " 503 " in text or " 429 " in text:
        return f"the store refused for {RETRY_S:.0f} s to be asked that often (503). Start again later: it goes on."
    return f"the store does not answer as it should ({_brief(text)}). Start again: it goes on from what is there."


def _brief(error: object) -> str:
    text = " ".join(str(error).split("Debug source:")[0].split())
    return text if len(text) <= 200 else f"{text[:200]}..."


class RemoteStore(ZarrObjectStore):
    """Zarr's store on obstore's; each object is one PUT, and errors are one line."""

    def __init__(self, objects: "RemoteObjects", *, read_only: bool = False) -> None:
        super().__init__(objects.store, read_only=read_only)
        self._objects = objects

    def with_read_only(self, read_only: bool = False) -> "RemoteStore":
        return type(self)(self._objects, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is not None:  # our arrays have none, their chunks being read whole
            with self._objects.explained(key):
                return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes(await in_thread(self._objects.n_readers, self._objects.get, key))
        except FileNotFoundError:
            return None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await in_thread(self._objects.n_readers, self._objects.put, key, value.as_numpy_array().tobytes())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await in_thread(
            self._objects.n_readers, self._objects.has, key
        ):  # a store has one writer of each object
            await self.set(key, value)
