"""Identity: every cube of a store has an id of its own, kept through rename and copy.

``adopt`` gives a cube without meta.json its first one, and a copy made inside the store an id of
its own. Callers call it when a payload was closed, at a rescan, and after a settled change beside
the mount: never because a meta.json is gone, which is what ``rm -r`` looks like halfway. Any
thread.
"""

from __future__ import annotations

import logging
import os
import stat
import uuid
from collections.abc import Callable
from dataclasses import replace

from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.vault.facts import CubeFacts, with_meta
from memfs.vault.publish import publish_bytes
from memfs.vault.sig import sig_of
from memfs.vault.store import Store

log = logging.getLogger(__name__)


def adopt(
    store: Store, path: str, facts: CubeFacts, lookup: Callable[[str], str | None]
) -> CubeFacts:
    """``facts`` with an identity that no other living cube of the store has.

    Writes meta.json where that takes it. An invalid meta.json is left as it is, and so is one with
    an id that is new in this store: a cube from another machine keeps its identity.

    Args:
        lookup: the path that is known under an id, or None.

    Where meta.json cannot be written (a read-only store, a full disk) nothing is, and a copy has no
    id until it can be.
    """
    if facts.meta_reason is not None:
        return facts
    taken = facts.id is not None and _is_elsewhere(store, path, facts.id, lookup)
    if facts.meta_sig is None:
        meta = first_header(None if taken else facts, path)
    elif taken:
        try:
            found = read_meta(store, path)
        except (OSError, InvalidMetadata, NotAllowed):
            return facts  # it changed under us: the next look sees it
        if metadata.cube_id(found) != facts.id:
            return facts  # likewise
        meta = metadata.as_copy(found)
    else:
        return facts
    own = layout.join(path, layout.META)
    try:
        status = publish_bytes(
            store,
            own,
            metadata.render(meta),
            like=holder(store, path) if facts.meta_sig is None else own,
            replace=facts.meta_sig is not None,
        )
    except FileExistsError:
        return facts  # somebody else gave it one just now: the next look takes that
    except OSError as e:
        log.info("%s: cannot write its meta.json: %s", path, e.strerror)
        if not taken or facts.meta_sig is None:
            return facts
        return replace(facts, id=None, meta_sig=facts.meta_sig.unsettled())
    if facts.payload_sig is None and facts.kv_sig is None and facts.adapter_sig is None:
        facts = replace(facts, changed=status.st_mtime)  # its header is all that there is of it
    return with_meta(facts, meta, sig_of(status))


def read_meta(store: Store, path: str) -> metadata.Meta:
    """The header of the cube at ``path`` as it is on disk.

    Raises InvalidMetadata, NotAllowed (it is no regular file) or OSError.
    """
    return metadata.parse(store.read(layout.join(path, layout.META), metadata.MAX_BYTES))


def first_header(facts: CubeFacts | None, path: str) -> metadata.Meta:
    """The header for a directory that has none: as its facts remember it, if it had one before."""
    if facts is None or facts.id is None:
        return metadata.new(title=_title(path))
    return last_known(facts, path)


def last_known(facts: CubeFacts, path: str) -> metadata.Meta:
    """The header of a cube that has none, or an invalid one, as far as its facts remember it."""
    meta = metadata.new(title=facts.title or _title(path))
    unknown = str(uuid.uuid5(uuid.NAMESPACE_URL, os.fsencode(path).hex()))  # the same at each call
    meta["descriptive"] |= {
        "id": facts.id or unknown,
        "created": facts.created or metadata.rfc3339(facts.changed),
        "type": facts.type,
        "tags": list(facts.tags),
    }
    meta["governance"]["priority"] = facts.priority
    meta["state"] |= {
        "lifecycle": facts.lifecycle,
        "frozen": facts.frozen,
        "pinned": facts.pinned,
        "storage": facts.storage,
    }
    return meta


def _is_elsewhere(
    store: Store, path: str, cube_id: str, lookup: Callable[[str], str | None]
) -> bool:
    """Whether another living cube has this id: it is known there, and is there still."""
    other = lookup(cube_id)
    if other is None or other == path:
        return False
    try:
        return metadata.cube_id(read_meta(store, other)) == cube_id
    except (OSError, InvalidMetadata, NotAllowed):
        return False


def _title(path: str) -> str:
    """The name of the cube's directory, as far as it can be written."""
    _, name = layout.split(path)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def holder(store: Store, path: str) -> str:
    """What the new meta.json takes its owner, group and mode from."""
    payload = layout.join(path, layout.PAYLOAD)
    try:
        return payload if stat.S_ISREG(store.stat(payload).st_mode) else path
    except FileNotFoundError:
        return path
