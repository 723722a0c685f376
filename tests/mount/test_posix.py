"""A file in the mount is a file: everything passes through with POSIX meaning."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import needs_root

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def utimensat(path: Path, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    times = (ctypes.c_long * 4)(*accessed, *modified)
    assert libc.utimensat(-100, os.fsencode(path), times, 0x100) == 0


def in_store(place: Path, name: str) -> Path:
    return place.parent.parent / "store" / place.name / name


def test_what_is_written_is_read_and_is_in_the_store(place: Path) -> None:
    data = os.urandom(300_000)
    (place / "file").write_bytes(data)
    assert (place / "file").read_bytes() == data
    assert in_store(place, "file").read_bytes() == data


def test_writing_in_places_appending_and_truncating(place: Path) -> None:
    file = place / "file"
    with file.open("wb") as opened:
        opened.seek(10_000)
        opened.write(b"end")
        opened.flush()
        os.pwrite(opened.fileno(), b"start", 0)
        os.ftruncate(opened.fileno(), 10_001)
    assert file.read_bytes() == b"start" + bytes(9_995) + b"e"
    with file.open("ab") as first, file.open("ab") as second:
        first.write(b"1")
        first.flush()
        second.write(b"2")
        second.flush()
    assert file.read_bytes()[-3:] == b"e12"
    os.truncate(file, 5)
    assert file.read_bytes() == b"start"
    file.write_bytes(b"x")
    assert file.stat().st_size == 1


def test_a_write_only_descriptor_and_o_direct(place: Path) -> None:
    file = place / "file"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT, 0o200)
    os.write(fd, b"ab")
    os.pwrite(fd, b"c", 5000)
    os.close(fd)
    assert file.stat().st_size == 5001
    fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    assert os.pread(fd, 4096, 0)[:2] == b"ab"
    os.close(fd)


def test_shared_mappings(place: Path) -> None:
    file = place / "file"
    file.write_bytes(bytes(8192))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 8192) as mapped:
        mapped[5000:5003] = b"abc"
        mapped.flush()
    assert in_store(place, "file").read_bytes()[5000:5003] == b"abc"


def test_directories(place: Path) -> None:
    (place / "a/b").mkdir(parents=True)
    (place / "a/b/file").touch()
    assert sorted(os.listdir(place / "a")) == ["b"]
    with pytest.raises(OSError, match="not empty"):
        (place / "a").rmdir()
    (place / "a/b/file").unlink()
    (place / "a/b").rmdir()
    assert os.listdir(place / "a") == []
    with pytest.raises(NotADirectoryError):
        (place / "a/missing").parent.joinpath("x").write_text("") or os.listdir(place / "a/x")
    for path in (".", ".."):
        assert os.stat(place / "a" / path).st_ino


def test_many_entries(place: Path) -> None:
    names = {f"{i:05d}" for i in range(3000)}
    for name in names:
        (place / name).touch()
    with os.scandir(place) as entries:
        found = {entry.name: (entry.is_file(), entry.inode()) for entry in entries}
    assert found.keys() == names
    assert all(is_file for is_file, _ in found.values())
    assert found["00042"][1] == os.stat(place / "00042").st_ino


def test_rename_replaces(place: Path) -> None:
    (place / "a").write_text("a")
    (place / "b").write_text("b")
    os.rename(place / "a", place / "b")
    assert os.listdir(place) == ["b"]
    assert (place / "b").read_text() == "a"


def test_rename_that_must_not_replace(place: Path) -> None:
    (place / "a").write_text("a")
    (place / "b").write_text("b")
    with pytest.raises(FileExistsError):
        renameat2(place / "a", place / "b", RENAME_NOREPLACE)
    renameat2(place / "a", place / "c", RENAME_NOREPLACE)
    assert (place / "c").read_text() == "a"


def test_rename_that_exchanges(place: Path) -> None:
    (place / "a").write_text("a")
    (place / "b").mkdir()
    (place / "b/inside").write_text("b")
    with (place / "a").open() as opened:
        renameat2(place / "a", place / "b", RENAME_EXCHANGE)
        assert opened.read() == "a"
    assert (place / "b").read_text() == "a"
    assert (place / "a/inside").read_text() == "b"


def test_hard_links_are_one_file(place: Path) -> None:
    (place / "a").write_text("a")
    os.link(place / "a", place / "b")
    first, second = os.stat(place / "a"), os.stat(place / "b")
    assert first.st_ino == second.st_ino
    assert second.st_nlink == 2
    (place / "b").write_text("changed")
    assert (place / "a").read_text() == "changed"
    os.unlink(place / "a")
    assert os.stat(place / "b").st_nlink == 1


def test_symlinks(place: Path) -> None:
    os.symlink("there", place / "link")
    assert os.readlink(place / "link") == "there"
    assert os.lstat(place / "link").st_size == 5
    assert not (place / "link").exists()
    (place / "there").write_text("here")
    assert (place / "link").read_text() == "here"


def test_a_symlink_in_the_store_is_followed_by_nobody_but_the_reader(place: Path) -> None:
    outside = place.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    os.symlink(outside, in_store(place, "way"))
    assert os.readlink(place / "way") == str(outside)
    with pytest.raises(PermissionError):
        os.rename(place / "way", place.parent / ".memfs" / "x")


def test_times_to_the_nanosecond(place: Path) -> None:
    file = place / "file"
    file.touch()
    os.utime(file, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    found = file.stat()
    assert found.st_atime_ns == 1_234_567_890_123_456_789
    assert found.st_mtime_ns == 987_654_321_987_654_321


def test_one_time_left_alone_and_one_set_to_now(place: Path) -> None:
    file = place / "file"
    file.touch()
    os.utime(file, ns=(10**18, 10**18))
    utimensat(file, (0, UTIME_OMIT), (5, 6))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (10**18, 5_000_000_006)
    utimensat(file, (0, UTIME_NOW), (0, UTIME_OMIT))
    assert file.stat().st_atime_ns > 10**18
    assert file.stat().st_mtime_ns == 5_000_000_006
    subprocess.run(["touch", file], check=True)
    assert file.stat().st_mtime_ns > 10**18


def test_the_times_of_a_symlink(place: Path) -> None:
    os.symlink("nowhere", place / "link")
    utimensat(place / "link", (7, 0), (8, 9))
    assert os.lstat(place / "link").st_mtime_ns == 8_000_000_009


def test_modes(place: Path) -> None:
    file = place / "file"
    old = os.umask(0o027)
    try:
        file.touch(0o666)
        (place / "dir").mkdir(0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE((place / "dir").stat().st_mode) == 0o750
    file.chmod(0o4711)
    assert stat.S_IMODE(file.stat().st_mode) == 0o4711
    with file.open() as opened:
        os.fchmod(opened.fileno(), 0o600)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@needs_root
def test_owners(place: Path) -> None:
    file = place / "file"
    file.touch()
    os.chown(file, 1234, 2345)
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 2345)
    os.chown(file, -1, 99)
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 99)
    os.symlink("nowhere", place / "link")
    os.lchown(place / "link", 5, 6)
    assert os.lstat(place / "link").st_uid == 5


def as_user(uid: int, gid: int, code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code as another user. The interpreter itself may be where only root can go."""
    become = f"import json, os; os.setgroups([]); os.setgid({gid}); os.setuid({uid})\n"
    return subprocess.run(
        [sys.executable, "-c", become + textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def open_place(place: Path) -> Path:
    """A directory for everybody, and everybody may walk to it."""
    with contextlib.ExitStack() as stack:
        for above in [place, *place.parents][:-1]:
            mode = stat.S_IMODE(above.stat().st_mode)
            if not mode & 1 or above == place:
                above.chmod(mode | 0o711)
                stack.callback(above.chmod, mode)
        place.chmod(0o777)
        yield place


@needs_root
def test_new_files_belong_to_who_makes_them(open_place: Path) -> None:
    code = """
        import os, sys
        os.chdir(sys.argv[1])
        os.umask(0o022)
        open("file", "w").close()
        os.mkdir("dir")
        os.symlink("x", "link")
        os.mkfifo("fifo")
    """
    assert as_user(1234, 2345, code, open_place).stderr == ""
    for name in ("file", "dir", "link", "fifo"):
        found = os.lstat(open_place / name)
        assert (found.st_uid, found.st_gid) == (1234, 2345), name


@needs_root
def test_a_setgid_directory_hands_its_group_on(open_place: Path) -> None:
    shared = open_place / "shared"
    shared.mkdir()
    os.chown(shared, 0, 777)
    shared.chmod(0o2777)
    code = "import os, sys; os.chdir(sys.argv[1]); open('f', 'w').close(); os.mkdir('d')"
    assert as_user(1234, 2345, code, shared).stderr == ""
    assert (os.stat(shared / "f").st_uid, os.stat(shared / "f").st_gid) == (1234, 777)
    assert os.stat(shared / "d").st_gid == 777
    assert os.stat(shared / "d").st_mode & stat.S_ISGID


@needs_root
def test_permissions_hold_for_others(open_place: Path) -> None:
    (open_place / "secret").write_text("secret")
    (open_place / "secret").chmod(0o600)
    code = "import sys; open(sys.argv[1]).read()"
    assert "PermissionError" in as_user(1234, 2345, code, open_place / "secret").stderr
    code = "import os, sys; os.chmod(sys.argv[1], 0o777)"
    assert "PermissionError" in as_user(1234, 2345, code, open_place / "secret").stderr
    code = "import os, sys; os.unlink(sys.argv[1])"
    (open_place / "kept").mkdir(0o755)
    (open_place / "kept/file").touch()
    assert "PermissionError" in as_user(1234, 2345, code, open_place / "kept/file").stderr


@needs_root
def test_a_write_by_another_takes_the_setuid_bit(open_place: Path) -> None:
    file = open_place / "program"
    file.touch()
    file.chmod(0o4777)
    code = "import sys; open(sys.argv[1], 'r+').write('x')"
    assert as_user(1234, 2345, code, file).stderr == ""
    assert not file.stat().st_mode & stat.S_ISUID


def test_extended_attributes(place: Path) -> None:
    file = place / "file"
    file.touch()
    os.setxattr(file, "user.one", b"1")
    assert os.getxattr(file, "user.one") == b"1"
    assert os.listxattr(file) == ["user.one"]
    with pytest.raises(FileExistsError):
        os.setxattr(file, "user.one", b"2", os.XATTR_CREATE)
    os.removexattr(file, "user.one")
    with pytest.raises(OSError, match="No data") as raised:
        os.getxattr(file, "user.one")
    assert raised.value.errno == errno.ENODATA
    os.setxattr(place, "user.on_a_directory", b"x" * 1000)
    assert len(os.getxattr(place, "user.on_a_directory")) == 1000


def test_statvfs(place: Path) -> None:
    here, there = os.statvfs(place), os.statvfs(in_store(place, ""))
    assert (here.f_bsize, here.f_blocks, here.f_namemax) == (
        there.f_bsize,
        there.f_blocks,
        there.f_namemax,
    )


def test_fsync_and_fallocate(place: Path) -> None:
    fd = os.open(place / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"data")
    os.fsync(fd)
    os.fdatasync(fd)
    os.posix_fallocate(fd, 0, 10_000)
    assert os.fstat(fd).st_size == 10_000
    os.close(fd)
    fd = os.open(place, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def test_fifos_and_sockets(place: Path) -> None:
    os.mkfifo(place / "fifo")
    assert stat.S_ISFIFO(os.lstat(place / "fifo").st_mode)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((place / "fifo").read_text()))
    reader.start()
    (place / "fifo").write_text("through")
    reader.join(10)
    assert got == ["through"]
    with contextlib.chdir(place), socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert stat.S_ISSOCK(os.lstat("socket").st_mode)


def test_locks_keep_processes_apart(place: Path) -> None:
    file = place / "file"
    file.write_text("x" * 10)
    code = """if 1:
        import fcntl, sys
        with open(sys.argv[1], "r+") as f:
            try:
                {lock}
            except BlockingIOError:
                sys.exit(3)
    """
    flock = code.format(lock="fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    posix = code.format(lock="fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5)")
    with file.open("r+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert subprocess.run([sys.executable, "-c", flock, file], check=False).returncode == 3
        fcntl.lockf(opened, fcntl.LOCK_EX, 5)
        assert subprocess.run([sys.executable, "-c", posix, file], check=False).returncode == 3
    assert subprocess.run([sys.executable, "-c", flock, file], check=False).returncode == 0


def test_a_file_lives_on_while_it_is_open(place: Path) -> None:
    (place / "dir").mkdir()
    file = place / "dir/file"
    with file.open("w+") as opened:
        opened.write("kept")
        opened.flush()
        file.unlink()
        assert os.listdir(place / "dir") == []
        assert os.fstat(opened.fileno()).st_nlink == 0
        assert os.fstat(opened.fileno()).st_size == 4
        opened.seek(0)
        assert opened.read() == "kept"
        opened.write(" on")
        opened.flush()
        os.ftruncate(opened.fileno(), 5)
        assert os.fstat(opened.fileno()).st_size == 5
        (place / "dir").rmdir()
        opened.seek(0)
        assert opened.read() == "kept "
    assert os.listdir(place) == []


def test_a_replaced_file_lives_on_while_it_is_open(place: Path) -> None:
    (place / "file").write_text("old")
    (place / "new").write_text("new")
    with (place / "file").open() as opened:
        os.rename(place / "new", place / "file")
        assert opened.read() == "old"
    assert (place / "file").read_text() == "new"
    assert os.listdir(place) == ["file"]


def test_temporary_files(place: Path) -> None:
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x" * 100_000)
        file.seek(0)
        assert len(file.read()) == 100_000
    assert os.listdir(place) == []


def test_names_that_are_not_utf8(place: Path) -> None:
    name = os.fsdecode(b"\xff\xfe name \xe9")
    (place / name).write_text("x")
    os.symlink(os.fsdecode(b"\xff"), place / "link")
    assert sorted(os.listdir(os.fsencode(place))) == [b"link", os.fsencode(name)]
    assert os.readlink(os.fsencode(place / "link")) == b"\xff"
    os.rename(place / name, place / "plain")
    assert (place / "plain").read_text() == "x"


def test_errors_are_the_kernels(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(FileNotFoundError):
        (place / "missing").read_text()
    with pytest.raises(NotADirectoryError):
        (place / "file/below").read_text()
    with pytest.raises(FileExistsError):
        (place / "file").mkdir()
    with pytest.raises(OSError, match="too long") as raised:
        (place / ("x" * 256)).touch()
    assert raised.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError, match="symbolic links"):
        os.symlink("me", place / "me")
        (place / "me").read_text()


def test_a_change_beside_the_mount_shows_at_once(place: Path) -> None:
    file = place / "file"
    file.write_text("through the mount")
    assert file.read_text() == "through the mount"
    in_store(place, "file").write_text("beside it")
    assert file.read_text() == "beside it"
    in_store(place, "other").touch()
    assert (place / "other").exists()
    in_store(place, "other").unlink()
    assert not (place / "other").exists()


def test_many_threads(place: Path) -> None:
    def work(number: int) -> None:
        for i in range(25):
            file = place / f"{number}-{i}"
            file.write_text(str(i))
            os.rename(file, place / f"{number}-renamed")
            assert (place / f"{number}-renamed").read_text() == str(i)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(os.listdir(place)) == 8
