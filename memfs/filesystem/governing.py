"""What a written header changes of a cube's rights, carried out on its files as their owner would.

Owner, group, mode, and the access list as far as it says read and write, are those of payload.md:
to change them in ``meta.json`` is ``chmod``, ``chown`` and ``setfacl`` with the writer's rights. A
frozen cube's header takes one change alone. Used by ``header``; any thread.
"""

from __future__ import annotations

import errno
import grp
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from memfs.cube import access_list, layout, metadata
from memfs.cube.acl import Who
from memfs.cube.metadata import Meta
from memfs.errors import InvalidMetadata
from memfs.filesystem.backing import Backing
from memfs.filesystem.context import Context
from memfs.filesystem.guard import Guard
from memfs.vault import rights

_ADAPTER = f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}"


@dataclass(frozen=True)
class Wishes:
    """What a header says of its cube's rights that its writer did not read there."""

    plain: Mapping[str, str] = field(default_factory=dict)
    """Owner, group and mode."""
    entries: Mapping[Who, int] = field(default_factory=dict)
    """Entries of the kernel's access list; 0 removes one."""
    access: bool = False
    """Whether the access list is another one at all."""

    def __bool__(self) -> bool:
        return bool(self.plain) or self.access


def wishes(meta: Meta, base: Meta) -> Wishes:
    """What ``meta`` wants changed, where its writer saw ``base``.

    Raises InvalidMetadata where it names somebody that there is not.
    """
    wanted, seen = meta.get("governance", {}), base.get("governance", {})
    plain = {
        name: wanted[name]
        for name in metadata.LIVE["governance"]
        if wanted.get(name) is not None and wanted[name] != seen.get(name)
    }
    now, before = wanted.get("access", []), seen.get("access", [])
    return Wishes(plain, access_list.changed(now, before), now != before)


class Governing:
    """Carries wishes out, or refuses them."""

    def __init__(self, backing: Backing, guard: Guard) -> None:
        self._backing = backing
        self._guard = guard

    def is_owner(self, cube: str, context: Context) -> bool:
        """Whether the caller may change the rights of a cube."""
        return context.uid in (0, self._backing.status(self.holder(cube)).st_uid)

    def carry_out(self, cube: str, wanted: Wishes, context: Context) -> None:
        """Changes the rights of a cube.

        Raises:
            PermissionError: the caller may not.
            InvalidMetadata: there is no such user or group.
            OSError: EOPNOTSUPP where the store's filesystem has no access lists.
        """
        path = self.holder(cube)
        governs = context.uid == 0 or wanted.plain.keys() <= {"mode"}
        if not governs or not self.is_owner(cube, context):
            raise self.refuse(cube, "only its owner governs it")
        uid = _user(wanted.plain["owner"]) if "owner" in wanted.plain else -1
        gid = _group(wanted.plain["group"]) if "group" in wanted.plain else -1
        store = self._backing.store
        was, before = store.stat(path).st_uid, rights.acl_of(store, path)
        if wanted.entries:
            rights.set_acl(store, path, before.with_entries(wanted.entries))
        if (uid, gid) != (-1, -1):
            self._backing.chown(path, uid, gid)
        if "mode" in wanted.plain:
            self._backing.chmod(path, int(wanted.plain["mode"], 8))
        rights.carry_over(store, cube, context.uid, was=was, before=before)

    def require_thaw(
        self, cube: str, meta: Meta, old: Meta, context: Context, *, governed: bool
    ) -> None:
        """Raises unless a header says of a frozen cube that it is not, and nothing else."""
        thawed = metadata.show(old, {"state": {"frozen": False}})
        if governed or metadata.show(meta, {"state": {"frozen": False}}) != thawed:
            raise self.refuse(cube, "frozen")
        if meta["state"].get("frozen") or self._guard.is_frozen(layout.split(cube)[0]):
            raise self.refuse(cube, "frozen")
        if not self.is_owner(cube, context):
            raise self.refuse(cube, "only its owner thaws it")

    def require_one_name(self, cube: str) -> None:
        """Raises where a file of a cube to be frozen could be written by another name."""
        for name in (layout.PAYLOAD, layout.KV, _ADAPTER):
            try:
                found = self._backing.status(layout.join(cube, name))
            except (FileNotFoundError, NotADirectoryError):
                continue
            links = found.st_nlink - self._backing.elsewhere.links(found)
            if stat.S_ISREG(found.st_mode) and links > 1:
                raise InvalidMetadata(
                    f"state.frozen: {name} has {links} names (hard links),"
                    " and could be written by another"
                )

    def refuse(self, cube: str, why: str) -> PermissionError:
        """The error of a refusal, of which the trail is told."""
        self._guard.denied(cube, "write", why, file=layout.join(cube, layout.META))
        return PermissionError(errno.EPERM, why, cube)

    def holder(self, cube: str) -> str:
        """The file whose owner, group and mode are the cube's."""
        path = layout.join(cube, layout.PAYLOAD)
        return path if self._backing.exists(path) else cube


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


def _number(text: str, field_name: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < (1 << 32) - 1):
        raise InvalidMetadata(f"governance.{field_name}: there is no {text!r} here")
    return int(text)
