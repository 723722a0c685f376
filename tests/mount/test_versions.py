"""The time machine through a real mount: when versions are made, and that nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from memfs.vault import versions
from memfs.vault.store import Store
from memfs.vault.versions import Version

from .conftest import Mount, has_ended, mounted_at, until


def history(mount: Mount, cube_id: str) -> list[Version]:
    """A cube's versions, read beside the mount."""
    with Store.open(mount.store) as store:
        return [versions.read(store, cube_id, stamp) for stamp in versions.stamps(store, cube_id)]


def events(mount: Mount, cube_id: str) -> list[str]:
    return [version.event for version in history(mount, cube_id)]


def texts(mount: Mount, cube_id: str) -> list[str]:
    return [
        (mount.store / version.directory / "payload.md").read_text()
        for version in history(mount, cube_id)
        if "payload.md" in version.files
    ]


def id_of(cube: Path) -> str:
    return os.getxattr(cube, "user.memfs.id").decode()


def settled(mount: Mount) -> None:
    """Ends the mount, which does what was waiting, and begins it again."""
    mount.stop()
    assert not (mount.store / ".memfs/versions/unsettled").exists()
    mount.start()
    until(mount.has_index)


def test_each_finished_change_is_a_version(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    assert events(mount, cube_id) == ["created"]
    (cube / "payload.md").write_text("two\n")
    with (cube / "payload.md").open("a") as file:
        file.write("three\n")
        file.flush()
        os.fsync(file.fileno())
        file.write("four\n")
    meta = mount.meta("law")
    meta["descriptive"]["title"] = "Law"
    (cube / "meta.json").write_text(json.dumps(meta))
    (cube / "adapter").mkdir()
    (cube / "adapter/adapter_config.json").write_text('{"r": 8}')
    (cube / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    assert texts(mount, cube_id) == [
        "one\n",
        "two\n",
        "two\nthree\n",
        *["two\nthree\nfour\n"] * 4,
    ]
    assert events(mount, cube_id) == ["created", *["changed"] * 6]
    last = history(mount, cube_id)[-1]
    assert sorted(last.files) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "meta.json",
        "payload.md",
    ]
    assert last.path == "law"


def test_what_is_no_change_makes_none(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    for _ in range(3):
        (cube / "payload.md").read_text()
        (cube / "payload.md").chmod(0o640)
        os.utime(cube / "payload.md")
        (cube / "meta.json").write_text((cube / "meta.json").read_text())
        (cube / "notes.txt").write_text("of no memory")
        (cube / "kv.safetensors").write_bytes(b"can be made again")
        (cube / "kv.safetensors").unlink()
    assert events(mount, id_of(cube)) == ["created"]


def test_editors_ways_of_saving_leave_no_half_states(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    subprocess.run(["sh", "-c", f"echo two > {cube}/payload.md"], check=True)
    os.rename(cube / "payload.md", cube / "payload.md~")  # vim and emacs, with a backup
    (cube / "payload.md").write_text("three\n")
    (cube / "new").write_text("four\n")  # VS Code, sed -i
    os.rename(cube / "new", cube / "payload.md")
    (cube / "payload.md").unlink()
    (cube / "payload.md").write_text("five\n")
    settled(mount)
    assert texts(mount, cube_id) == ["one\n", "two\n", "three\n", "four\n", "five\n"]
    assert id_of(cube) == cube_id


def test_a_text_that_stays_empty_or_missing_is_a_version_in_the_end(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    (cube / "payload.md").write_text("")
    assert texts(mount, cube_id) == ["one\n"]
    until(lambda: texts(mount, cube_id) == ["one\n", ""])
    (cube / "payload.md").unlink()
    until(lambda: "payload.md" not in history(mount, cube_id)[-1].files)


def test_a_deleted_cube_has_an_end_and_nothing_between(mount: Mount) -> None:
    cube = mount.cube("work/law", "one\n")
    cube_id = id_of(cube)
    shutil.rmtree(cube)
    until(lambda: events(mount, cube_id) == ["created", "deleted"])
    assert history(mount, cube_id)[-1].path == "work/law"


def test_a_rename_keeps_the_history(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    (mount.dir / "work").mkdir()
    os.rename(cube, mount.dir / "work/law")
    until(lambda: events(mount, cube_id) == ["created", "moved"])
    os.rename(mount.dir / "work", mount.dir / "play")
    until(lambda: events(mount, cube_id) == ["created", "moved", "moved"])
    (mount.dir / "play/law/payload.md").write_text("two\n")
    assert [v.path for v in history(mount, cube_id)] == ["law", "work/law", "play/law", "play/law"]


def test_a_copy_begins_a_history_of_its_own(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    first = id_of(cube)
    (cube / "payload.md").write_text("two\n")
    subprocess.run(["cp", "-a", cube, mount.dir / "copy"], check=True)
    second = id_of(mount.dir / "copy")
    assert second != first
    (version,) = history(mount, second)
    assert (version.event, version.origin) == ("copied", first)
    settled(mount)
    with Store.open(mount.store) as store:
        assert sorted(versions.cube_ids(store)) == sorted([first, second])
    assert "deleted" not in events(mount, first) + events(mount, second)


def test_a_cube_from_elsewhere_keeps_its_id(mount: Mount, tmp_path: Path) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    shutil.copytree(cube, tmp_path / "away")
    shutil.rmtree(cube)
    until(lambda: events(mount, cube_id)[-1] == "deleted")
    subprocess.run(["cp", "-a", tmp_path / "away", mount.dir / "back"], check=True)
    assert id_of(mount.dir / "back") == cube_id
    settled(mount)
    assert events(mount, cube_id) == ["created", "deleted", "restored"]
    with Store.open(mount.store) as store:
        assert versions.cube_ids(store) == [cube_id]


def test_changes_beside_the_mount_and_while_there_is_none(mount: Mount) -> None:
    cube_id = id_of(mount.cube("law", "one\n"))
    (mount.store / "law/payload.md").write_text("two\n")
    until(lambda: texts(mount, cube_id) == ["one\n", "two\n"])
    meta = json.loads((mount.store / "law/meta.json").read_text())
    meta["note"] = "what the index does not know of"
    (mount.store / "law/meta.json").write_text(json.dumps(meta))
    until(lambda: len(history(mount, cube_id)) == 3)
    os.rename(mount.store / "law", mount.store / "lex")
    until(lambda: events(mount, cube_id)[-1] == "moved")
    mount.stop()
    (mount.store / "lex/payload.md").write_text("three\n")
    (mount.store / "new").mkdir()
    (mount.store / "new/payload.md").write_text("new\n")
    mount.start()
    until(lambda: texts(mount, cube_id)[-1] == "three\n")
    new = until(lambda: (mount.store / "new/meta.json").exists() and id_of(mount.dir / "new"))
    until(lambda: texts(mount, new) == ["new\n"])
    shutil.rmtree(mount.store / "lex")
    until(lambda: events(mount, cube_id)[-1] == "deleted")


def test_killed_just_after_a_close(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        cube = mount.cube("law", "one\n")
        cube_id = id_of(cube)
        gone = id_of(mount.cube("gone", "gone\n"))
        emptied = mount.cube("emptied", "words\n")
        emptied_id = id_of(emptied)
        (emptied / "payload.md").write_text("")
        shutil.rmtree(mount.dir / "gone")
        for number in range(20):
            (cube / "payload.md").write_text(f"text {number}\n")
        os.kill(mount.pid, signal.SIGKILL)
        until(lambda pid=mount.pid: has_ended(pid))
        wanted = ["one\n", *(f"text {number}\n" for number in range(20))]
        assert texts(mount, cube_id) == wanted
        base = mount.store / versions.directory(cube_id)
        (base / ".memfs-tmp-0123").mkdir()
        (mount.store / "law/payload.md").write_text("beside\n")
        mount.start()
        until(lambda: texts(mount, cube_id) == [*wanted, "beside\n"])
        until(lambda: events(mount, gone) == ["created", "deleted"])
        until(lambda: texts(mount, emptied_id) == ["words\n", ""])
        until(lambda: not (base / ".memfs-tmp-0123").exists())


def test_a_mount_that_was_ended_cleanly_leaves_no_mark(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    (cube / "payload.md").write_text("")
    settled(mount)
    assert texts(mount, id_of(mount.dir / "law")) == ["one\n", ""]


def test_a_large_adapter_is_copied_behind(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    (cube / "adapter").mkdir()
    weights = os.urandom(1 << 20) * 40
    (cube / "adapter/adapter_model.safetensors").write_bytes(weights)
    (last,) = history(mount, id_of(cube))[1:]
    name = "adapter/adapter_model.safetensors"
    assert name in last.files
    until(lambda: history(mount, id_of(cube))[1].files[name].sha256)
    kept = mount.store / last.directory / name
    assert kept.read_bytes() == weights
    assert (cube / name).stat().st_nlink == 1
    (mount.store / "law" / name).write_bytes(b"changed in place")
    assert kept.read_bytes() == weights


def test_where_no_version_can_be_made_the_write_succeeds(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    base = mount.store / versions.directory(cube_id)
    os.rename(base, base.with_name("away"))
    base.write_text("no directory")  # what a full disk does, to root too
    (cube / "payload.md").write_text("two\n")
    assert (cube / "payload.md").read_text() == "two\n"
    base.unlink()
    os.rename(base.with_name("away"), base)
    settled(mount)
    assert texts(mount, cube_id) == ["one\n", "two\n"]


def test_no_budget_no_versions(tmp_path: Path) -> None:
    with mounted_at(tmp_path, MEMFS_VERSIONS_BUDGET_BYTES="0") as mount:
        until(mount.has_index)
        mount.cube("law", "one\n")
        assert not (mount.store / ".memfs/versions").exists()


def test_an_older_stores_cubes_get_their_first_version(tmp_path: Path) -> None:
    with mounted_at(tmp_path, MEMFS_VERSIONS_BUDGET_BYTES="0") as mount:
        until(mount.has_index)
        cube_id = id_of(mount.cube("law", "one\n"))
    with mounted_at(tmp_path) as mount:
        until(lambda: events(mount, cube_id) == ["created"])


def test_making_versions_costs_little(mount: Mount) -> None:
    """A guard against something silly; the figures are measured elsewhere."""
    cube = mount.cube("law", "one\n")
    start = time.monotonic()
    for number in range(50):
        (cube / "payload.md").write_text(f"text {number}\n")
    assert time.monotonic() - start < 5
