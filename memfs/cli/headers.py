"""Saying something in a cube's header, as an editor would. Used by ``pin`` and ``encode``; the main
thread."""

from __future__ import annotations

import contextlib
import os

from memfs.cli import targets
from memfs.cube import layout, metadata
from memfs.errors import NotAllowed
from memfs.vault.frozen import Frozen
from memfs.vault.identity import first_header, holder, read_meta
from memfs.vault.lock import lock
from memfs.vault.publish import publish_bytes, write_all


def set_state(cube: targets.Target, name: str, value: bool | str) -> None:
    """Sets a field of the header's ``state``: through the mount, or in the store where none is.

    Raises NotAllowed where the cube is frozen, OSError where one may not write it, InvalidMetadata
    where the header that is there is not valid.
    """
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(targets.open_store(cube.store))
        mounted = str(store.root) != cube.store
        if not mounted:
            stack.enter_context(lock(store, f"is being written by process {os.getpid()}"))
        if Frozen(store).over(cube.path) is not None:
            raise NotAllowed(f"{cube.path} is frozen")
        path = layout.join(cube.path, layout.META)
        try:
            meta = read_meta(store, cube.path)
        except FileNotFoundError:
            meta = first_header(None, cube.path)
        state = meta.setdefault("state", {})
        if state.get(name, metadata.new()["state"][name]) == value:
            return
        state[name] = value
        data = metadata.render(meta)
        if not mounted:
            publish_bytes(store, path, data, like=holder(store, cube.path))
            return
        fd = store.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)  # the mount takes it as a whole, or refuses it, now
