"""Everything that a disk keeps of a tree, to be compared."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """One file, of whatever kind."""

    mode: str
    owner: tuple[int, int]
    device: int
    size: int | None
    """None of a directory: how large it is is the filesystem's affair."""
    mtime_ns: int
    attributes: dict[str, bytes]
    content: str | None
    """Digest of a file's bytes; target of a symlink."""
    same_as: str | None
    """The first of the names of a file with several."""


def snapshot(root: Path) -> dict[str, Entry]:
    """What is in a tree, by path. Attributes of memfs's own are left out."""
    found: dict[str, Entry] = {}
    first: dict[int, str] = {}
    paths = [root, *sorted(root.rglob("*"), key=os.fsencode)]
    for path in paths:
        status, name = path.lstat(), str(path.relative_to(root))
        is_dir = stat.S_ISDIR(status.st_mode)
        content = None
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        names = os.listxattr(path, follow_symlinks=False)
        found[name] = Entry(
            stat.filemode(status.st_mode),
            (status.st_uid, status.st_gid),
            status.st_rdev,
            None if is_dir else status.st_size,
            status.st_mtime_ns,
            {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in names
                if not name.startswith("user.memfs.")
            },
            content,
            None if is_dir else first.setdefault(status.st_ino, name),
        )
    return found


def differences(one: Path, two: Path) -> dict[str, tuple[Entry | None, Entry | None]]:
    """Where two trees differ, and how."""
    a, b = snapshot(one), snapshot(two)
    names = sorted(a.keys() | b.keys(), key=os.fsencode)
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def make_zoo(root: Path) -> None:
    """A tree with one of everything that a copy can lose. As root, what only root can make too."""
    (root / "directory/below").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(os.urandom(300_000))
    os.link(root / "file", root / "directory/hard link")
    (root / "symlink").symlink_to("file")
    (root / "to a directory").symlink_to("directory")
    (root / "dangling").symlink_to("/no/where")
    with (root / "sparse").open("wb") as sparse:
        sparse.seek(3 << 20)
        sparse.write(b"x")
        sparse.truncate(5 << 20)
    os.mkfifo(root / "fifo")
    names = ("a b", "new\nline", "-dash", "*", "\udcff\udcfe", ".hidden", "n" * 255, "ünïcödé")
    for name in names:
        (root / name).write_text(name, errors="surrogateescape")
    (root / "acl").write_text("for some")
    subprocess.run(["setfacl", "-m", "u:1234:rw,g:2345:r", root / "acl"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:1234:rwx", root / "directory"], check=True)
    os.setxattr(root / "file", "user.text", b"value")
    os.setxattr(root / "directory", "user.binary", b"\0\xff\0")
    (root / "empty").chmod(0o1777)
    if os.geteuid() == 0:
        os.chown(root / "directory/below", 1234, 2345)
        os.chown(root / "symlink", 11, 22, follow_symlinks=False)
        os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.setxattr(root / "symlink", "trusted.text", b"value", follow_symlinks=False)
        (root / "*").chmod(0)
    (root / "file").chmod(0o4750)
    for number, path in enumerate([*root.rglob("*"), root]):
        when = 981_173_106_123_456_789 + number * 1_000_000_001
        os.utime(path, ns=(when, when), follow_symlinks=False)


def make_socket(path: Path) -> None:
    """A socket's file; its path may be long."""
    with socket.socket(socket.AF_UNIX) as opened:
        directory = os.open(path.parent, os.O_PATH)
        try:
            opened.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
