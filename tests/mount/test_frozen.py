"""A frozen cube takes no writes by any way in, root's included, and thaws by its owner's word."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import Mount, mounted_at, until
from tests.users import as_user, needs_root


def freeze(cube: Path, frozen: bool = True, **state: Any) -> None:
    """Saves the header as an editor in place does."""
    meta = json.loads((cube / "meta.json").read_text())
    meta["state"] |= {"frozen": frozen} | state
    (cube / "meta.json").write_text(json.dumps(meta))


def listing(store: Path, cube: str) -> dict[str, tuple[Any, ...]]:
    """Everything of a cube on disk that a write could change."""
    found = {}
    for path in sorted([store / cube, *(store / cube).rglob("*")]):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        names = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        times = () if path.is_dir() else (status.st_mtime_ns,)
        found[str(path)] = (status.st_ino, status.st_mode, status.st_uid, data, names, *times)
    return found


@pytest.fixture
def cube(shared_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A cube with a file of each kind, to be frozen."""
    cube = shared_mount.cube(f"{request.node.name.replace('/', '-')}/law")
    (cube / "kv.safetensors").write_bytes(b"some kv " * 1000)
    (cube / "adapter").mkdir()
    (cube / "adapter/adapter_model.safetensors").write_bytes(b"an adapter " * 100)
    (cube / "notes").mkdir()
    (cube / "notes/one.txt").write_text("one")
    return cube


WAYS: dict[str, Callable[[Path], Any]] = {
    "write the text": lambda c: (c / "payload.md").write_text("x"),
    "append to it": lambda c: (c / "payload.md").open("a"),
    "open it for both": lambda c: (c / "payload.md").open("r+"),
    "truncate it by path": lambda c: os.truncate(c / "payload.md", 1),
    "empty it": lambda c: os.open(c / "payload.md", os.O_WRONLY | os.O_TRUNC),
    "write the KV cache": lambda c: (c / "kv.safetensors").write_bytes(b"x"),
    "truncate it": lambda c: os.truncate(c / "kv.safetensors", 1),
    "write the adapter": lambda c: (c / "adapter/adapter_model.safetensors").write_bytes(b"x"),
    "write another file": lambda c: (c / "notes/one.txt").write_text("x"),
    "make a file": lambda c: (c / "new").write_text("x"),
    "make a file below": lambda c: (c / "notes/new").write_text("x"),
    "make a directory": lambda c: (c / "new").mkdir(),
    "make a symlink": lambda c: (c / "new").symlink_to("payload.md"),
    "make a fifo": lambda c: os.mkfifo(c / "new"),
    "link a file into it": lambda c: os.link(c.parent / "outside", c / "new"),
    "link a file out of it": lambda c: os.link(c / "payload.md", c.parent / "new"),
    "remove the text": lambda c: (c / "payload.md").unlink(),
    "remove the header": lambda c: (c / "meta.json").unlink(),
    "remove a file": lambda c: (c / "notes/one.txt").unlink(),
    "remove a directory": lambda c: (c / "notes").rmdir(),
    "remove all of it": shutil.rmtree,
    "rename within": lambda c: (c / "payload.md").rename(c / "p2"),
    "rename into": lambda c: (c.parent / "outside").rename(c / "payload.md"),
    "rename over the header": lambda c: (c.parent / "outside").rename(c / "meta.json"),
    "rename out of it": lambda c: (c / "notes/one.txt").rename(c.parent / "one.txt"),
    "rename it": lambda c: c.rename(c.parent / "law2"),
    "chmod": lambda c: (c / "payload.md").chmod(0o600),
    "chmod the directory": lambda c: c.chmod(0o700),
    "chmod the header": lambda c: (c / "meta.json").chmod(0o600),
    "chown": lambda c: os.chown(c / "payload.md", 1001, -1),
    "set times": lambda c: os.utime(c / "payload.md", (1, 1)),
    "set an attribute": lambda c: os.setxattr(c / "payload.md", "user.x", b"1"),
    "remove an attribute": lambda c: os.removexattr(c / "payload.md", "user.y"),
    "empty the header": lambda c: (c / "meta.json").write_text(""),
    "change the header": lambda c: freeze(c, True, pinned=True),
    "thaw it and more": lambda c: freeze(c, False, pinned=True),
    "save the header as it is": freeze,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_in(shared_mount: Mount, cube: Path, way: str) -> None:
    (cube.parent / "outside").write_text("outside")
    os.setxattr(cube / "payload.md", "user.y", b"1")
    freeze(cube)
    path = str(cube.relative_to(shared_mount.dir))
    before = listing(shared_mount.store, path)
    if way == "empty the header":  # nothing is no header, and is not even looked at
        WAYS[way](cube)
    else:
        with pytest.raises(PermissionError) as raised:
            WAYS[way](cube)
        assert raised.value.errno == errno.EPERM
    # The last close goes on behind the program's back.
    until(lambda: not list((shared_mount.store / path).glob(".memfs-tmp-*")))
    assert listing(shared_mount.store, path) == before
    assert sorted(os.listdir(cube.parent)) == ["law", "outside"]
    freeze(cube, False)
    (cube / "payload.md").write_text("thawed")
    assert (shared_mount.store / path / "payload.md").read_text() == "thawed"


def test_what_reads_goes_on(shared_mount: Mount, cube: Path) -> None:
    freeze(cube)
    assert (cube / "payload.md").read_text() == "Some text.\n"
    assert len((cube / "kv.safetensors").read_bytes()) == 8000
    name = str(cube.relative_to(shared_mount.dir))
    assert shared_mount.meta(name)["state"]["frozen"] is True
    assert shared_mount.meta(name)["behavioural"]["reads"] == 1, "its use is counted all the same"
    cube.parent.rename(cube.parent.with_name("moved"))
    moved = cube.parent.with_name("moved") / "law"
    with pytest.raises(PermissionError):
        (moved / "payload.md").write_text("x")


def test_files_that_were_open_before(cube: Path) -> None:
    with (
        (cube / "payload.md").open("r+b", buffering=0) as text,
        (cube / "notes/one.txt").open("r+b", buffering=0) as other,
    ):
        kv = os.open(cube / "kv.safetensors", os.O_WRONLY | os.O_TRUNC)
        os.write(kv, b"half of a new one")
        freeze(cube)
        for file in (text, other):
            with pytest.raises(PermissionError):
                file.write(b"x")
            with pytest.raises(PermissionError):
                file.truncate(1)
        with pytest.raises(PermissionError):
            os.close(kv)
        assert (cube / "kv.safetensors").read_bytes() == b"some kv " * 1000
        freeze(cube, False)
        assert text.write(b"x") == 1


def test_a_mapping_that_was_there_before(shared_mount: Mount, cube: Path) -> None:
    with (cube / "payload.md").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        freeze(cube)
        mapped[:4] = b"LOST"
        with pytest.raises(OSError, match=r"permitted|Input/output"):
            mapped.flush()
        mapped.close()
    on_disk = shared_mount.store / cube.relative_to(shared_mount.dir) / "payload.md"
    assert on_disk.read_text() == "Some text.\n"
    until(lambda: (cube / "payload.md").read_text() == "Some text.\n")


def test_a_file_with_another_name_cannot_be_frozen(cube: Path) -> None:
    os.link(cube / "payload.md", cube.parent / "other")
    with pytest.raises(OSError, match="Invalid"):
        freeze(cube)
    (cube.parent / "other").unlink()
    freeze(cube)


def test_a_copy_is_whole_and_not_frozen(shared_mount: Mount, cube: Path) -> None:
    freeze(cube)
    copy = cube.with_name("copy")
    subprocess.run(["cp", "-a", cube, copy], check=True)
    subprocess.run(["rsync", "-a", f"{cube}/", f"{copy}2/"], check=True)
    for place in (copy, cube.with_name("copy2")):
        name = str(place.relative_to(shared_mount.dir))
        assert shared_mount.meta(name)["state"]["frozen"] is False
        assert (place / "notes/one.txt").read_text() == "one"
        (place / "payload.md").write_text("changed")


def test_frozen_beside_the_mount(shared_mount: Mount, cube: Path) -> None:
    on_disk = shared_mount.store / cube.relative_to(shared_mount.dir)
    with (cube / "payload.md").open("r+b", buffering=0) as file:
        freeze(on_disk)
        with pytest.raises(PermissionError):
            (cube / "new").touch()

        def refused() -> bool:
            try:
                file.write(b"x")
            except PermissionError:
                return True
            return False

        until(refused)  # what was open is told by the watcher


def test_the_cube_around_thaws_alone(shared_mount: Mount, cube: Path) -> None:
    inner = shared_mount.cube(f"{cube.relative_to(shared_mount.dir)}/inner")
    (inner / "notes").write_text("one")
    with (inner / "notes").open("r+b", buffering=0) as file:
        for which, frozen in ((inner, True), (cube, True), (cube, False)):
            freeze(which, frozen)
            with pytest.raises(PermissionError):
                file.write(b"x")
        freeze(inner, False)
        assert file.write(b"x") == 1


def test_it_stays_frozen_over_a_remount_and_its_header_as_it_was(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        cube = mount.cube("law")
        (cube / "kv.safetensors").write_bytes(b"some kv " * 1000)
        freeze(cube)
        (cube / "kv.safetensors").read_bytes()
        time.sleep(0.1)
        before = listing(mount.store, "law")
    assert listing(mount.store, "law") == before, "no counters were written into it"
    with mounted_at(tmp_path) as mount:
        with pytest.raises(PermissionError):  # at once, before there is an index
            (mount.dir / "law/payload.md").write_text("x")
        until(mount.has_index)
        assert mount.meta("law")["behavioural"]["reads"] == 1
        text = (mount.dir / ".memfs/events").read_text()
    events = [e for e in map(json.loads, text.splitlines()) if e.get("path") == "law"]
    assert [e["event"] for e in events][-2:] == ["frozen", "denied"]
    assert events[-1].items() >= {"right": "write", "reason": "frozen", "uid": os.getuid()}.items()


def test_nothing_is_made_for_it(tmp_path: Path) -> None:
    with mounted_at(tmp_path, MEMFS_AUTOSTART="on") as mount:
        until(mount.has_index)
        cube = mount.cube("law")
        assert (cube / "kv.safetensors").exists(), "it could be made"
        freeze(cube)
        assert not (cube / "kv.safetensors").exists()


@needs_root
def test_only_the_owner_thaws(public: Path) -> None:
    with mounted_at(public) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o777)
        cube = mount.dir / "law"

        def theirs() -> None:
            os.umask(0)
            cube.mkdir(0o777)
            (cube / "payload.md").write_text("text")

        as_user(1001, theirs)
        (cube / "meta.json").chmod(0o666)
        as_user(1002, lambda: freeze(cube))
        with pytest.raises(PermissionError):
            as_user(1002, lambda: freeze(cube, False))
        as_user(1001, lambda: freeze(cube, False))
        freeze(cube)
        freeze(cube, False)  # root
