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
import stat
from collections.abc import Mapping
from typing import Any

from memfs.cube import layout, metadata
from memfs.cube.access import owner_names
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata, NotAllowed
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.guard import Guard
from memfs.index.history import usage_group
from memfs.index.records import Usage
from memfs.vault import identity
from memfs.vault.facts import CubeFacts
from memfs.vault.publish import publish_bytes

_GOVERNED = metadata.LIVE["governance"]

_KEPT = 2048
"""Rendered headers remembered: ``ls -l`` needs each one's length, and opening it the rest."""


class Headers:
    """The headers of all cubes, by the path of the cube."""

    def __init__(self, backing: Backing, catalogue: Catalogue, guard: Guard) -> None:
        self._guard = guard
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
            PermissionError: it changes owner, group or mode, and the writer may not; or the cube is
                frozen, and this is more than its owner's word that it is no longer.
        """
        meta = metadata.parse(text)
        old = self._before(cube)
        if old is None or metadata.cube_id(old) != metadata.cube_id(meta):
            if self._guard.is_frozen(cube):
                raise self._refuse(cube, "frozen")
            # A cube that arrives keeps the counters it brings. Frozen it would be half there: the
            # files of a copy come one by one.
            _take(meta, {}, "state")
            meta["state"]["frozen"] = False
            return metadata.render(meta)
        if base is None and (known := self._rendered.get(cube)):
            base = known[2]
        governed = {} if base is None else _governed(meta, metadata.parse(base))
        for group in metadata.LIVE:
            _take(meta, old, group)
        if self._guard.is_frozen(cube):
            self._require_thaw(cube, meta, old, context, governed=bool(governed))
        elif meta["state"].get("frozen"):
            self._require_one_name(cube)
        if governed:
            self._govern(cube, governed, context)
        return metadata.render(meta)

    def _require_thaw(
        self, cube: str, meta: Meta, old: Meta, context: Context, *, governed: bool
    ) -> None:
        """Raises unless a header says of a frozen cube that it is not, and nothing else."""
        thawed = metadata.show(old, {"state": {"frozen": False}})
        if governed or metadata.show(meta, {"state": {"frozen": False}}) != thawed:
            raise self._refuse(cube, "frozen")
        if meta["state"].get("frozen") or self._guard.is_frozen(layout.split(cube)[0]):
            raise self._refuse(cube, "frozen")
        if context.uid not in (0, self._backing.status(self._holder(cube)).st_uid):
            raise self._refuse(cube, "only its owner thaws it")

    def _require_one_name(self, cube: str) -> None:
        """Raises where a file of a cube to be frozen could be written by another name."""
        for name in (layout.PAYLOAD, layout.KV, f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}"):
            try:
                found = self._backing.status(layout.join(cube, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                raise InvalidMetadata(
                    f"state.frozen: {name} has {found.st_nlink} names (hard links),"
                    " and could be written by another"
                )

    def _refuse(self, cube: str, why: str) -> PermissionError:
        self._guard.denied(cube, "write", why, file=layout.join(cube, layout.META))
        return PermissionError(errno.EPERM, os.strerror(errno.EPERM), cube)

    def _holder(self, cube: str) -> str:
        """The file whose owner, group and mode are the cube's."""
        path = layout.join(cube, layout.PAYLOAD)
        return path if self._backing.exists(path) else cube

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
        if text and not self._guard.is_frozen(cube):
            path = layout.join(cube, layout.REJECTED)
            ids = (context.uid, context.gid)
            like = os.stat_result((found.st_mode, 0, 0, 1, *ids, len(text), 0, 0, 0))
            publish_bytes(self._backing.store, path, text, like=like)

    def _govern(self, cube: str, changed: Mapping[str, str], context: Context) -> None:
        """Carries out a change of owner, group or mode as ``chown`` and ``chmod`` would."""
        path = self._holder(cube)
        found = self._backing.status(path)
        if context.uid not in (0, found.st_uid) or (
            context.uid != 0 and changed.keys() != {"mode"}
        ):
            raise self._refuse(cube, "only its owner governs it")
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


def _governed(meta: Meta, base: Meta) -> dict[str, str]:
    """Owner, group and mode as far as a header gives them another value than its writer saw."""
    wanted, seen = meta.get("governance", {}), base.get("governance", {})
    return {
        name: wanted[name]
        for name in _GOVERNED
        if wanted.get(name) is not None and wanted[name] != seen.get(name)
    }


def _take(meta: Meta, old: Meta, group: str) -> None:
    """Makes the live parts of a group of ``meta`` say what ``old`` says, or nothing."""
    stored, wanted = old.get(group, {}), meta.setdefault(group, {})
    for name in metadata.LIVE[group]:
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
