"""Archives to and from a store that is mounted: through the mount, which knows each cube then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from memfs.cube import layout, metadata
from memfs.vault.archive.check import check
from memfs.vault.archive.load import load, plan
from memfs.vault.store import Store
from memfs.vault.versions import records
from memfs.vault.versions.records import Version
from memfs.vault.versions.restore import restore
from tests.users import as_user, open_way

from .conftest import Mount, memfs, mounted_at, needs_root, until
from .kvmaker import kv_file

NOBODY = 65534
OTHERS = ("-o", "allow_other")
TEXT = "The text of a cube that travels.\n"


@pytest.fixture
def cube(mount: Mount) -> Path:
    """A cube with a KV cache, through a mount."""
    cube = mount.cube("work/law", TEXT)
    (cube / "kv.safetensors").write_bytes(kv_file(TEXT.encode()))
    return cube


@pytest.fixture
def archive(cube: Path, tmp_path: Path) -> Path:
    memfs("dump", cube, "-o", tmp_path / "law.tar")
    return tmp_path / "law.tar"


def test_a_dump_mounts_counts_and_makes_nothing(mount: Mount, cube: Path, tmp_path: Path) -> None:
    plain = mount.cube("plain", TEXT)
    before = mount.meta("work/law")
    memfs("dump", cube, plain, "-o", tmp_path / "one.tar")
    assert mount.meta("work/law") == before
    assert mount.meta("plain")["behavioural"]["reads"] == 0
    with tarfile.open(tmp_path / "one.tar") as opened:
        assert "plain/kv.safetensors" not in opened.getnames()
        assert "work/law/kv.safetensors" in opened.getnames()


def test_mounted_or_not_it_is_the_same_file(
    mount: Mount, cube: Path, archive: Path, tmp_path: Path
) -> None:
    (cube / "payload.md").write_text("Another.\n")
    (cube / "payload.md").write_text(TEXT)  # it has versions now
    with open(cube / "kv.safetensors", "rb") as file:
        file.read()  # counted: in the index, and in the header that is shown
    memfs("dump", cube, "-o", archive)
    with tarfile.open(archive) as opened:
        file = opened.extractfile("work/law/meta.json")
        assert file is not None
        meta = metadata.parse(file.read())
    assert meta["behavioural"]["reads"] == 1
    assert "kv" not in meta["state"]
    mount.stop()
    memfs("dump", mount.store / "work/law", "-o", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


def test_what_is_loaded_is_there_at_once_and_whole(
    cube: Path, archive: Path, tmp_path: Path
) -> None:
    old = json.loads((cube / "meta.json").read_text())
    (tmp_path / "other").mkdir()
    with mounted_at(tmp_path / "other") as other:
        until(other.has_index)
        (other.dir / "from").mkdir()
        said = json.loads(memfs("load", archive, other.dir / "from", "--json").stdout)
        assert said["cubes"][0]["kv"] == "unchecked"  # no model is known there
        meta = other.meta("from/work/law")
        assert meta["descriptive"] == old["descriptive"]
        assert (other.dir / "from/work/law/payload.md").read_text() == TEXT
        assert other.status()["index"]["cubes"] == 1
        assert os.listdir(other.store / "from") == ["work"]
        event = json.loads((other.dir / ".memfs/events").read_text().splitlines()[-1])
        assert (event["event"], event["path"], event["uid"]) == ("created", "from/work/law", 0)


def test_in_the_store_it_came_from_it_is_a_copy(mount: Mount, cube: Path, archive: Path) -> None:
    old = mount.meta("work/law")["descriptive"]["id"]
    memfs("load", archive, mount.dir, "--as", "again")
    copy = mount.meta("again")["descriptive"]
    assert (copy["origin"]["copied_from"], copy["id"] != old) == (old, True)
    assert mount.meta("work/law")["descriptive"]["id"] == old


def test_one_that_is_replaced(mount: Mount, cube: Path, archive: Path) -> None:
    old = mount.meta("work/law")["descriptive"]
    (cube / "payload.md").write_text("Another text.\n")
    assert memfs("load", archive, mount.dir, check=False).returncode == 7
    memfs("load", archive, mount.dir, "--force")
    assert (cube / "payload.md").read_text() == TEXT
    assert mount.meta("work/law")["descriptive"] == old
    assert mount.meta("work/law")["state"]["kv"]["state"] == "unchecked"
    assert sorted(os.listdir(mount.store / "work")) == ["law"]
    versions = sorted(os.listdir(cube / ".versions"))
    assert (cube / ".versions" / versions[-2] / "payload.md").read_text() == "Another text.\n"
    assert (cube / ".versions" / versions[-1] / "payload.md").read_text() == TEXT
    assert mount.status()["index"]["cubes"] == 1


def test_a_frozen_cube_travels_frozen(
    mount: Mount, cube: Path, archive: Path, tmp_path: Path
) -> None:
    meta = json.loads((cube / "meta.json").read_text())
    meta["state"]["frozen"] = True
    (cube / "meta.json").write_text(json.dumps(meta))
    done = memfs("load", archive, mount.dir, "--force", check=False)
    assert (done.returncode, "work/law is frozen" in done.stderr) == (8, True)
    memfs("dump", cube, "-o", archive)
    (tmp_path / "other").mkdir()
    with mounted_at(tmp_path / "other") as other:
        memfs("load", archive, other.dir)
        assert other.meta("work/law")["state"]["frozen"]
        assert (other.dir / "work/law/payload.md").read_text() == TEXT
        with pytest.raises(PermissionError):
            (other.dir / "work/law/payload.md").write_text("x")


@needs_root
def test_who_loads_owns(tmp_path: Path, archive: Path) -> None:
    open_way(tmp_path)
    (tmp_path / "other").mkdir()
    with mounted_at(tmp_path / "other", *OTHERS) as other:
        opened, closed = other.dir / "open", other.dir / "closed"
        opened.mkdir()
        closed.mkdir()
        opened.chmod(0o777)
        with open(archive, "rb") as file:
            checked = check(file.fileno())

            def into(directory: Path) -> int:
                """Loads as nobody; how that ended."""
                child = os.fork()
                if not child:
                    try:
                        os.setgroups([])
                        os.setgid(NOBODY)
                        os.setuid(NOBODY)
                        with Store.open(other.dir, create_control=False) as store:
                            below = directory.name
                            places = plan(store, below, checked.cubes, name=None, force=False)
                            load(file.fileno(), checked, store, below, places, lambda done: None)
                        os._exit(0)
                    except PermissionError:
                        os._exit(13)
                    finally:
                        os._exit(1)
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

            assert (into(opened), into(closed)) == (0, 13)
        found = (opened / "work/law/payload.md").stat()
        assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY)
        assert other.meta("open/work/law")["governance"]["owner"] == "nobody"
        event = json.loads((other.dir / ".memfs/events").read_text().splitlines()[-1])
        assert (event["event"], event["uid"]) == ("created", NOBODY)
        assert os.listdir(other.store / "closed") == []


def test_killed_at_any_moment_a_load_leaves_whole_cubes_or_none(
    mount: Mount, tmp_path: Path
) -> None:
    for number in range(20):
        mount.cube(f"cubes/{number:02}", f"{number}\n" * 100)
    archive = tmp_path / "many.tar"
    cubes = sorted((mount.dir / "cubes").iterdir())
    memfs("dump", *cubes, "-o", archive)
    (mount.dir / "to").mkdir()
    began = time.monotonic()
    memfs("load", archive, mount.dir / "to")
    took = time.monotonic() - began
    for step in range(5):
        target = mount.dir / f"to{step}"
        target.mkdir()
        with subprocess.Popen(
            [sys.executable, "-m", "memfs.cli.main", "load", archive, target],
            stdout=subprocess.DEVNULL,
        ) as load:
            if step:
                time.sleep(took * (0.4 + 0.13 * step))
            else:  # they are being put together, and none is in its place yet
                until(lambda: list(mount.store.glob("to0/.memfs-tmp-load-*")))
            load.send_signal(signal.SIGKILL)
        there = sorted((target / "cubes").iterdir()) if (target / "cubes").exists() else []
        assert step or not there
        for cube in there:
            assert (cube / "payload.md").read_text() == f"{int(cube.name)}\n" * 100
            assert (cube / "meta.json").exists()
        assert set(os.listdir(target)) <= {"cubes"}
    mount.stop()
    mount.start()
    until(mount.has_index)

    def left() -> list[str]:
        found = (names for _, names, _ in os.walk(mount.store))
        return [name for names in found for name in names if name.startswith(".memfs-tmp-")]

    until(lambda: not left())


@needs_root
def test_read_only_directories_travel_and_come_back_through_a_mount(
    public: Path, tmp_path: Path
) -> None:
    """For somebody who is not root: a cube in a cube, both read-only, loaded and restored."""
    names = ("law/inner", "law")
    with mounted_at(tmp_path) as source:
        for name in reversed(names):
            source.cube(name, TEXT)
        for name in names:
            (source.dir / name).chmod(0o555)
        memfs("dump", source.dir / "law", source.dir / "law/inner", "-o", public / "both.tar")
    with open(public / "both.tar", "rb") as archive, mounted_at(public, *OTHERS) as mount:
        checked = check(archive.fileno())
        until(mount.has_index)
        (mount.dir / "to").mkdir()
        os.chown(mount.dir / "to", NOBODY, NOBODY)

        def loaded() -> None:
            with Store.open(mount.dir, create_control=False) as store:
                places = plan(store, "to", checked.cubes, name=None, force=False)
                load(archive.fileno(), checked, store, "to", places, lambda done: None)

        def modes() -> dict[str, tuple[int, int]]:
            status = {name: (mount.store / "to" / name).stat() for name in names}
            return {name: (s.st_uid, s.st_mode & 0o777) for name, s in status.items()}

        as_user(NOBODY, loaded)
        assert modes() == dict.fromkeys(names, (NOBODY, 0o555))
        as_user(NOBODY, lambda: (mount.dir / "to/law/inner/payload.md").write_text("Another.\n"))
        cube_id = mount.meta("to/law/inner")["descriptive"]["id"]
        shutil.rmtree(mount.dir / "to/law")
        with Store.open(mount.store) as store:

            def newest() -> Version:
                version = records.newest(store, cube_id)
                assert version is not None
                return version

            until(lambda: newest().deleted)
            version = records.read(store, cube_id, records.stamps(store, cube_id)[-2])
        path = "to/law/inner"

        def restored() -> None:
            with Store.open(mount.dir, create_control=False) as store:
                restore(store, f"{layout.AT}/{version.stamp}/{path}", version, path)

        as_user(NOBODY, restored)
        assert modes() == dict.fromkeys(names, (NOBODY, 0o555))
        assert (mount.dir / path / "payload.md").read_text() == "Another.\n"
        found = [name for _, below, _ in os.walk(mount.store) for name in below]
        assert not [name for name in found if layout.is_temporary(name)]
