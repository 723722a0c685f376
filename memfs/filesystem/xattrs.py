"""The extended attributes ``user.memfs.*`` of a cube's directory and of its four special files.

What stays true of the files wherever they are copied is listed, so ``getfattr -d`` shows it; live
counters can be asked for by name. To set or remove any of them does nothing and succeeds: ``cp -a``
and ``rsync -X`` copy what they find listed. They tell of the text and the header, and the directory
is often open to everybody: who may not read both files sees none. Used by the tree; any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from memfs.cube import layout, metadata
from memfs.cube.acl import XATTR
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.guard import Guard
from memfs.filesystem.link import Link
from memfs.vault.facts import CubeFacts
from memfs.vault.xattrs import PREFIX

_SPECIAL = frozenset(
    {layout.Role.PAYLOAD, layout.Role.KV, layout.Role.ADAPTER_WEIGHTS, layout.Role.META}
)
_TRUSTED = "trusted."
_LIVE = ("reads", "questions", "last_used", "mounted")


class CubeAttributes:
    """Extended attributes, real and made up."""

    def __init__(
        self,
        backing: Backing,
        catalogue: Catalogue,
        link: Link,
        guard: Guard,
        context: Callable[[], Context],
    ) -> None:
        self._backing = backing
        self._catalogue = catalogue
        self._link = link
        self._guard = guard
        self._context = context

    def names(self, path: str) -> list[str]:
        """What ``listxattr`` gives."""
        real, missing = [], None
        try:
            real = [n for n in self._backing.listxattr(path) if not n.startswith(PREFIX)]
        except FileNotFoundError as e:
            missing = e  # a KV cache that could be made has no file, but facts
        if self._context().uid != 0:  # as a disk does; it asks for CAP_SYS_ADMIN
            real = [n for n in real if not n.startswith(_TRUSTED)]
        cube = _cube_of(path)
        facts = self._catalogue.facts(cube)
        if missing is not None and (facts is None or cube == path):
            raise missing
        told = facts is not None and self._may_know(cube)
        return real + [PREFIX + name for name in (_portable(facts) if facts and told else {})]

    def get(self, path: str, name: str) -> bytes:
        """The value of one attribute. ENODATA where there is none."""
        if name == XATTR:
            return self._access_list(path)
        if not name.startswith(PREFIX):
            return self._backing.getxattr(path, name)
        cube, short = _cube_of(path), name.removeprefix(PREFIX)
        facts = self._catalogue.facts(cube)
        if facts is not None and self._may_know(cube):
            value = _portable(facts).get(short)
            if value is None and short in _LIVE:
                value = self._live(cube, facts, short)
            if value is not None:
                return value.encode("utf-8", "surrogateescape")
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)

    def set(self, path: str, name: str, value: bytes, flags: int) -> None:
        """Sets an attribute; nothing is done for memfs's own."""
        if not name.startswith(PREFIX):
            self._backing.setxattr(path, name, value, flags)

    def remove(self, path: str, name: str) -> None:
        """Removes an attribute; nothing is done for memfs's own."""
        if not name.startswith(PREFIX):
            self._backing.removexattr(path, name)

    def _may_know(self, cube: str) -> bool:
        """Whether the caller may read what the attributes tell of, as far as it is there."""
        if self._context().uid == 0:
            return True
        for name in (layout.PAYLOAD, layout.META):
            path = layout.join(cube, name)
            with contextlib.suppress(FileNotFoundError):
                if not self._guard.may_read(self._backing.elsewhere.get(path, path)):
                    return False
        return True

    def _access_list(self, path: str) -> bytes:
        """The kernel's access list; a KV cache that could be made has that of its text."""
        try:
            return self._backing.getxattr(path, XATTR)
        except FileNotFoundError:
            role, cube = layout.classify(path)
            if role is not layout.Role.KV:
                raise
            return self._backing.getxattr(layout.join(cube, layout.PAYLOAD), XATTR)

    def _live(self, cube: str, facts: CubeFacts, name: str) -> str | None:
        if name == "mounted":
            return "yes" if self._link.is_mounted(cube, self._context().uid) else "no"
        usage = self._catalogue.usage(facts.id)
        if usage is None:
            return None
        if name == "last_used":
            return None if usage.last_used is None else metadata.rfc3339(usage.last_used)
        return str(usage.reads if name == "reads" else usage.questions)


def _cube_of(path: str) -> str:
    """The cube whose facts a path shows: that of a special file, else the path itself."""
    role, cube = layout.classify(path)
    return cube if role in _SPECIAL else path


def _portable(facts: CubeFacts) -> dict[str, str]:
    values = {
        "id": facts.id,
        "title": facts.title,
        "kv": facts.kv_state,
        "tokens": None if facts.kv_tokens is None else str(facts.kv_tokens),
        "payload_sha256": facts.payload_sha256,
    }
    return {name: value for name, value in values.items() if value}
