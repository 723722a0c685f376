"""A disk that is full: ENOSPC to the writer, the old content stands, and all goes on with room."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.config import Config
from memfs.errors import DiskFull
from memfs.runtime.client import RuntimeClient

from .conftest import Mount, memfs, mounted_at, needs_root, until
from .kvmaker import kv_file

pytestmark = needs_root

FREE = 64 << 10
"""Bytes that are left free: for a temporary name, not for what is written into it."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB, at the place of the store."""
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", store], check=True)
    yield store
    subprocess.run(["umount", "--lazy", store], check=True)  # a runtime keeps its stores open


@pytest.fixture
def mount(disk: Path, tmp_path: Path) -> Iterator[Mount]:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        yield mount


@contextlib.contextmanager
def full(disk: Path, free: int = 0) -> Iterator[None]:
    """Within it the disk has so many bytes of room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - free)
    yield
    filler.unlink()


def refused_for_want_of_room(path: Path, data: bytes) -> None:
    with pytest.raises(OSError, match="No space"):
        path.write_bytes(data)


def leftovers(store: Path) -> list[str]:
    return [str(path) for path in store.rglob(".memfs-tmp-*")]


def require_sound(mount: Mount) -> None:
    status = memfs("fsck", "--json", mount.store, check=False)
    assert json.loads(status.stdout)["problems"] == []


def test_a_text_gets_what_fits_as_on_any_disk(mount: Mount, disk: Path) -> None:
    cube = mount.cube("law", "The law.\n")
    other = mount.cube("other", "Another.\n")
    with full(disk, FREE):
        refused_for_want_of_room(cube / "payload.md", b"x" * (1 << 20))
        with pytest.raises(OSError, match="No space"):
            (cube / "notes").write_bytes(b"x" * (1 << 20))
        assert (other / "payload.md").read_text() == "Another.\n"
        (cube / "notes").unlink()
        (cube / "payload.md").write_text("Shorter.\n")
        assert (cube / "payload.md").read_text() == "Shorter.\n"
    (cube / "payload.md").write_bytes(b"x" * (1 << 20))
    assert (cube / "payload.md").stat().st_size == 1 << 20
    until(lambda: mount.meta("law")["state"]["payload"]["bytes"] == 1 << 20)
    require_sound(mount)


@pytest.mark.parametrize("free", [0, FREE])
def test_a_header_that_cannot_be_saved_leaves_the_old_one(
    mount: Mount, disk: Path, free: int
) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["descriptive"]["tags"] = [f"tag {n}" for n in range(9000)]
    stored = (disk / "law/meta.json").read_bytes()
    with full(disk, free):
        refused_for_want_of_room(cube / "meta.json", json.dumps(meta).encode())
        assert (disk / "law/meta.json").read_bytes() == stored
        assert mount.meta("law")["descriptive"]["tags"] == []
        until(lambda: not leftovers(disk))
    (cube / "meta.json").write_text(json.dumps(meta))
    assert len(mount.meta("law")["descriptive"]["tags"]) == 9000
    require_sound(mount)


@pytest.mark.parametrize("name", ["kv.safetensors", "adapter/adapter_model.safetensors"])
def test_a_blob_that_does_not_fit_leaves_the_old_one(mount: Mount, disk: Path, name: str) -> None:
    cube = mount.cube("law", "The law.\n")
    (cube / name).parent.mkdir(exist_ok=True)
    old, new = kv_file(b"The law.\n"), kv_file(b"The law.\n", 20000)
    (cube / name).write_bytes(old)
    with full(disk, FREE):
        refused_for_want_of_room(cube / name, new)
        assert (disk / "law" / name).read_bytes() == old
        until(lambda: not leftovers(disk))  # which goes with the last descriptor, after the close
        with pytest.raises(OSError, match="space"), (cube / name).open("r+b", buffering=0) as file:
            file.seek(len(old))
            while file.write(bytes(4096)):
                pass
        until(lambda: not leftovers(disk))
        assert (cube / name).read_bytes() == old
    (cube / name).write_bytes(new)
    assert (cube / name).read_bytes() == new
    require_sound(mount)


def test_a_writer_may_go_on_once_there_is_room(mount: Mount, disk: Path) -> None:
    path, data = mount.cube("law") / "kv.safetensors", kv_file(b"x", 20000)
    with path.open("wb", buffering=0) as file:
        with full(disk, FREE):
            done = 0
            with pytest.raises(OSError, match="No space"):
                while done < len(data):
                    done += file.write(data[done : done + 4096])
        file.write(data[done:])
    assert path.read_bytes() == data


def test_the_index_catches_up_when_there_is_room(mount: Mount, disk: Path) -> None:
    mount.cube("law", "The law.\n")
    with full(disk):
        for number in range(40):
            (mount.dir / f"new{number}").mkdir()  # of a tmpfs: no room is needed
            with contextlib.suppress(OSError):
                (mount.dir / f"new{number}/payload.md").touch()
        assert (mount.dir / "law/payload.md").read_text() == "The law.\n"
        assert mount.status()["index"]["cubes"] <= 41
    until(lambda: mount.status()["index"] == {"cubes": 41, "reason": None}, 20)
    until((mount.dir / "new39/meta.json").exists, 20)
    for number in range(40):
        assert mount.meta(f"new{number}")["descriptive"]["title"] == f"new{number}"
    until(lambda: fsck_of(mount) == [], 20)
    events = [json.loads(line) for line in (mount.dir / ".memfs/events").read_text().splitlines()]
    created = [event["path"] for event in events if event["event"] == "created"]
    assert len(created) == len(set(created))


def test_versions_give_way_before_the_disk_is_full(mount: Mount, disk: Path) -> None:
    """On a disk that is smaller than their budget, which is 10 GiB."""
    cube = mount.cube("law", "The law.\n")
    other = mount.cube("other", "Another.\n")
    text = ""
    for number in range(200):
        text = f"{number} " * 20_000
        (cube / "payload.md").write_text(text)
        until(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 256 << 10)
    stamps = sorted(os.listdir(cube / ".versions"))
    assert 1 < len(stamps) < 100
    assert (cube / ".versions" / stamps[-1] / "payload.md").read_text() == text
    assert len(os.listdir(other / ".versions")) == 1
    require_sound(mount)


def test_versions_give_way_to_what_others_write(mount: Mount, disk: Path) -> None:
    cube = mount.cube("law", "The law.\n")
    for number in range(8):
        (cube / "payload.md").write_text(f"{number} " * 100_000)
    with full(disk, FREE):
        before = set(os.listdir(cube / ".versions"))
        (cube / "payload.md").write_text("Shorter.\n")
        until(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 256 << 10)
        after = set(os.listdir(cube / ".versions"))
        assert after - before
        assert before - after
        assert (cube / ".versions" / max(after) / "payload.md").read_text() == "Shorter.\n"
    require_sound(mount)


def fsck_of(mount: Mount) -> list[dict[str, str]]:
    said: dict[str, list[dict[str, str]]] = json.loads(
        memfs("fsck", "--json", mount.store, check=False).stdout
    )
    return said["problems"]


def test_an_index_that_cannot_be_made_again_is_made_later(mount: Mount, disk: Path) -> None:
    mount.cube("law")
    with full(disk), pytest.raises(OSError, match="No space"):
        (mount.dir / ".memfs/control").write_text("rebuild\n")
    assert mount.meta("law")["descriptive"]["title"] == "law"
    (mount.dir / ".memfs/control").write_text("rebuild\n")
    assert mount.status()["index"] == {"cubes": 1, "reason": None}
    assert not list((disk / ".memfs").glob("index.*"))


def test_a_full_disk_is_mounted_and_read(disk: Path, tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        mount.cube("law", "The law.\n")
    with full(disk), mounted_at(tmp_path) as mount:
        assert (mount.dir / "law/payload.md").read_text() == "The law.\n"
        assert mount.meta("law")["descriptive"]["title"] == "law"
    with mounted_at(tmp_path) as mount:
        until(lambda: mount.status()["index"] == {"cubes": 1, "reason": None}, 20)


def test_a_repair_without_room_leaves_the_broken_header(disk: Path, tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        mount.cube("law", "The law.\n")
        cube_id = mount.meta("law")["descriptive"]["id"]
    header = disk / "law/meta.json"
    header.write_text("{ bad")
    (disk / ".memfs/aside").mkdir()
    with full(disk):
        said = json.loads(memfs("fsck", "--repair", "--json", disk, check=False).stdout)
        (problem,) = [p for p in said["problems"] if p["path"] == "law/meta.json"]
        assert problem["mended"] is None
        assert header.read_text() == "{ bad"
        assert [path for path in (disk / ".memfs/aside").rglob("*") if path.is_file()] == []
    memfs("fsck", "--repair", disk)
    assert json.loads(header.read_text())["descriptive"]["id"] == cube_id


def test_an_encode_says_that_the_disk_is_full(
    disk: Path,
    tmp_path: Path,
    config: Config,
    ready: RuntimeClient,
    environment: dict[str, str],
) -> None:
    with mounted_at(tmp_path, **environment) as mount:
        cube = mount.cube("law", "The law. " * 300)
        named = {"store": str(disk), "path": "law"}
        with full(disk, FREE):
            with pytest.raises(OSError, match="No space") as raised:
                (cube / "kv.safetensors").read_bytes()
            assert raised.value.errno == errno.ENOSPC
            with pytest.raises(DiskFull):
                ready.call("encode", timeout=60, **named)
            assert leftovers(disk) == []
            assert not (disk / "law/kv.safetensors").exists()
        (cube / "kv.safetensors").read_bytes()
        old = (disk / "law/kv.safetensors").read_bytes()
        with full(disk, FREE):
            with pytest.raises(DiskFull):
                ready.call("encode", timeout=60, force=True, **named)
            assert (disk / "law/kv.safetensors").read_bytes() == old
            assert leftovers(disk) == []
        require_sound(mount)
