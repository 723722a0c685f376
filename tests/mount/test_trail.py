"""What the audit trail of a mount tells: who changed what, and what changed beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from memfs.vault.store import Store
from memfs.vault.trail import records
from tests.mount.conftest import Mount, has_ended, mounted_at, until
from tests.users import as_user, needs_root


def events(mount: Mount, path: str = "law") -> list[dict[str, Any]]:
    """The events of a cube, without what every line has."""
    text = (mount.dir / ".memfs/events").read_text()
    own = ("seq", "time", "prev", "hash")
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {n: v for n, v in event.items() if n not in own}
        for event in found
        if event.get("path") == path
    ]


def kinds(mount: Mount, path: str = "law") -> list[str]:
    return [f"{e['event']} {e.get('what', '')}".strip() for e in events(mount, path)]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_who_changed_what(mount: Mount) -> None:
    cube = mount.cube("law", "one")
    (cube / "payload.md").write_text("two")
    (cube / "payload.md").chmod(0o600)
    meta = mount.meta("law")
    meta["descriptive"]["title"] = "another"
    (cube / "meta.json").write_text(json.dumps(meta))
    cube.rename(mount.dir / "law2")
    shutil.rmtree(mount.dir / "law2")
    assert kinds(mount) == ["created", "changed payload", "chmod", "changed meta"]
    created, changed, chmod, _ = events(mount)
    me = {"uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid()}
    for event in events(mount) + events(mount, "law2"):
        assert event.items() >= me.items(), event
        assert event["program"]
    assert (created["id"], created["sha256"]) == (meta["descriptive"]["id"], sha256("one"))
    assert (changed["before"], changed["after"]) == (sha256("one"), sha256("two"))
    assert (chmod["before"], chmod["after"]) == ("644", "600")
    renamed, *_, deleted = events(mount, "law2")
    assert (renamed["event"], renamed["from"]) == ("renamed", "law")
    assert (deleted["event"], deleted["id"]) == ("deleted", meta["descriptive"]["id"])


def test_what_changed_beside_the_mount_has_no_name(mount: Mount) -> None:
    mount.cube("law", "one")
    time.sleep(0.1)
    (mount.store / "law/payload.md").write_text("two")
    until(lambda: kinds(mount) == ["created", "changed payload"])
    assert "uid" not in events(mount)[-1]


def test_a_slow_writer_is_told_of_once_and_by_name(mount: Mount) -> None:
    cube = mount.cube("law", "one")
    with (cube / "payload.md").open("a") as file:
        for word in ("two", "three"):
            file.write(word)
            file.flush()
            os.utime(mount.store / "law/payload.md")  # the watcher hears of that, and looks
            time.sleep(0.6)
    assert kinds(mount) == ["created", "changed payload"]
    changed = events(mount)[-1]
    assert (changed["before"], changed["after"]) == (sha256("one"), sha256("onetwothree"))
    assert changed["uid"] == os.getuid()


def test_what_was_there_before_the_first_mount_was_not_made_by_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "payload.md").write_text("text")
    with mounted_at(tmp_path) as mount:
        until(lambda: mount.status()["index"]["cubes"] == 2)
        mount.cube("law")
        time.sleep(0.5)
        assert [kinds(mount, name) for name in ("a", "b", "law")] == [[], [], ["created"]]


def test_a_killed_mount_loses_no_event(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        for number in range(5):
            mount.cube(f"c{number}")
            pid = mount.pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: has_ended(pid))
            mount.start()
            until(mount.has_index)
        assert [kinds(mount, f"c{n}")[:1] for n in range(5)] == [["created"]] * 5
    with Store.open(mount.store) as store:
        assert list(records.problems(store)) == []


def test_a_kill_halfway_through_a_write_loses_no_event(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        mount.cube("old", "one")
        (mount.dir / "new").mkdir()
        files = []
        for name in ("old", "new"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            files.append(os.open(mount.dir / name / "payload.md", flags))
            os.write(files[-1], b"half")
            os.utime(mount.store / name / "payload.md")  # the watcher hears of that, and looks
        time.sleep(0.6)
        assert mount.status()["index"]["cubes"] == 1
        pid = mount.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: has_ended(pid))
        for file in files:
            with contextlib.suppress(OSError):
                os.close(file)
        mount.start()
        until(lambda: mount.status()["index"]["cubes"] == 2)
        assert kinds(mount, "old") == ["created", "changed payload"]
        assert kinds(mount, "new") == ["created"]
        assert events(mount, "new")[0]["sha256"] == sha256("half")


def test_a_file_that_stays_open_holds_back_nothing_for_good(mount: Mount) -> None:
    cube = mount.cube("law", "one")
    with (cube / "payload.md").open("r+"):  # and never writes
        (mount.store / "law/payload.md").write_text("two")
        time.sleep(0.6)
        assert kinds(mount) == ["created"]
    until(lambda: kinds(mount) == ["created", "changed payload"])
    assert "uid" not in events(mount)[-1]


@needs_root
def test_others_see_what_they_did_alone(public: Path) -> None:
    with mounted_at(public) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o777)
        mount.cube("law")

        def theirs() -> list[str]:
            mount.cube("theirs")
            text = (mount.dir / ".memfs/events").read_text()
            with pytest.raises(PermissionError):
                os.listdir(mount.store / ".memfs/trail")
            return [json.loads(line)["path"] for line in text.splitlines()]

        assert as_user(1001, theirs) == ["theirs"]
        assert [event["uid"] for event in events(mount, "theirs")] == [1001]
