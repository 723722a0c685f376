"""meta.json through the mount: always whole, valid and current to read, checked when it is written.

What is on disk is the header as somebody last wrote it. What is read is that with the live parts
laid over: owner and mode from the files, the states of the three memories, the usage counters. What
is written is checked, and the live parts in it are not taken: a change of owner or mode is carried
out on the file instead, with the writer's own rights. Used by the tree and ``open_header``; any
thread.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
from typing import Any

from memfs.cube import layout, metadata
from memfs.cube.access import owner_names
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.index.history import usage_group
from memfs.index.records import Usage
from memfs.vault import identity
from memfs.vault.facts import CubeFacts
from memfs.vault.publish import publish_bytes

_GOVERNED = ("owner", "group", "mode")
_COUNTED = ("reads", "questions", "last_used", "versions", "fingerprint")
_FOUND = ("payload", "kv", "adapter")

_KEPT = 2048
"""Rendered headers remembered: ``ls -l`` needs each one's length, and opening it the rest."""


class Headers:
    """The headers of all cubes, by the path of the cube."""

    def __init__(self, backing: Backing, catalogue: Catalogue) -> None:
        self._backing = backing
        self._catalogue = catalogue
        self._rendered: dict[str, tuple[CubeFacts, Usage | None, bytes]] = {}

    def shown(self, cube: str) -> bytes:
        """The header as it reads now. Raises FileNotFoundError where there is no meta.json."""
        facts = self._catalogue.facts(cube)
        if facts is None or facts.meta_sig is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), cube)
        usage = self._catalogue.usage(facts.id)
        known = self._rendered.get(cube)
        if known is not None and known[0] is facts and known[1] == usage:
            return known[2]
        try:
            stored = identity.read_meta(self._backing.store, cube)
        except (InvalidMetadata, NotAllowed):
            stored = identity.last_known(facts, cube)
        data = metadata.render(metadata.show(stored, _live(facts, usage)))
        if len(self._rendered) >= _KEPT:
            self._rendered.clear()
        self._rendered[cube] = (facts, usage, data)
        return data

    def accept(self, cube: str, text: bytes, base: bytes | None, context: Context) -> bytes:
        """What is to be stored for a header that somebody wrote.

        Args:
            base: the header as the writer saw it; None where there was none.

        Raises:
            InvalidMetadata: it breaks the schema, or names an owner that there is not.
            PermissionError: it changes owner, group or mode, and the writer may not.
        """
        meta = metadata.parse(text)
        old = self._before(cube)
        if old is not None and metadata.cube_id(old) == metadata.cube_id(meta):
            if base is None and (known := self._rendered.get(cube)):
                base = known[2]
            if base is not None:
                self._govern(cube, meta, metadata.parse(base), context)
            _take(meta, old, "governance", _GOVERNED)
            _take(meta, old, "behavioural", _COUNTED)
            _take(meta, old, "state", _FOUND)
        else:
            _take(meta, {}, "state", _FOUND)  # a cube that arrives keeps the counters it brings
        return metadata.render(meta)

    def _before(self, cube: str) -> Meta | None:
        """The stored header; where an editor has renamed that away, what was last shown of it."""
        try:
            return identity.read_meta(self._backing.store, cube)
        except (InvalidMetadata, NotAllowed, FileNotFoundError):
            known = self._rendered.get(cube)
            return metadata.parse(known[2]) if known else None

    def keep_rejected(
        self, cube: str, text: bytes, found: os.stat_result, context: Context
    ) -> None:
        """Keeps the text of a refused header beside the one that stands, as the writer's file."""
        if text:
            path = layout.join(cube, layout.REJECTED)
            ids = (context.uid, context.gid)
            like = os.stat_result((found.st_mode, 0, 0, 1, *ids, len(text), 0, 0, 0))
            publish_bytes(self._backing.store, path, text, like=like)

    def _govern(self, cube: str, meta: Meta, base: Meta, context: Context) -> None:
        """Carries out a change of owner, group or mode as ``chown`` and ``chmod`` would."""
        wanted, seen = meta.get("governance", {}), base.get("governance", {})
        changed = {
            name: wanted[name]
            for name in _GOVERNED
            if wanted.get(name) is not None and wanted[name] != seen.get(name)
        }
        if not changed:
            return
        path = layout.join(cube, layout.PAYLOAD)
        if not self._backing.exists(path):
            path = cube
        found = self._backing.status(path)
        if context.uid not in (0, found.st_uid) or (
            context.uid != 0 and changed.keys() != {"mode"}
        ):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        uid = _user(changed["owner"]) if "owner" in changed else -1
        gid = _group(changed["group"]) if "group" in changed else -1
        if (uid, gid) != (-1, -1):
            self._backing.chown(path, uid, gid)
        if "mode" in changed:
            self._backing.chmod(path, int(changed["mode"], 8))


def _live(facts: CubeFacts, usage: Usage | None) -> Meta:
    """The parts of the header that the files and the index say better than what is stored.

    Args:
        usage: where it is None (there is no index yet) or nothing at all (the index has not taken
            in what the cube came with), the stored counters are the last known.
    """
    status = os.stat_result((0, 0, 0, 0, facts.uid, facts.gid, 0, 0, 0, 0))
    owner, group = owner_names(status)
    behavioural: dict[str, Any] = {"fingerprint": facts.kv_token_ids_sha256}
    if usage is not None and usage != Usage():
        behavioural |= usage_group(usage)
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
            },
            "adapter": {
                "state": facts.adapter_state,
                "reason": facts.adapter_reason,
                "bytes": facts.adapter_bytes,
            },
        },
    }


def _take(meta: Meta, old: Meta, group: str, names: tuple[str, ...]) -> None:
    """Makes a group of ``meta`` say under these names what ``old`` says, or nothing."""
    stored, wanted = old.get(group, {}), meta.setdefault(group, {})
    for name in names:
        if name in stored:
            wanted[name] = stored[name]
        else:
            wanted.pop(name, None)


def _user(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return _number(name, "owner")


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return _number(name, "group")


def _number(text: str, field: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < (1 << 32) - 1):
        raise InvalidMetadata(f"governance.{field}: there is no {text!r} here")
    return int(text)
