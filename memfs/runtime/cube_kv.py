"""The KV cache of a cube as a file in the store: is it good, what can be kept of it, a new one.

Blocking; used by the service, in its I/O threads.
"""

from __future__ import annotations

import os
from typing import Any

from memfs.cube.kvfile import check_tensors
from memfs.errors import KVStale, MemfsError
from memfs.runtime import kv_store
from memfs.runtime.cubes import Cube, Text
from memfs.runtime.encoding import Encoded
from memfs.runtime.kv_cache import KVCache
from memfs.runtime.resident import Resident
from memfs.vault.publish import publishing


def ready(cube: Cube, resident: Resident, text: Text) -> dict[str, Any] | None:
    """What an encode has to say of a KV cache that fits already; None where there is none."""
    try:
        fd, _ = cube.open_kv()
    except (MemfsError, OSError):
        return None
    try:
        header = kv_store.fit(fd, resident.fingerprint, text.sha256)
        check_tensors(fd, header)
        size = os.fstat(fd).st_size
    except MemfsError:
        return None
    finally:
        os.close(fd)
    return {"tokens": header.tokens, "kept_tokens": header.tokens, "seconds": 0.0, "bytes": size}


def earlier(cube: Cube, resident: Resident) -> tuple[KVCache, list[int]] | None:
    """This model's KV cache of an earlier text of the cube, if there is one that can be trusted."""
    try:
        fd, _ = cube.open_kv()
    except (MemfsError, OSError):
        return None
    try:
        return kv_store.read(fd, resident, None, room=0)
    except MemfsError:
        return None
    finally:
        os.close(fd)


def publish(cube: Cube, resident: Resident, encoded: Encoded, text: Text) -> int:
    """Publishes the file, owned like the text; its bytes.

    Raises, and publishes nothing: KVStale where the text changed meanwhile, NotAllowed where the
    cube was frozen.
    """
    with publishing(cube.store, cube.kv, like=cube.payload) as (fd, _):
        size = kv_store.write(fd, encoded.cache, resident, encoded.ids, text.sha256)
        if cube.signature(cube.payload) != text.signature and cube.text().sha256 != text.sha256:
            raise KVStale(f"{cube.path}: the text changed while it was encoded")
        cube.require_writable()
    return size
