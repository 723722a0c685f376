"""The time machine through a real mount: when versions are made, and that nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from memfs.vault.rename import RENAME_EXCHANGE, renameat2
from memfs.vault.store import Store
from memfs.vault.versions import records
from memfs.vault.versions.records import Version
from tests.users import open_way

from .conftest import Mount, has_ended, mounted_at, needs_root, until
from .test_posix import as_user


def history(mount: Mount, cube_id: str) -> list[Version]:
    """A cube's versions, read beside the mount."""
    with Store.open(mount.store) as store:
        return [records.read(store, cube_id, stamp) for stamp in records.stamps(store, cube_id)]


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
        assert sorted(records.cube_ids(store)) == sorted([first, second])
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
        assert records.cube_ids(store) == [cube_id]


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
        base = mount.store / records.directory(cube_id)
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
    cube_id = id_of(cube)
    assert (mount.store / ".memfs/versions/unsettled").exists()
    mount.stop()
    assert not (mount.store / ".memfs/versions/unsettled").exists()
    assert texts(mount, cube_id) == ["one\n", ""]


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
    base = mount.store / records.directory(cube_id)
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


def test_two_cubes_that_change_places_keep_their_histories(mount: Mount) -> None:
    one, two = mount.cube("one", "1\n"), mount.cube("two", "2\n")
    ids = id_of(one), id_of(two)
    directory = os.open(mount.dir, os.O_PATH)
    renameat2(directory, "one", directory, "two", RENAME_EXCHANGE)
    os.close(directory)
    until(lambda: all(events(mount, i) == ["created", "moved"] for i in ids))
    assert (id_of(two), id_of(one)) == ids
    os.rename(mount.store / "one", mount.store / "three")
    os.rename(mount.store / "two", mount.store / "one")
    os.rename(mount.store / "three", mount.store / "two")
    until(lambda: [history(mount, i)[-1].path for i in ids] == ["one", "two"])
    assert [texts(mount, i)[-1] for i in ids] == ["1\n", "2\n"]
    assert not any(v.event == "deleted" for i in ids for v in history(mount, i))


def test_a_version_that_a_power_loss_tore_is_made_again(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        cube = mount.cube("law", "one\n")
        (cube / "payload.md").write_text("two\n")
        cube_id = id_of(cube)
        os.kill(mount.pid, signal.SIGKILL)
        until(lambda pid=mount.pid: has_ended(pid))
        kept = mount.store / history(mount, cube_id)[-1].directory / "payload.md"
        kept.chmod(0o600)
        kept.write_text("")  # as a filesystem leaves a file that it had no time to write
        mount.start()
        until(lambda: texts(mount, cube_id) == ["one\n", "two\n"])
        assert list((mount.store / ".memfs/aside").glob("*/.memfs/versions/*/*/payload.md"))


@needs_root
def test_a_full_disk_fails_no_write_and_the_version_comes_later(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", tmp_path / "store"]
    if subprocess.run(disk, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        with mounted_at(tmp_path) as mount:
            until(mount.has_index)
            cube = mount.cube("law", "one\n")
            cube_id = id_of(cube)
            with pytest.raises(OSError, match="space"), (mount.dir / "filler").open("wb") as file:
                while True:
                    file.write(bytes(1 << 20))
            with (cube / "payload.md").open("r+") as file:
                file.write("two\n")
            assert (cube / "payload.md").read_text() == "two\n"
            assert texts(mount, cube_id) == ["one\n"]
            (mount.dir / "filler").unlink()
            settled(mount)
            assert texts(mount, cube_id) == ["one\n", "two\n"]
    finally:
        subprocess.run(["umount", tmp_path / "store"], check=True)


# Looking at the past


def stamps(cube: Path) -> list[str]:
    return sorted(os.listdir(cube / ".versions"))


def now() -> str:
    """A time between what was done before and what is done after."""
    moment = datetime.now(UTC)
    time.sleep(0.002)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_a_cubes_versions_are_directories(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    (cube / "payload.md").write_text("two\n")
    (cube / "adapter").mkdir()
    (cube / "adapter/adapter_config.json").write_text("{}")
    assert ".versions" not in os.listdir(cube)
    first, second, third = stamps(cube)
    assert (cube / ".versions" / first / "payload.md").read_text() == "one\n"
    assert (cube / ".versions" / second / "payload.md").read_text() == "two\n"
    assert sorted(os.listdir(cube / ".versions" / third)) == ["adapter", "meta.json", "payload.md"]
    assert (cube / ".versions" / third / "adapter/adapter_config.json").read_text() == "{}"
    kept = (cube / ".versions" / third / "payload.md").stat()
    live = (cube / "payload.md").stat()
    assert (kept.st_size, kept.st_mtime_ns) == (live.st_size, live.st_mtime_ns)
    assert json.loads((cube / ".versions" / first / "version.json").read_text())["path"] == "law"
    for name in ("nothing", f"{first}/nothing", f"{first}/payload.md/x", "2026"):
        assert not (cube / ".versions" / name).exists()
    assert not (mount.dir / ".versions").exists()
    (mount.dir / "work").mkdir()
    assert not (mount.dir / "work/.versions").exists()


def test_shell_tools_work_on_versions(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    (cube / "payload.md").write_text("two\n")
    first, second = (str(cube / ".versions" / stamp) for stamp in stamps(cube))
    done = subprocess.run(["diff", "-r", first, second], check=False, capture_output=True)
    assert b"< one" in done.stdout
    assert subprocess.run(["grep", "-r", "one", cube / ".versions"], check=True, timeout=10)
    subprocess.run(["cp", "-a", f"{first}/.", cube], check=True)
    assert (cube / "payload.md").read_text() == "one\n"
    settled(mount)
    assert events(mount, id_of(cube)) == ["created", "changed", "restored"]
    assert (cube / "payload.md").stat().st_mode & 0o777 == 0o644


def test_the_past_cannot_be_changed(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    (first,) = stamps(cube)
    version = cube / ".versions" / first
    file = version / "payload.md"
    other = mount.dir / "other"
    other.write_text("x")
    attempts: list[Callable[[], object]] = [
        lambda: file.write_text("x"),
        lambda: (version / "new").write_text("x"),
        file.unlink,
        version.rmdir,
        (cube / ".versions").rmdir,
        (version / "d").mkdir,
        (cube / ".versions/x").mkdir,
        lambda: file.rename(mount.dir / "x"),
        lambda: version.rename(mount.dir / "x"),
        lambda: other.rename(version / "other"),
        lambda: os.link(file, mount.dir / "x"),
        lambda: os.link(other, version / "x"),
        lambda: os.symlink("x", version / "x"),
        lambda: file.chmod(0o777),
        lambda: os.chown(file, 0, 0),
        lambda: os.utime(file),
        lambda: os.truncate(file, 0),
        lambda: os.setxattr(file, "user.x", b"x"),
        lambda: os.mkfifo(version / "x"),
        (mount.dir / f".memfs/at/{first}/x").mkdir,
        lambda: (mount.dir / f".memfs/at/{first}/law/payload.md").write_text("x"),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(OSError, match=r".+") as raised:
            attempt()
        assert raised.value.errno == errno.EROFS, number
    assert file.read_text() == "one\n"
    assert os.listxattr(file) == []


def test_the_store_at_a_moment(mount: Mount) -> None:
    law = mount.cube("work/law", "one\n")
    gone = mount.cube("work/gone", "gone\n")
    gone_id = id_of(gone)
    before = now()
    (law / "payload.md").write_text("two\n")
    os.rename(law, mount.dir / "lex")
    shutil.rmtree(gone)
    mount.cube("late", "late\n")
    until(lambda: events(mount, gone_id)[-1] == "deleted")
    until(lambda: events(mount, id_of(mount.dir / "lex"))[-1] == "moved")
    at = mount.dir / ".memfs/at"
    assert os.listdir(at) == []
    assert os.listdir(at / before) == ["work"]
    assert sorted(os.listdir(at / before / "work")) == ["gone", "law"]
    assert (at / before / "work/law/payload.md").read_text() == "one\n"
    assert (at / before / "work/gone/payload.md").read_text() == "gone\n"
    assert not (at / before / "late").exists()
    today = datetime.now(UTC).strftime("%Y-%m-%dZ")
    assert sorted(os.listdir(at / today)) == ["late", "lex"]
    assert (at / today / "lex/payload.md").read_text() == "two\n"
    assert (at / "9000").is_dir()
    assert list((at / "1999-12-31").iterdir()) == []
    for wrong in ("tomorrow", "2026-13", f"{before}/nothing", f"{before}/work/law/payload.md/x"):
        assert not (at / wrong).exists()
    (mount.dir / "late/payload.md").write_text("later\n")
    until(lambda: (at / today / "late/payload.md").read_text() == "later\n")
    found = subprocess.run(["find", at / before], check=True, capture_output=True, text=True)
    assert len(found.stdout.splitlines()) == 2 + 2 * 3
    assert mount.status()["mounted"] == []


def test_a_deletion_is_undone_from_the_past(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    cube_id = id_of(cube)
    before = now()
    shutil.rmtree(cube)
    until(lambda: events(mount, cube_id)[-1] == "deleted")
    (line,) = (mount.dir / ".memfs/deleted").read_text().splitlines()
    said = json.loads(line)
    assert (said["path"], said["id"]) == ("law", cube_id)
    subprocess.run(["cp", "-r", mount.dir / f".memfs/at/{before}/law", cube], check=True)
    assert id_of(cube) == cube_id
    assert (cube / "payload.md").read_text() == "one\n"
    until(lambda: events(mount, cube_id)[-1] == "restored")
    assert (mount.dir / ".memfs/deleted").read_text() == ""
    assert len(stamps(cube)) == 3


def test_the_header_shows_the_chain(mount: Mount) -> None:
    cube = mount.cube("law", "one\n")
    for text in ("two\n", "one\n"):
        (cube / "payload.md").write_text(text)
    (cube / "payload.md").chmod(0o600)
    digests = [hashlib.sha256(text).hexdigest() for text in (b"one\n", b"two\n", b"one\n")]
    assert mount.meta("law")["behavioural"]["versions"] == digests
    settled(mount)
    assert mount.meta("law")["behavioural"]["versions"] == digests


@needs_root
def test_only_who_may_read_the_cube_reads_its_past(mount: Mount) -> None:
    open_way(mount.dir)
    cube = mount.cube("open/law", "one\n")
    before = now()
    cube_id = id_of(cube)
    look = "import sys; print(open(sys.argv[1]).read())"
    listed = "import os, sys; print(os.listdir(sys.argv[1]))"
    (first,) = stamps(cube)
    versions_of = cube / ".versions" / first
    at = mount.dir / f".memfs/at/{before}"

    def may(code: str, path: Path) -> bool:
        return as_user(1234, 1234, code, path).returncode == 0

    assert may(look, versions_of / "payload.md")
    assert may(look, at / "open/law/payload.md")
    assert may(listed, at / "open/law")
    # The text is made private: so is what it was.
    (cube / "payload.md").chmod(0o600)
    assert not may(look, versions_of / "payload.md")
    assert not may(look, versions_of / "version.json")
    assert not may(look, at / "open/law/payload.md")
    # It is public again, and what was private meanwhile stays so.
    (cube / "payload.md").write_text("secret\n")
    (cube / "payload.md").chmod(0o644)
    (cube / "payload.md").write_text("public\n")
    _, secret, public = stamps(cube)
    assert may(look, versions_of / "payload.md")
    assert not may(look, cube / ".versions" / secret / "payload.md")
    assert may(look, cube / ".versions" / public / "payload.md")
    # Moved to where nobody comes: not to be read at its old path either.
    (mount.dir / "closed").mkdir(mode=0o700)
    os.rename(cube, mount.dir / "closed/law")
    assert not may(look, mount.dir / "closed/law/payload.md")
    assert not may(look, at / "open/law/payload.md")
    assert not may(listed, at / "open/law")
    assert may(listed, at / "open")
    # The collection is closed: so it is in the past.
    (mount.dir / "open").chmod(0o700)
    assert not may(listed, at / "open")
    # What was deleted is known to those who could see it.
    shutil.rmtree(mount.dir / "closed/law")
    until(lambda: events(mount, cube_id)[-1] == "deleted")
    assert (mount.dir / ".memfs/deleted").read_text()
    assert as_user(1234, 1234, look, mount.dir / ".memfs/deleted").stdout.strip() == ""
    assert not may(look, at / "open/law/payload.md")


@needs_root
def test_access_lists_hold_in_the_past(mount: Mount) -> None:
    open_way(mount.dir)
    cube = mount.cube("law", "one\n")
    payload = cube / "payload.md"
    payload.chmod(0o600)
    done = subprocess.run(
        ["setfacl", "-m", "u:1234:r", payload], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no access lists here: {done.stderr}")
    payload.write_text("two\n")
    first, second = (cube / ".versions" / stamp / "payload.md" for stamp in stamps(cube))
    look = "import sys; print(open(sys.argv[1]).read())"

    def may(path: Path, uid: int = 1234, gid: int = 1234) -> bool:
        return as_user(uid, gid, look, path).returncode == 0

    assert may(payload)
    assert may(second)
    assert not may(second, 2345, 2345)
    assert not may(second, 2345, 0)  # the group that the list's mask looks like
    assert may(first)  # everybody could read that one then, and he can now
    assert not may(first, 2345, 2345)
    subprocess.run(["setfacl", "-x", "u:1234", payload], check=True)
    assert not may(second)
