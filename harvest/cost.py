"""What a harvest will cost, exactly where that can be: after phase 1 every sequence is known.

When the cache pays: n passes over the tokens (an SAE trained alone, or an evaluation, is one) cost n * model without a
store, and model + write + n * read with one, in seconds a token. So the store is ahead from the first whole n above
(model + write) / (model - read).
"""

import math
import time
from dataclasses import dataclass
from shutil import disk_usage

import google_crc32c
import numpy as np

from tcsae.harvest.capture import Capture
from tcsae.harvest.sequences import n_tokens
from tcsae.shared.base.console import duration, size
from tcsae.shared.base.errors import StoreError
from tcsae.shared.base.files import PARTIAL
from tcsae.shared.store.codecs import CODECS, COMPACT_ERROR, EXACT, representation, stored_width
from tcsae.shared.store.format import SPLITS, Recipe
from tcsae.shared.store.journal import FOLDER
from tcsae.shared.store.places.base import Objects
from tcsae.shared.store.places.local import LocalObjects
from tcsae.shared.store.reader import CRC_BYTES
from tcsae.shared.store.writer import StoreWriter

COMPACT_BITS, COMPACT_BITS_PER_DECADE = 3.5, 1.5
"""Of a number at an error of 1e-2 (3.1 to 3.9 on three language models), and more for each tenth of that error."""


@dataclass(frozen=True)
class Probe:
    """Seconds a valid token, measured on a batch of the corpus: the model up to the hooks; encoding as float16 and
    writing; reading back (from memory, as a disk's cache would) and making float32 of it.
    """

    model: float
    write: float
    read: float

    @property
    def break_even(self) -> int | None:
        """Passes over the tokens from which the store is ahead; None if reading is slower than the model."""
        if self.model <= self.read:
            return None
        return math.floor((self.model + self.write) / (self.model - self.read)) + 1


@dataclass(frozen=True)
class Plan:
    """A store before its activations are computed."""

    recipe: Recipe
    sequences: dict[str, int]
    tokens: dict[str, int]
    left: int
    """Valid tokens whose activations are not on disk."""
    activations: dict[str, int]
    """Codec -> bytes of all activations as it stores them; of `compact`, about."""
    needed: int
    """Bytes still to be written, tails included."""
    free: int | None
    """Bytes that the disk has; None of an object store."""
    location: str
    probe: Probe

    @property
    def seconds(self) -> float:
        """Of phase 2, from here."""
        return self.left * (self.probe.model + self.probe.write)

    def line(self) -> str:
        """One line for people."""
        about = "" if is_exact(self.recipe.codec) else "about "
        passes = self.probe.break_even
        even = f"ahead of running the model again from {passes} passes on" if passes else "no faster than the model"
        return (
            f"Plan: {sum(self.sequences.values()):,} sequences, {sum(self.tokens.values()):,} tokens, "
            f"{about}{size(self.activations[self.recipe.codec])} as {self.recipe.codec}; {self.left:,} tokens to go at "
            f"{1 / (self.probe.model + self.probe.write):,.0f} a second: {duration(self.seconds)}. The store is {even}."
        )

    def check_room(self, force: bool) -> None:
        """Raises NoRoomError if the disk has not the room, unless `force`."""
        if self.free is not None and self.needed > self.free and not force:
            raise no_room(self.location, self.needed, self.free)


def make_plan(writer: StoreWriter, capture: Capture) -> Plan:
    """Count, and time a batch. Phase 1 must be done."""
    recipe, counts = writer.manifest.recipe, writer.manifest.counts
    missing = writer.missing_shards()
    left = sum(int(writer.lengths(shard).sum()) for shard in missing)
    activations = {codec: activation_bytes(writer, codec) for codec in CODECS}
    share = left / max(1, n_tokens(counts))
    return Plan(
        recipe=recipe,
        sequences={split: counts[split]["sequences"] for split in SPLITS},
        tokens={split: counts[split]["tokens"] for split in SPLITS},
        left=left,
        activations=activations,
        needed=math.ceil(activations[recipe.codec] * share) + capture.tail_bytes(),
        free=free_bytes(writer.objects),
        location=writer.location,
        probe=measure(writer, capture),
    )


def is_exact(codec: str) -> bool:
    """Whether a codec's rows have the same size whatever is in them."""
    return codec != "compact"


def activation_bytes(writer: StoreWriter, codec: str) -> int:
    """Bytes of all activations, were they stored as `codec`; the eval split of an inexact one as float16."""
    recipe, total = writer.manifest.recipe, 0
    for split in SPLITS:
        counts = writer.manifest.counts[split]
        split_codec = codec if split == "train" or codec in EXACT else "float16"
        for hook in recipe.hooks:
            if not is_exact(split_codec):
                error = recipe.codec_error or COMPACT_ERROR
                bits = max(1.0, COMPACT_BITS + COMPACT_BITS_PER_DECADE * math.log10(COMPACT_ERROR / error))
                total += math.ceil(counts["tokens"] * hook.d_model * bits / 8)
                continue
            per_chunk = writer.manifest.layout.sequences_per_chunk
            n_chunks = -(-counts["sequences"] // per_chunk)
            width = stored_width(split_codec, hook.d_model) * representation(split_codec).dtype.itemsize
            total += n_chunks * (per_chunk * recipe.sequences.length * width + CRC_BYTES)
    return total


def measure(writer: StoreWriter, capture: Capture) -> Probe:
    """Time one batch of what is to be done next, after one to warm up."""
    shard = (writer.missing_shards() or writer.shards())[0]
    n = capture.batch_size
    tokens, lengths = writer.tokens(shard)[:n], writer.lengths(shard)[:n]
    capture.run(tokens, lengths)
    start = time.perf_counter()
    activations = capture.run(tokens, lengths)
    model = time.perf_counter() - start
    key = f"{FOLDER}/probe{PARTIAL}"  # killed, it goes with the journal
    write = read = 0.0
    try:
        for x in activations.values():
            start = time.perf_counter()
            with np.errstate(over="ignore"):
                writer.objects.put(key, x.astype(np.float16).tobytes())
            wrote = time.perf_counter()
            data = np.frombuffer(writer.objects.get(key), np.uint8)
            google_crc32c.value(data)
            data.view(np.float16).astype(np.float32)
            write, read = write + wrote - start, read + time.perf_counter() - wrote
    finally:
        writer.objects.delete([key])
    n_valid = int(lengths.sum())
    return Probe(model / n_valid, write / n_valid, read / n_valid)


def free_bytes(objects: Objects) -> int | None:
    """Bytes that the disk of a store has; None of an object store."""
    return disk_usage(objects.root).free if isinstance(objects, LocalObjects) else None


class NoRoomError(StoreError):
    """The disk has not the room for what is asked for."""


def no_room(location: str, needed: int, free: int) -> NoRoomError:
    return NoRoomError(
        f"{location} needs {size(needed)} more and its disk has {size(free)}. Make room, ask for fewer --tokens or "
        "another --codec, or begin all the same with --force."
    )
