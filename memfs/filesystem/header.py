"""meta.json through the mount: always whole, valid and current to read, checked when it is written.

What is on disk is the header as somebody last wrote it. What is read is that with the live parts
laid over: owner and mode from the files, the states of the three memories, the usage counters. What
is written is checked, and the live parts in it are not taken: a change of owner or mode is carried
out on the file instead, with the writer's own rights. Used by the tree and ``handles.header``; any
thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable
from typing import Any

from memfs.cube import access_list, layout, metadata
from memfs.cube.access import owner_names
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.filesystem import audit
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.governing import Governing, Wishes, wishes
from memfs.filesystem.guard import Guard
from memfs.index.history import usage_group
from memfs.index.records import Usage
from memfs.vault import identity
from memfs.vault.facts import CubeFacts
from memfs.vault.publish import publish_bytes, publishing, write_all
from memfs.vault.versions.records import Version

log = logging.getLogger(__name__)

_BEGUN_SECONDS = 60.0
"""Whoever makes an empty header and does not write it in that time has forgotten it."""

_KEPT = 2048
"""Rendered headers remembered: ``ls -l`` needs each one's length, and opening it the rest."""


class Headers:
    """The headers of all cubes, by the path of the cube."""

    def __init__(self, backing: Backing, catalogue: Catalogue, guard: Guard) -> None:
        self._guard = guard
        self._governing = Governing(backing, guard)
        self._backing = backing
        self._catalogue = catalogue
        self._rendered: dict[str, tuple[CubeFacts, Usage | None, bytes, Version | None]] = {}
        self._taken: dict[str, int] = {}
        """The thread that removed a header, or renamed it away."""
        self._begun: dict[str, float] = {}
        """When somebody made an empty header that is not written yet."""

    def shown(self, cube: str) -> bytes:
        """The header as it reads now. Raises FileNotFoundError where there is no meta.json."""
        facts = self._catalogue.facts(cube)
        if facts is None or facts.meta_sig is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), cube)
        usage = self._catalogue.usage(facts.id)
        past = self._catalogue.history.newest(facts.id) if facts.id else None
        known = self._rendered.get(cube)
        if known and known[0] is facts and known[1] == usage and known[3] is past:
            return known[2]
        try:
            stored = identity.read_meta(self._backing.store, cube)
        except (InvalidMetadata, NotAllowed):
            stored = identity.last_known(facts, cube)
        live = _live(facts, usage, past)
        kept = stored.get("governance", {}).get("access", [])
        live["governance"]["access"] = access_list.shown(kept, facts.access_list)
        data = metadata.render(metadata.show(stored, live))
        if len(self._rendered) >= _KEPT:
            self._rendered.clear()
        self._rendered[cube] = (facts, usage, data, past)
        return data

    def begin(self, cube: str, like: os.stat_result) -> None:
        """Somebody made an empty header and closed it, to write it in a moment, as ``tar`` does.

        Empty it could not stand: where there is none, there is a first one meanwhile.
        """
        if len(self._begun) >= _KEPT:
            self._begun.clear()
        self._begun[cube] = time.monotonic()
        facts = self._catalogue.facts(cube)
        if facts is None or facts.meta_sig is None:
            path, data = layout.join(cube, layout.META), identity.first_header(facts, cube)
            with contextlib.suppress(FileExistsError):
                publish_bytes(
                    self._backing.store, path, metadata.render(data), like=like, replace=False
                )
            self._catalogue.touch(cube, header=True)

    def is_begun(self, cube: str) -> bool:
        """Whether who opens the header now is the one to write an empty one. Asked once."""
        since = self._begun.pop(cube, None)
        return since is not None and time.monotonic() - since < _BEGUN_SECONDS

    def accept(self, cube: str, text: bytes, base: bytes | None, context: Context) -> bytes:
        """What is to be stored for a header that somebody wrote.

        Args:
            base: the header as the writer saw it; None where there was none.

        Raises:
            InvalidMetadata: it breaks the schema, or names somebody that there is not.
            PermissionError: it changes rights, and the writer may not; or the cube is frozen, and
                this is more than its owner's word that it is no longer.
            OSError: EOPNOTSUPP where it needs an access list that the store cannot keep.
        """
        meta = metadata.parse(text)
        old = self._before(cube)
        if old is None or metadata.cube_id(old) != metadata.cube_id(meta):
            return self._arrived(cube, meta, old, context)
        if base is None and (known := self._rendered.get(cube)):
            base = known[2]
        wanted = Wishes() if base is None else wishes(meta, metadata.parse(base))
        for group, names in metadata.LIVE.items():
            _take(meta, old, group, names)
        if not wanted.access:
            _take(meta, old, "governance", ("access",))
        if self._guard.is_frozen(cube):
            self._governing.require_thaw(cube, meta, old, context, governed=bool(wanted))
        elif meta["state"].get("frozen"):
            self._governing.require_one_name(cube)
        if wanted:
            self._governing.carry_out(cube, wanted, context)
        return metadata.render(meta)

    def _arrived(self, cube: str, meta: Meta, old: Meta | None, context: Context) -> bytes:
        """What is stored of a header that comes from elsewhere: it keeps the counters it brings.

        It gives nobody read or write: those are its files' own. Nor does it freeze: the files of a
        copy come one by one, and it would be half there.
        """
        if self._guard.is_frozen(cube):
            raise self._governing.refuse(cube, "frozen")
        if self._is_anothers(meta, context):
            meta = metadata.as_copy(meta)
        _take(meta, {}, "state", metadata.LIVE["state"])
        meta["state"]["frozen"] = False
        if not self._governing.is_owner(cube, context):
            _take(meta, old or {}, "governance", ("access",))
        return metadata.render(meta)

    def came_whole(self, cube: str, context: Context) -> None:
        """A cube that was put together aside has got its place, and its header with it."""
        with contextlib.suppress(InvalidMetadata, NotAllowed, FileNotFoundError):
            meta = identity.read_meta(self._backing.store, cube)
            if self._is_anothers(meta, context):
                path, data = layout.join(cube, layout.META), metadata.as_copy(meta)
                publish_bytes(self._backing.store, path, metadata.render(data), like=path)

    def _is_anothers(self, meta: Meta, context: Context) -> bool:
        """Whether an id that comes with a header is known as that of another user's cube.

        Its past is his. What came with it is a copy, whether his cube lives or not.
        """
        newest = self._catalogue.history.newest(metadata.cube_id(meta))
        own = (0, os.geteuid(), newest.owner if newest else context.uid)
        return context.uid not in own

    def _before(self, cube: str) -> Meta | None:
        """The stored header; where an editor has renamed that away, what was last shown of it."""
        try:
            return identity.read_meta(self._backing.store, cube)
        except (InvalidMetadata, NotAllowed, FileNotFoundError):
            known = self._rendered.get(cube)
            return metadata.parse(known[2]) if known else None

    def reject(
        self,
        cube: str,
        text: bytes,
        found: os.stat_result,
        context: Context,
        error: InvalidMetadata | OSError,
    ) -> None:
        """Tells of a refused header, and keeps its text beside the old one, which stands.

        Args:
            found: the status of the file that it was in; the kept one is the writer's own.
        """
        reason = f"meta.json: {error.strerror}" if isinstance(error, OSError) else str(error)
        if text and not self._guard.is_frozen(cube):
            path = layout.join(cube, layout.REJECTED)
            ids = (context.uid, context.gid)
            like = os.stat_result((found.st_mode, 0, 0, 1, *ids, len(text), 0, 0, 0))
            try:
                publish_bytes(self._backing.store, path, text, like=like)
            except OSError as e:
                reason += f" (what was written could not be kept: {e.strerror})"
            else:
                reason += f" (what was written is in {layout.REJECTED})"
        event = {"event": "refused", "path": cube, "kind": "meta", "reason": reason}
        self._catalogue.journal.log(event | audit.actor(context))
        if self._taken.pop(cube, None) == context.pid:
            self._put_back(cube)

    def taken_away(self, cube: str, by: Context) -> None:
        """A program removed or renamed the header: perhaps to write another in its place."""
        if len(self._taken) >= _KEPT:
            self._taken.clear()
        self._taken[cube] = by.pid

    def _put_back(self, cube: str) -> None:
        """The header stands again that a program took away before its new one was refused."""
        known, facts = self._rendered.get(cube), self._catalogue.facts(cube)
        if known is None or facts is None or facts.meta_sig is not None or facts.id != known[0].id:
            return
        meta, before = metadata.parse(known[2]), known[0].meta_sig
        _take(meta, {}, "state", metadata.LIVE["state"])
        path, like = layout.join(cube, layout.META), self._governing.holder(cube)
        try:
            with publishing(self._backing.store, path, like=like, replace=False) as (fd, _):
                write_all(fd, metadata.render(meta))
                if before is not None:  # an editor takes another time for somebody else's change
                    os.utime(fd, ns=(before.mtime_ns, before.mtime_ns))
        except OSError as e:
            log.warning("%s: its header is not back: %s", cube, e.strerror)
        self._catalogue.touch(cube, header=True)


def _live(facts: CubeFacts, usage: Usage | None, past: Version | None) -> Meta:
    """The parts of the header that the files and the index say better than what is stored.

    Args:
        usage: where it is None (there is no index yet) or nothing at all (the index has not taken
            in what the cube came with), the stored counters are the last known.
        past: the cube's newest version.
    """
    status = os.stat_result((0, 0, 0, 0, facts.uid, facts.gid, 0, 0, 0, 0))
    owner, group = owner_names(status)
    behavioural: dict[str, Any] = {"fingerprint": facts.kv_token_ids_sha256}
    if usage is not None and usage != Usage():
        behavioural |= usage_group(usage)
    if past is not None:
        behavioural["versions"] = past.payloads
    return {
        "governance": {"owner": owner, "group": group, "mode": f"{facts.mode & 0o7777:03o}"},
        "behavioural": behavioural,
        "state": {
            "payload": {
                "state": facts.payload_state,
                "bytes": facts.payload_bytes,
                "sha256": facts.payload_sha256,
            },
            "kv": {
                "state": facts.kv_state,
                "reason": facts.kv_reason,
                "bytes": facts.kv_bytes,
                "tokens": facts.kv_tokens,
                "storage": facts.kv_storage,
            },
            "adapter": {
                "state": facts.adapter_state,
                "reason": facts.adapter_reason,
                "bytes": facts.adapter_bytes,
            },
        },
    }


def _take(meta: Meta, old: Meta, group: str, names: Iterable[str]) -> None:
    """Makes a group of ``meta`` say under these names what ``old`` says, or nothing."""
    stored, wanted = old.get(group, {}), meta.setdefault(group, {})
    for name in names:
        if name in stored:
            wanted[name] = stored[name]
        else:
            wanted.pop(name, None)
