"""What a disk does that a mount easily does not: each was found by a suite from outside."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from ..conftest import needs
from .conftest import memfs, mounted_at, needs_root
from .test_posix import as_user, open_place

__all__ = ["open_place"]  # a fixture


@needs_root
def test_a_node_made_by_another_keeps_its_setgid_bit(open_place: Path) -> None:
    code = "import os, sys; os.umask(0); os.mkfifo(sys.argv[1], 0o2755)"
    assert as_user(1234, 2345, code, open_place / "fifo").stderr == ""
    found = (open_place / "fifo").stat()
    assert (found.st_mode, found.st_uid) == (stat.S_IFIFO | 0o2755, 1234)


@needs_root
def test_emptying_by_another_takes_the_setuid_bits(open_place: Path) -> None:
    file = open_place / "program"
    file.write_text("x")
    for emptied in ("open(sys.argv[1], 'w')", "os.truncate(sys.argv[1], 0)"):
        file.chmod(0o6777)
        code = f"import os, sys; {emptied}"
        assert as_user(1234, 2345, code, file).stderr == ""
        assert stat.S_IMODE(file.stat().st_mode) == 0o777, emptied
    file.chmod(0o6777)
    file.write_text("root may")
    assert stat.S_IMODE(file.stat().st_mode) == 0o6777


def test_a_file_unlinked_while_open_leaves_the_right_number_of_links(place: Path) -> None:
    (place / "a").write_text("x")
    os.link(place / "a", place / "b")
    with (place / "a").open() as opened:
        os.unlink(place / "a")
        assert os.stat(place / "b").st_nlink == 1
        assert opened.read() == "x"
        time.sleep(0.1)  # what the kernel knew of the file under its other name is forgotten
        assert os.fstat(opened.fileno()).st_nlink == 1
        os.unlink(place / "b")
        time.sleep(0.1)
        assert os.fstat(opened.fileno()).st_nlink == 0


def test_data_and_holes_are_found(place: Path) -> None:
    fd = os.open(place / "sparse", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 4096, 1 << 20)
    os.ftruncate(fd, 3 << 20)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
    assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
    with pytest.raises(OSError, match="No such device") as raised:
        os.lseek(fd, 2 << 20, os.SEEK_DATA)
    assert raised.value.errno == errno.ENXIO
    os.close(fd)


def test_more_files_are_open_than_the_mount_was_started_with_leave_for(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 600
    resource.setrlimit(resource.RLIMIT_NOFILE, (count // 2, hard))
    try:
        with mounted_at(tmp_path) as mount:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count), hard))
            opened = [(mount.dir / str(i)).open("w") for i in range(count)]
            for file in opened:
                file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_noatime_leaves_no_access_times(tmp_path: Path) -> None:
    with mounted_at(tmp_path, "-o", "noatime") as mount:
        file = mount.dir / "file"
        file.write_text("x")
        os.utime(file, ns=(10**18, 10**18))
        assert file.read_text() == "x"
        assert file.stat().st_atime_ns == 10**18


def test_symlinks_that_lead_into_the_mount_can_be_worked_on(tmp_path: Path) -> None:
    """Whatever memfs looks at for an operation must not lead through the mount itself."""
    with mounted_at(tmp_path) as mount:
        served_by = mount.pid
        (mount.dir / "below").mkdir()
        (mount.dir / "below/file").write_text("x")
        work = """
            ln -s {0}/file link && ln -s {0} way && touch -h link && chown -h 0:0 way &&
            mv link moved && ln -f moved hard && mv -T moved way && rm way hard && ls -A
        """
        done = subprocess.Popen(
            ["sh", "-c", work.format(mount.dir / "below")],
            cwd=mount.dir / "below",
            stdout=subprocess.PIPE,
        )
        try:
            assert done.communicate(timeout=20)[0] == b"file\n"
        except subprocess.TimeoutExpired:
            os.kill(served_by, signal.SIGKILL)  # it would never end, nor could it be unmounted
            raise


@needs_root
@needs("setfacl")
def test_a_default_access_list_takes_the_umasks_place(open_place: Path) -> None:
    (open_place / "listed").mkdir()
    (open_place / "listed").chmod(0o777)
    subprocess.run(["setfacl", "-dm", "g::rwx,o::r-x", open_place / "listed"], check=True)
    code = """
        import os, sys
        os.chdir(sys.argv[1])
        os.umask(0o077)
        for place in ("listed", "."):
            os.close(os.open(place + "/file", os.O_CREAT, 0o666))
            os.mkdir(place + "/dir", 0o777)
    """
    assert as_user(1234, 2345, code, open_place).stderr == ""
    found = {
        name: stat.S_IMODE((open_place / name).stat().st_mode)
        for name in ("listed/file", "listed/dir", "file", "dir")
    }
    assert found == {"listed/file": 0o664, "listed/dir": 0o775, "file": 0o600, "dir": 0o700}


@needs_root
@needs("setfacl")
def test_a_list_given_by_who_is_not_in_the_group_takes_the_setgid_bit(open_place: Path) -> None:
    file = open_place / "file"
    file.touch()
    for group, mode in ((2345, 0o2775), (2346, 0o775)):
        os.chown(file, 1234, group)
        file.chmod(0o2775)
        command = ["setfacl", "-m", f"u:{group}:rwx", file]
        subprocess.run(command, check=True, user=1234, group=2345, extra_groups=[])
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_file_that_is_really_called_so_is_not_taken_for_an_unlinked_one(place: Path) -> None:
    """rsync copies what another FUSE mount has left, and renames it when it is hardly closed."""
    name = ".fuse_hidden0123456789abcdef"
    with (place / "file").open("w") as opened:
        opened.write("kept")
        os.rename(place / "file", place / name)
    assert os.listdir(place) == [name]
    with (place / name).open() as opened:
        os.unlink(place / name)
        assert os.listdir(place) == []
        assert opened.read() == "kept"


def test_a_second_mount_of_a_store_is_refused(tmp_path: Path) -> None:
    """Under whatever name; two mounts would not know of each other's open files and locks."""
    with mounted_at(tmp_path) as mount:
        (mount.dir / "file").write_text("x")
        (tmp_path / "way").symlink_to(mount.store)
        for store in (mount.store, tmp_path / "way"):
            refused = memfs("mount", store, tmp_path / "second", check=False)
            assert refused.returncode != 0
            assert f"is mounted at {mount.dir}" in refused.stderr
            assert not os.path.ismount(tmp_path / "second")
        assert (mount.dir / "file").read_text() == "x"
    with mounted_at(tmp_path) as mount:  # once the first is gone, at once
        assert (mount.dir / "file").read_text() == "x"


@needs_root
def test_devices_and_setuid_programs_work_where_root_wants_them(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        os.mknod(mount.dir / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with pytest.raises(PermissionError):
            (mount.dir / "null").read_bytes()
    with mounted_at(tmp_path, "-o", "dev,suid") as mount:
        assert (mount.dir / "null").read_bytes() == b""
        assert not os.statvfs(mount.dir).f_flag & (os.ST_NOSUID | os.ST_NODEV)


def test_a_new_directory_keeps_the_access_time_it_is_given(tmp_path: Path) -> None:
    """Who watches the store lists it, and that may come after."""
    with mounted_at(tmp_path) as mount:
        for number in range(40):
            directory = mount.dir / str(number)
            directory.mkdir()
            os.utime(directory, (1_900_000_000, 1_950_000_000))
            time.sleep(0.03)
            assert directory.stat().st_atime == 1_900_000_000
