"""Replacing and unlinking files that are open: the name is never without one of the two files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Mount, mounted_at, until
from .kvmaker import kv_file
from .test_durability import killed_at, needs_strace
from .test_frozen import freeze

UNLINKED = ".memfs/unlinked"


def kept_open(mount: Mount) -> list[str]:
    """What the store keeps for those who have it open, and what is written beside its place."""
    beside = [path.name for path in mount.store.rglob(".memfs-tmp-*")]
    return os.listdir(mount.store / UNLINKED) + beside


def links(path: Path, fd: int) -> tuple[int, int]:
    """How many names a file has, by its name and by a descriptor."""
    time.sleep(0.03)  # the kernel believes what it was told for 20 ms
    return path.stat().st_nlink, os.fstat(fd).st_nlink


def refused(number: int, old: Path, new: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.rename(old, new)
    assert caught.value.errno == number


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_rename_that_fails_leaves_an_open_target(mount: Mount, flags: int) -> None:
    cube = mount.cube("law", "One.\n")
    (cube / "payload.md").write_text("Two.\n")
    (version, *_) = sorted(os.listdir(cube / ".versions"))
    fd = os.open(cube / "payload.md", flags)
    try:
        refused(errno.EROFS, cube / f".versions/{version}/payload.md", cube / "payload.md")
        assert (cube / "payload.md").read_text() == "Two.\n"
        assert (mount.store / "law/payload.md").read_text() == "Two.\n"
        assert links(cube / "payload.md", fd) == (1, 1)
        if flags == os.O_RDWR:  # it is the text still, and its close is heard
            os.write(fd, b"Wow.\n")
    finally:
        os.close(fd)
    text = b"Wow.\n" if flags == os.O_RDWR else b"Two.\n"
    assert (cube / "payload.md").read_bytes() == text
    newest = sorted(os.listdir(cube / ".versions"))[-1]
    assert (cube / f".versions/{newest}/payload.md").read_bytes() == text
    until(lambda: kept_open(mount) == [])


def test_what_cannot_leave_a_frozen_cube_replaces_nothing(mount: Mount) -> None:
    frozen = mount.cube("frozen")
    (frozen / "file.txt").write_text("frozen")
    freeze(frozen)
    keep = mount.dir / "keep.txt"
    keep.write_text("kept")
    with keep.open() as opened:
        refused(errno.EPERM, frozen / "file.txt", keep)
        assert keep.read_text() == "kept"
        assert links(keep, opened.fileno()) == (1, 1)
    assert keep.read_text() == "kept"
    assert (frozen / "file.txt").read_text() == "frozen"
    until(lambda: kept_open(mount) == [])


def test_a_directory_does_not_replace_an_open_file(mount: Mount) -> None:
    (mount.dir / "dir").mkdir()
    (mount.dir / "file").write_text("kept")
    with (mount.dir / "file").open() as opened:
        refused(errno.ENOTDIR, mount.dir / "dir", mount.dir / "file")
        assert (mount.dir / "file").read_text() == opened.read() == "kept"
    assert (mount.dir / "file").read_text() == "kept"


def test_a_replaced_file_has_no_links(mount: Mount) -> None:
    (mount.dir / "old").write_text("old")
    os.link(mount.dir / "old", mount.dir / "other")
    (mount.dir / "new").write_text("new")
    with (mount.dir / "old").open() as opened:
        assert links(mount.dir / "old", opened.fileno()) == (2, 2)
        os.rename(mount.dir / "new", mount.dir / "old")
        assert links(mount.dir / "old", opened.fileno()) == (1, 1)
        assert links(mount.dir / "other", opened.fileno()) == (1, 1)
        (mount.dir / "other").unlink()
        assert links(mount.dir / "old", opened.fileno()) == (1, 0)
        assert opened.read() == "old"
    until(lambda: kept_open(mount) == [])
    assert (mount.dir / "old").read_text() == "new"


def test_a_name_of_the_same_file_replaces_nothing(mount: Mount) -> None:
    (mount.dir / "one").write_text("one")
    os.link(mount.dir / "one", mount.dir / "two")
    with (mount.dir / "two").open("r+") as opened:
        os.rename(mount.dir / "one", mount.dir / "two")
        assert sorted(os.listdir(mount.dir)) == ["one", "two"]
        assert links(mount.dir / "two", opened.fileno()) == (2, 2)
        opened.write("two")
    assert (mount.dir / "one").read_text() == "two"
    until(lambda: kept_open(mount) == [])


def test_a_second_rename_succeeds_where_the_first_one_failed(mount: Mount) -> None:
    cube = mount.cube("law")
    header = (cube / "meta.json").read_text()
    (cube / "new").write_text("{ bad")
    with (cube / "meta.json").open() as opened:
        refused(errno.EINVAL, cube / "new", cube / "meta.json")
        assert (cube / "meta.json").read_text() == opened.read() == header
        (cube / "new").write_text(json.dumps(json.loads(header) | {"mine": 1}))
        os.rename(cube / "new", cube / "meta.json")
        assert mount.meta("law")["mine"] == 1
        assert links(cube / "meta.json", opened.fileno())[0] == 1
    until(lambda: kept_open(mount) == [])
    freeze(cube)  # its files have no names that nobody sees


def test_what_is_being_written_is_replaced_only_if_the_rename_succeeds(mount: Mount) -> None:
    cube, kv = mount.cube("law"), kv_file(b"Some text.\n")
    file = cube / "kv.safetensors"
    file.write_bytes(kv)
    frozen = mount.cube("frozen")
    (frozen / "other").write_bytes(kv)
    freeze(frozen)
    fd = os.open(file, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, kv[:-8])
    refused(errno.EPERM, frozen / "other", file)
    os.write(fd, kv[-8:])
    assert file.read_bytes() == kv
    os.close(fd)
    assert (mount.store / "law/kv.safetensors").read_bytes() == kv
    fd = os.open(file, os.O_WRONLY)
    os.write(fd, b"x")
    (cube / "other").write_bytes(kv)
    os.rename(cube / "other", file)
    assert [path.name for path in cube.iterdir()].count("kv.safetensors") == 1
    assert os.fstat(fd).st_nlink == 0
    os.write(fd, b"y")
    os.close(fd)
    assert file.read_bytes() == kv
    until(lambda: kept_open(mount) == [])


@pytest.mark.parametrize("name", ["kv.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("there", [False, True])
def test_a_cube_goes_while_it_is_written(mount: Mount, name: str, there: bool) -> None:
    cube = mount.cube("law")
    (cube / name).parent.mkdir(exist_ok=True)
    if there:
        (cube / name).write_bytes(b"there before")
    with (cube / name).open("wb") as opened:
        opened.write(b"half")
        opened.flush()
        shutil.rmtree(cube)
        assert os.listdir(mount.dir) == []
        opened.write(b" and more")
    until(lambda: kept_open(mount) == [])
    assert not (mount.store / "law").exists()


def test_a_cube_goes_while_its_header_is_written(mount: Mount) -> None:
    cube = mount.cube("law")
    with (cube / "meta.json").open("r+") as opened:
        opened.write("{ half")
        opened.flush()
        shutil.rmtree(cube)
    until(lambda: kept_open(mount) == [])
    assert not (mount.store / "law").exists()


def test_many_unlinked_files_cost_nobody_else_anything(mount: Mount) -> None:
    """Every ``stat`` of the mount once asked for each of them."""
    (mount.dir / "file").write_text("x")

    def fastest() -> float:
        times = []
        for _ in range(50):
            begun = time.perf_counter()
            (mount.dir / "file").stat()
            times.append(time.perf_counter() - begun)
        return min(times)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    before, held = fastest(), []
    try:
        for number in range(2000):
            name = mount.dir / f"gone{number}"
            held.append(os.open(name, os.O_RDWR | os.O_CREAT))
            if number % 500 == 0:
                os.link(name, mount.dir / f"stays{number}")
            name.unlink()
        assert fastest() < 10 * before
        assert [os.fstat(held[n]).st_nlink for n in (0, 1, 500, 501)] == [1, 0, 1, 0]
        assert (mount.dir / "stays500").stat().st_nlink == 1
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    until(lambda: kept_open(mount) == [])


@needs_strace
@pytest.mark.parametrize("call", ["renameat", "linkat"])
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path, call: str) -> None:
    """While the old one is open, as it is in an editor. (Killed as the call is entered.)"""
    with mounted_at(tmp_path) as mount:
        (mount.dir / "doc.txt").write_text("old")
        (mount.dir / "doc.txt.tmp").write_text("new")
        with (
            (mount.dir / "doc.txt").open(),
            killed_at(mount.pid, call, tmp_path),
            pytest.raises(OSError, match=r"connect|abort"),
        ):
            os.rename(mount.dir / "doc.txt.tmp", mount.dir / "doc.txt")
        mount.start()
        assert (mount.dir / "doc.txt").read_text() == "old"
        assert os.listdir(mount.store / UNLINKED) == []


def replaced_by_rename(file: Path) -> None:
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    os.rename(copy, file)


def written_in_place(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text())))


READER = """
import collections, errno, os, sys, time
end, failed = time.monotonic() + 3, collections.Counter()
while time.monotonic() < end:
    try:
        os.close(os.open(sys.argv[1], os.O_RDONLY))
        failed["opened"] += 1
    except OSError as e:
        failed[errno.errorcode[e.errno]] += 1
print(*failed.elements())
"""


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("payload.md", replaced_by_rename),
        ("meta.json", replaced_by_rename),
        ("meta.json", written_in_place),
    ],
)
def test_a_file_that_is_always_there_can_always_be_opened(
    mount: Mount, name: str, save: Callable[[Path], None]
) -> None:
    """While others have it open, and save it."""
    file = mount.cube("law") / name
    command = [sys.executable, "-c", READER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            with file.open():
                save(file)
        found = Counter((reader.stdout.read() if reader.stdout else "").split())
    stale = found.pop("ESTALE", 0) if save is replaced_by_rename else 0  # see conformance.md
    assert list(found) == ["opened"], found
    assert stale <= found["opened"] / 100
