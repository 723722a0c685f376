"""``memfs fsck`` of a store that is or was mounted: nothing is wrong, whatever was done to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from .conftest import Mount, has_ended, memfs, mounted_at, until
from .kvmaker import kv_file


def fsck(*args: str | Path) -> tuple[int, Any]:
    done = memfs("fsck", "--json", *args, check=False)
    return done.returncode, json.loads(done.stdout)


def lived_in(mount: Mount) -> None:
    """Everything that people do to their cubes."""
    law = mount.cube("law", "The law.\n")
    note = mount.cube("work/note", "A note.\n")
    (law / "kv.safetensors").write_bytes(kv_file(b"The law.\n"))
    (note / "kv.safetensors").write_bytes(kv_file(b"another text"))
    shutil.copytree(law, mount.dir / "copy")
    shutil.move(mount.dir / "work", mount.dir / "play")
    shutil.rmtree(mount.dir / "copy")
    shutil.copytree(law, mount.dir / "again")
    (law / "payload.md").write_text("Another law.\n")
    meta = json.loads((law / "meta.json").read_text())
    meta["descriptive"]["tags"] = ["x"]
    (law / "meta.json").write_text(json.dumps(meta))
    (law / ".swap").write_text(json.dumps(meta))
    os.replace(law / ".swap", law / "meta.json")
    with pytest.raises(OSError, match="Invalid"):
        (mount.dir / "again/meta.json").write_text("{")
    meta = mount.meta("again")
    meta["descriptive"]["title"] = "The refused save was made good."
    (mount.dir / "again/meta.json").write_text(json.dumps(meta))
    os.symlink("law", mount.dir / "link")
    mount.cube("gone")
    os.rename(mount.dir / "gone", mount.dir / "arrived")
    with (mount.dir / "arrived/payload.md").open("a") as file:
        (mount.dir / "arrived/payload.md").unlink()
        file.write("It has no name any more.")
    (mount.dir / "arrived/payload.md").write_text("New.\n")


def test_nothing_is_wrong(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        lived_in(mount)
        until(mount.has_index)
        status, said = fsck(mount.dir)
        assert (status, said["problems"], said["cubes"]) == (0, [], 4)
        assert said["mountpoint"] == str(mount.dir)
    assert fsck(mount.store) == (
        0,
        {"store": str(mount.store), "mountpoint": None, "cubes": 4, "problems": [], "left": 0},
    )


def test_a_mounted_store_is_only_checked(mount: Mount) -> None:
    mount.cube("law")
    for place in (mount.dir, mount.store):
        status, said = fsck("--repair", place)
        assert status == 9
        assert f"memfs umount {mount.dir}" in said["error"]["message"]
    (mount.dir / "law/kv.safetensors").write_bytes(b"no KV cache")
    status, said = fsck(mount.dir)
    assert status == 1
    assert [p["path"] for p in said["problems"]] == ["law/kv.safetensors"]


def test_what_a_killed_mount_left_is_set_aside(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    mount.start()
    cube = mount.cube("law")
    until(mount.has_index)
    opened = (cube / "kv.safetensors").open("wb")
    opened.write(b"half of it")
    opened.flush()
    kept = (cube / "notes").open("w")
    kept.write("It was open.")
    kept.flush()
    (cube / "notes").unlink()
    pid = mount.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid))
    with pytest.raises(OSError, match=r"not connected|abort"):
        opened.close()
    kept.close()  # of an ordinary file, the mount is not told
    status, said = fsck("--repair", mount.dir)  # the dead mount still names its store
    assert (status, said["mountpoint"]) == (0, None)
    assert sum(p["area"] == "files" for p in said["problems"]) == 2
    aside = [
        path.read_bytes() for path in (mount.store / ".memfs/aside").rglob("*") if path.is_file()
    ]
    assert sorted(aside) == [b"It was open.", b"half of it"]
    assert fsck(mount.store)[1]["problems"] == []
    mount.start()
    assert mount.meta("law")["descriptive"]["title"] == "law"
    mount.stop()


@pytest.mark.parametrize("index", ["there", "gone"])
def test_a_header_comes_back_from_its_last_version(tmp_path: Path, index: str) -> None:
    """With what no index knows: how private it is."""
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
        until(mount.has_index)
        meta = mount.meta("law")
        meta["governance"]["sensitivity"] = "secret"
        (mount.dir / "law/meta.json").write_text(json.dumps(meta))
    path = mount.store / "law/meta.json"
    before = path.read_bytes()
    path.write_text("{")
    if index == "gone":
        shutil.rmtree(mount.store / ".memfs/index")
    status, said = fsck("--repair", mount.store)
    assert status == 0, said
    assert "the header of its last version was written" in said["problems"][0]["mended"]
    assert json.loads(path.read_bytes()) == json.loads(before)
    assert fsck(mount.store)[1]["problems"] == []
