"""How often a cube was used, between meta.json and the index.

The index counts; meta.json carries the counts from one index to the next, and to another machine.
Used by ``refresh`` and at unmount; any thread.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import datetime

from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.index.lmdb_index import Index, Usage
from memfs.index.records import MOST
from memfs.vault.facts import CubeFacts
from memfs.vault.identity import read_meta
from memfs.vault.publish import publishing, write_all
from memfs.vault.sig import sig_of
from memfs.vault.store import Store


def usage_in(meta: metadata.Meta) -> Usage:
    """The counters in a checked header."""
    behavioural = meta.get("behavioural", {})
    return Usage(
        min(int(behavioural.get("reads", 0)), MOST),
        min(int(behavioural.get("questions", 0)), MOST),
        _seconds(behavioural.get("last_used")),
    )


def usage_group(usage: Usage) -> metadata.Meta:
    """Those counters as meta.json's behavioural group has them."""
    last = None if usage.last_used is None else metadata.rfc3339(usage.last_used)
    return {"reads": usage.reads, "questions": usage.questions, "last_used": last}


def take_history(store: Store, index: Index, path: str, cube_id: str) -> None:
    """Gives a cube that is new to the index the counters that its meta.json came with."""
    if index.has_usage(cube_id):
        return
    try:
        usage = usage_in(read_meta(store, path))
    except (OSError, InvalidMetadata, NotAllowed):
        return
    if usage != Usage():
        index.merge_usage([(cube_id, usage, False)])


def write_back_usage(store: Store, index: Index, *, limit_s: float = 10.0) -> int:
    """Writes counters that went on into meta.json; in how many it did.

    Called at unmount, so that an index made from files alone knows nearly what this one did. The
    file keeps its times: being read is no change of a cube.

    Args:
        limit_s: an unmount should not wait longer; the rest stays in the index, for the next time.
    """
    end, written = time.monotonic() + limit_s, 0
    for cube_id, usage, unwritten in index.all_usage():
        if time.monotonic() > end:
            break
        found = index.by_id(cube_id) if unwritten else None
        if found is not None and _write(store, index, *found, usage):
            index.mark_written(cube_id, usage)
            written += 1
    return written


def _write(store: Store, index: Index, path: str, facts: CubeFacts, usage: Usage) -> bool:
    name = layout.join(path, layout.META)
    try:
        found = store.stat(name)
        if facts.frozen or facts.meta_sig not in (sig_of(found), sig_of(found).unsettled()):
            return False  # frozen, or changed under us: that version is looked at first
        meta = metadata.show(read_meta(store, path), {"behavioural": usage_group(usage)})
        with publishing(store, name, like=name) as (fd, _):
            write_all(fd, metadata.render(meta))
            os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        index.put(path, replace(facts, meta_sig=sig_of(store.stat(name))))
    except (OSError, InvalidMetadata, NotAllowed):
        return False
    return True


def _seconds(text: str | None) -> float | None:
    """A time as meta.json writes it, in seconds since 1970."""
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # the schema knows the form, not the calendar
