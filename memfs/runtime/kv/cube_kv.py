"""The KV cache of a cube as a file in the store: is it good, what can be kept of it, a new one.

Blocking; used by the service, in its I/O threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from memfs.cube import layout
from memfs.cube.kvfile import check_tensors
from memfs.errors import KVStale, MemfsError
from memfs.runtime.cubes import Cube, Signature, Text, signature_of
from memfs.runtime.kv import kv_store
from memfs.runtime.kv.encoding import Earlier, Encoded
from memfs.runtime.model.resident import Resident
from memfs.vault.publish import publishing


def ready(cube: Cube, resident: Resident, text: Text, storage: str) -> dict[str, Any] | None:
    """What an encode has to say of a KV cache that fits already; None where there is none.

    Args:
        storage: as it must be stored.
    """
    with _beside(cube, text) as fd:
        if fd is None:
            return None
        try:
            header = kv_store.fit(fd, resident, text.sha256)
            if header.storage != storage:
                return None
            check_tensors(fd, header)
        except MemfsError:
            return None
        size = os.fstat(fd).st_size
    return {
        "tokens": header.tokens,
        "kept_tokens": header.tokens,
        "seconds": 0.0,
        "bytes": size,
        "storage": storage,
    }


def earlier(cube: Cube, resident: Resident, text: Text) -> Earlier | None:
    """This model's KV cache of an earlier text of the cube, if there is one that can be trusted."""
    with _beside(cube, text) as fd:
        return None if fd is None else earlier_in(fd, resident)


def earlier_in(fd: int, resident: Resident) -> Earlier | None:
    """The same of an open file.

    One in int8 is none: its rows are not what the model computes, and would be rounded once more.
    """
    try:
        if kv_store.fit(fd, resident, None).storage != "exact":
            return None
        return kv_store.read(fd, resident, None, room=0)
    except MemfsError:
        return None


def publish(
    cube: Cube, resident: Resident, encoded: Encoded, text: Text, storage: str
) -> Signature:
    """Publishes the file, owned like the text; what it is by then.

    Raises, and publishes nothing: KVStale where the text changed meanwhile, NotAllowed where the
    cube was frozen, MemfsError where int8 cannot store what the model made.
    """
    kept = -1
    try:
        # The directory that is looked at is the one that is written to.
        with (
            cube.open(None) as files,
            publishing(files.directory, layout.KV, like=layout.PAYLOAD) as (fd, _),
        ):
            kept = os.dup(fd)  # asked after the rename, which changes the status
            kv_store.write(fd, encoded.cache, resident, encoded.ids, text.sha256, storage)
            with files.again() as now:
                if now.signature != text.signature and now.text().sha256 != text.sha256:
                    raise KVStale(f"{cube.path}: the text changed while it was encoded")
            cube.require_writable()
        return signature_of(kept)
    finally:
        if kept >= 0:
            os.close(kept)


@contextlib.contextmanager
def _beside(cube: Cube, text: Text) -> Iterator[int | None]:
    """The KV cache that lies beside this very text; None where there is none to be read."""
    try:
        files = cube.open(None)
    except (MemfsError, OSError):
        yield None
        return
    with files:
        try:
            fd = files.open_kv()[0] if files.signature == text.signature else None
        except (MemfsError, OSError):
            fd = None
        yield fd
