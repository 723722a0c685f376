"""``.memfs/`` at the root of a mount: never listed there, always openable, and no file on disk.

| path | what it is |
| --- | --- |
| ``status``, ``status.json`` | the mount, its index, the runtime and what is in the model |
| ``mounted/`` | a symlink to each cube in the model, named by its path (``%`` and ``/`` quoted) |
| ``events`` | the audit trail, one JSON object a line, with an end |
| ``deleted`` | the deleted cubes that can be brought back, one JSON object a line |
| ``at/`` | the whole store as it was at a time: see ``past`` |
| ``control`` | write-only, for the mount's owner: a word a line, ``rescan`` or ``rebuild`` |

What a file says is made at its open and stays for as long as it is open. Who is neither root nor
the mount's owner is told of the own session alone. Nothing here waits for the runtime longer than
``ASK_SECONDS``. Used by the tree; any thread.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memfs.cube import layout
from memfs.cube.metadata import rfc3339
from memfs.filesystem.attributes import Attributes, altered, regular
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context
from memfs.filesystem.handles.handle import Handle, Snapshot
from memfs.filesystem.handles.passthrough import Passthrough
from memfs.filesystem.link import Link
from memfs.filesystem.past.tree import Past
from memfs.filesystem.status_text import status_text

ASK_SECONDS = 0.3
_KEPT_SECONDS = 2.0
"""For how long ``stat`` answers with the size of what was last made rather than make it again."""

_INODES = 0x6D656D66 << 32
_ROOT = layout.CONTROL
_MOUNTED = f"{_ROOT}/mounted"
_LONGEST_NAME = 255
_OF_ALL = ("encoding", "nearby", "tiers", "ahead")
"""What the runtime says of all its users, and tells a mount's owner alone."""
_LONG = ("events", "deleted")
"""Files that take a while to make."""


@dataclass(frozen=True)
class MountFacts:
    """What the mount is, for ``status``."""

    store: str
    mountpoint: str
    mount_on_read: bool


class Control:
    """The control tree of one mount."""

    def __init__(
        self,
        mount: MountFacts,
        catalogue: Catalogue,
        link: Link,
        passthrough: Passthrough,
        past: Past,
        context: Callable[[], Context],
    ) -> None:
        self._past = past
        self._mount = mount
        self._catalogue = catalogue
        self._link = link
        self._passthrough = passthrough
        self._context = context
        self._started = time.time()
        self._made: dict[tuple[str, int | None], tuple[float, Attributes]] = {}
        self._files: dict[str, Callable[[int | None], bytes]] = {
            "status": lambda uid: status_text(self._facts(uid)).encode("utf-8", "surrogateescape"),
            "status.json": lambda uid: (json.dumps(self._facts(uid), indent=2) + "\n").encode(),
            "events": self._events,
            "deleted": self._deleted,
        }
        self._words = {"rescan": catalogue.keeper.rescan, "rebuild": catalogue.keeper.rebuild}

    def status(self, path: str) -> Attributes:
        """What is shown of a path in the control tree."""
        if path in (_ROOT, _MOUNTED):
            found = regular(0, _inode(path), 0, self._started)
            return altered(found, st_mode=stat.S_IFDIR | 0o555, st_nlink=2)
        name = path.removeprefix(_ROOT + "/")
        if name == "control":
            found = regular(0o200, _inode(path), 0, self._started)
            return altered(found, st_uid=os.geteuid(), st_gid=os.getegid())
        if name in self._files:
            made = self._made.get((name, self._sees()))
            if made is not None and time.monotonic() - made[0] < _KEPT_SECONDS:
                return made[1]
            if name in _LONG:  # their size is known once they were opened
                return regular(0o444, _inode(path), 0, self._started)
            return self._make(path, name)[1]
        target = self.readlink(path)
        return Attributes(
            st_mode=stat.S_IFLNK | 0o777,
            st_ino=_inode(path),
            st_size=len(os.fsencode(target)),
        )

    def entries(self, path: str) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of what is in a directory of the control tree."""
        yield ".", stat.S_IFDIR, _inode(path)
        yield "..", stat.S_IFDIR, _inode(_ROOT)
        if path == _MOUNTED:
            uid = self._sees()
            for cube, found in list(self._link.state.mounted.items()):
                name = _quoted(cube)
                if (uid is None or uid in found.uids) and len(os.fsencode(name)) <= _LONGEST_NAME:
                    yield name, stat.S_IFLNK, _inode(f"{_MOUNTED}/{name}")
            return
        for name in ("control", *self._files):
            yield name, stat.S_IFREG, _inode(f"{_ROOT}/{name}")
        yield "mounted", stat.S_IFDIR, _inode(_MOUNTED)
        yield "at", stat.S_IFDIR, _inode(layout.AT)

    def readlink(self, path: str) -> str:
        """Where a symlink in ``mounted/`` points."""
        parent, name = layout.split(path)
        if parent == _MOUNTED:
            cube, uid = name.replace("%2F", "/").replace("%25", "%"), self._sees()
            found = self._link.state.mounted.get(cube)
            if found is not None and _quoted(cube) == name and (uid is None or uid in found.uids):
                return f"../../{cube}"
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def open(self, path: str, flags: int) -> Handle:
        """Opens a file of the control tree."""
        name = path.removeprefix(_ROOT + "/")
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if name == "control" and writing:
            return _Words(path, self._words)
        if writing or name == "control":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return Snapshot(path, *self._make(path, name))

    def _sees(self) -> int | None:
        """Whose session the caller may see: None for all."""
        uid = self._context().uid
        return None if uid in (0, os.geteuid()) else uid

    def _make(self, path: str, name: str) -> tuple[bytes, Attributes]:
        uid = self._sees()
        data = self._files[name](uid)
        shown = regular(0o444, _inode(path), len(data), time.time())
        self._made[name, uid] = (time.monotonic(), shown)
        return data, shown

    def _events(self, uid: int | None) -> bytes:
        return b"".join(
            json.dumps(event | {"time": rfc3339(event["time"])}).encode() + b"\n"
            for event in self._catalogue.journal.events()
            if uid is None or event.get("uid") == uid
        )

    def _deleted(self, _uid: int | None) -> bytes:
        return b"".join(json.dumps(line).encode() + b"\n" for line in self._past.deleted())

    def _facts(self, uid: int | None) -> dict[str, Any]:
        """Everything that ``status`` says; the runtime's part as ``memfs status --json`` has it."""
        state = self._link.state
        runtime = self._link.status(ASK_SECONDS)
        if runtime is None:
            runtime = {
                "model": state.model,
                "device": state.device,
                "error": state.error,
                "budget_bytes": None,
                "mounted": [
                    {"cube": cube, "store": self._mount.store, "kind": "kv", "tier": None}
                    | {"tokens": found.tokens, "bytes": found.nbytes, "hits": None}
                    | {"storage": None, "sessions": sorted(found.uids)}
                    for cube, found in state.mounted.items()
                ],
            }
        refusals = list(self._catalogue.journal.refusals)
        mounted = [line for line in runtime["mounted"] if line["store"] == self._mount.store]
        if uid is not None:
            mounted = [line | {"sessions": [uid]} for line in mounted if uid in line["sessions"]]
            runtime = {name: value for name, value in runtime.items() if name not in _OF_ALL}
            runtime |= {"used_bytes": sum(line["bytes"] or 0 for line in mounted)}
            refusals = [refusal for refusal in refusals if refusal.get("uid") == uid]
        return runtime | {
            "runtime": state.phase,
            "store": self._mount.store,
            "mountpoint": self._mount.mountpoint,
            "mount_on_read": self._mount.mount_on_read,
            "passthrough": {
                "on": not self._passthrough.reason,
                "reason": self._passthrough.reason or None,
            },
            "pid": os.getpid(),
            "since": rfc3339(self._started),
            "index": {
                "cubes": self._catalogue.cubes(),
                "reason": self._catalogue.keeper.reason or None,
            },
            "mounted": mounted,
            "refusals": refusals,
        }


class ControlDirectory(Handle):
    """A directory of the control tree."""

    def __init__(self, path: str, control: Control) -> None:
        super().__init__(path)
        self._control = control

    def entries(self) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of each entry."""
        return self._control.entries(self.path or _ROOT)

    def fsync(self, *, data_only: bool) -> None:
        """Nothing of it is on a disk."""


class _Words(Handle):
    """``control``: what is written is carried out a word a line, each when its line has ended."""

    direct_io = True

    def __init__(self, path: str, words: dict[str, Callable[[], None]]) -> None:
        super().__init__(path)
        self._words = words
        self._text = b""

    def write(self, buffer: memoryview, offset: int) -> int:  # noqa: ARG002  a stream has no places
        self._text += bytes(buffer)
        *lines, self._text = self._text.split(b"\n")
        self._run(lines)
        if len(self._text) > 64:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return len(buffer)

    def truncate(self, length: int) -> None:
        """``echo rescan > control`` empties it first."""

    def flush(self) -> None:
        rest, self._text = self._text, b""
        self._run([rest])

    def _run(self, lines: list[bytes]) -> None:
        for line in lines:
            word = line.strip().decode("ascii", "replace")
            if word and word not in self._words:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if word:
                self._words[word]()


def _inode(path: str) -> int:
    """A number of its own for a path of the control tree, the same in every mount."""
    number = 0
    for byte in os.fsencode(path):
        number = (number * 131 + byte) & 0xFFFFFFFF
    return _INODES | number


def _quoted(cube: str) -> str:
    """The name of a cube's symlink: its path with ``%`` and ``/`` quoted, and nothing else."""
    return cube.replace("%", "%25").replace("/", "%2F")
