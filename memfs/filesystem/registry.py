"""Which stores are mounted where: the kernel's list, and what each mount wrote of itself.

A mount keeps a record in the runtime directory of its user. Mounts of other users are known from
the kernel alone: where, and of which store. Used by the commands; reads only, but for a mount's own
record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memfs.config import runtime_dir

FSTYPE = "fuse.memfs"


@dataclass(frozen=True)
class MountRecord:
    """A mount."""

    store: str
    mountpoint: str
    pid: int | None = None
    """The process that serves it; None where it is another user's."""
    model: str | None = None
    """The model that it was told to use."""
    read_only: bool = False
    """Whether nothing can be written, as the store cannot be."""
    started: int = 0
    """Clock ticks from boot to the start of that process: a number that is used again is not it."""

    @property
    def alive(self) -> bool | None:
        """Whether its process is running; None where that is not known."""
        return None if self.pid is None else _started(self.pid) == self.started != 0


def running() -> list[MountRecord]:
    """The mounts there are, but for those whose process is known to have died."""
    return [record for record in mounted() if record.alive is not False]


def mounted() -> list[MountRecord]:
    """Every mount of memfs that the kernel knows, dead ones included."""
    found = []
    for mountpoint, store in _kernel_list():
        record = _read(_path(mountpoint))
        if record is None or record.store != store:
            record = MountRecord(store, mountpoint)
        found.append(record)
    return found


def find(path: str | os.PathLike[str]) -> tuple[MountRecord, str] | None:
    """The mount that a path lies in (or in whose store), and the path within the store."""
    real = os.path.realpath(path)
    best: tuple[int, MountRecord, str] | None = None
    for record in running():
        for root in (record.mountpoint, record.store):
            inside = _inside(real, root)
            if inside is not None and (best is None or len(root) > best[0]):
                best = (len(root), record, inside)
    return None if best is None else (best[1], best[2])


def at(mountpoint: str | os.PathLike[str]) -> MountRecord | None:
    """The mount at a directory, dead or alive. The directory itself is not touched."""
    wanted = real_mountpoint(mountpoint)
    return next((r for r in reversed(mounted()) if r.mountpoint == wanted), None)


def seen_by(store: str) -> list[int]:
    """The processes that a store is mounted for, as far as we may know."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(source == store for _, source in _kernel_list(process)):
                found.append(int(process))
    return found


def write(record: MountRecord) -> None:
    """Keeps the record of the calling process's own mount."""
    path = _path(record.mountpoint)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    record = replace(record, pid=os.getpid(), started=_started(os.getpid()))
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(asdict(record)))
    beside.rename(path)


def remove(mountpoint: str) -> None:
    """Forgets a mount that has ended."""
    _path(mountpoint).unlink(missing_ok=True)


def real_mountpoint(path: str | os.PathLike[str]) -> str:
    """The real path of a directory that may be a dead mount, which no ``stat`` survives."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name) if name else parent


def key(mountpoint: str) -> str:
    """A short name for a mount, for its record and its log."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def _path(mountpoint: str) -> Path:
    return runtime_dir() / "mounts" / f"{key(mountpoint)}.json"


def _read(path: Path) -> MountRecord | None:
    try:
        return MountRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _inside(path: str, root: str) -> str | None:
    if path == root:
        return ""
    return path[len(root) + 1 :] if path.startswith(root.rstrip("/") + "/") else None


def _started(pid: int) -> int:
    """When a process was started; 0 where there is none, or one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def _kernel_list(process: str = "self") -> Iterator[tuple[str, str]]:
    """(mountpoint, store) of the mounts of memfs that a process sees, in the order of mounting."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.rstrip("\n").partition(" - ")
            kind, source, *_ = rest.split(" ")
            if kind == FSTYPE:
                yield _unescaped(fields.split(" ")[4]), _unescaped(source)


def _unescaped(text: str) -> str:
    """The kernel writes white space and backslashes in a path as ``\\040``."""
    for code in ("040", "011", "012", "134"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text
