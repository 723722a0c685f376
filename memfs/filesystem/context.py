"""Who asks for a file operation, and what it is really doing. Used by the tree; any thread.

FUSE tells a lookup apart from nothing: a program that is about to *create* ``kv.safetensors`` asks
first whether it is there, and the kernel fails the creation where the answer is yes. For names that
memfs itself brings up (a KV cache that could be made, a header that was just made) the answer has
to depend on the intent, so the system call that the asking thread is in is read from ``/proc``.
"""

from __future__ import annotations

import os
import platform
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from memfs.cube.access import Caller


class Context(NamedTuple):
    """The thread that asks. In a ``release`` all numbers are 0."""

    uid: int
    gid: int
    pid: int
    """Its thread id, which is also its process id in programs of one thread."""
    interrupted: Callable[[], bool]
    """Whether the caller was sent a signal and waits no longer. To be asked in this very thread."""
    umask: int = 0
    """Where the operation makes a file; see ``backing.mode_of_new``."""

    def caller(self) -> Caller:
        """Whose rights count; while the caller waits."""
        return Caller.of_process(self.uid, self.gid, self.pid)


class _Calls(NamedTuple):
    """Numbers of system calls on names; None where the machine has no such call."""

    open: int | None
    openat: int
    makers: frozenset[int]
    """mknod, mkdir and symlink, with and without a descriptor: they never take what is there.
    ``link`` is not one of them, as it looks up the old name, too."""
    renamers: frozenset[int]
    """rename, renameat and renameat2."""
    openat2: int = 437


_GENERIC = _Calls(None, 56, frozenset({33, 34, 36}), frozenset({38, 276}))
_BY_MACHINE = {
    "x86_64": _Calls(2, 257, frozenset({83, 88, 133, 258, 259, 266}), frozenset({82, 264, 316})),
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "ppc64le": _Calls(5, 286, frozenset({14, 39, 83, 287, 288, 295}), frozenset({38, 293, 357})),
    "s390x": _Calls(5, 288, frozenset({14, 39, 83, 289, 290, 297}), frozenset({38, 295, 347})),
}
_CALLS = _BY_MACHINE.get(platform.machine())

_CREATORS = frozenset({"cp", "mv", "install"})
"""Programs that create the files of a copied directory exclusively, by the names the kernel knows.
"""

_LONGEST_PATH = 4096

_TRIES = 500
_PAUSE = 0.0002
"""The asking thread may be still on its way to sleep: then the kernel calls it running. On a busy
machine it can be some hundredths of a second before it gets there.
"""


def creates(pid: int) -> bool | None:
    """Whether the thread is inside a call that must make a new file: ``mknod`` and its like, or an
    ``open`` with ``O_CREAT | O_EXCL``.

    None where that may not be known: another user's thread, or a system that restricts ptrace.
    """
    words = _system_call(pid)
    if _CALLS is None or words is None:
        return None
    if int(words[0]) in _CALLS.makers:
        return True
    flags = _open_flags(pid, words) or 0
    return flags & os.O_CREAT != 0 and flags & os.O_EXCL != 0


def renames(pid: int) -> bool | None:
    """Whether the thread is inside a call that renames; None where that may not be known."""
    words = _system_call(pid)
    if _CALLS is None or words is None:
        return None
    return int(words[0]) in _CALLS.renamers


def opens(pid: int) -> int | None:
    """The flags of the ``open`` that a thread is inside of; None where it is in none, or that may
    not be known.
    """
    words = _system_call(pid)
    return None if words is None else _open_flags(pid, words)


def names(pid: int, name: str) -> bool:
    """Whether a path that the thread gave its system call ends in ``name``.

    False where that may not be known.
    """
    words = _system_call(pid) or []
    for address in (int(word, 16) for word in words[1:6]):
        path, _, _ = _memory(pid, address, _LONGEST_PATH).partition(b"\0")
        if path.rpartition(b"/")[2] == os.fsencode(name):
            return True
    return False


def likely_creates(pid: int) -> bool:
    """A guess for where ``creates`` cannot know: the program is one that copies."""
    return program(pid) in _CREATORS


def program(pid: int) -> str:
    """The name of the program that a thread runs; "" where it has ended."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _system_call(pid: int) -> list[bytes] | None:
    """Number and arguments of the call that a thread is inside of; None where that is not known."""
    if _CALLS is None:
        return None
    for _ in range(_TRIES):
        try:
            with open(f"/proc/{pid}/syscall", "rb") as file:
                words = file.read().split()
        except OSError:
            return None
        if words and words[0] != b"running":
            return words
        time.sleep(_PAUSE)
    return None


def _open_flags(pid: int, words: list[bytes]) -> int | None:
    """Flags of the open that a ``/proc/PID/syscall`` line describes; None where it is none."""
    assert _CALLS is not None
    number = int(words[0])
    if number < 0 or len(words) < 4:
        return None
    if number == _CALLS.open:
        return int(words[2], 16)
    if number == _CALLS.openat:
        return int(words[3], 16)
    if number == _CALLS.openat2:
        return _pointed_at(pid, int(words[3], 16))
    return None


def _pointed_at(pid: int, address: int) -> int:
    """The flags of ``openat2``: the first 64 bits of a struct in the caller's memory."""
    raw = _memory(pid, address, 8)
    return int(struct.unpack("=Q", raw)[0]) if len(raw) == 8 else 0


def _memory(pid: int, address: int, size: int) -> bytes:
    """What a thread has in its memory; nothing where there is none, or it may not be known."""
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, size, address)
        finally:
            os.close(fd)
    except (OSError, OverflowError):  # an argument that is no address may be any number
        return b""
