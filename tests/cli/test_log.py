"""memfs log: the audit trail, searched and verified, by its owner and by others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfs.cli import main as cli
from memfs.vault.store import Store
from memfs.vault.trail import records
from memfs.vault.trail.writer import Trail
from tests.users import as_user, needs_root

HOUR = 3600.0
START = 1_700_000_000.0


@pytest.fixture
def root(public: Path) -> Iterator[Path]:
    """A store with a trail of some hours."""
    root = public / "store"
    root.mkdir()
    made = [
        {"event": "created", "path": "law", "uid": 0, "program": "cp", "sha256": "a" * 64},
        {"event": "mounted", "path": "law", "uid": 1001, "tokens": 12},
        {"event": "denied", "path": "work/notes", "uid": 1002, "right": "mount"},
        {"event": "renamed", "path": "trade", "from": "work", "uid": 0, "cubes": 2},
        {"event": "changed", "path": "trade/notes", "what": "payload"},
    ]
    with Store.open(root) as store, Trail(store) as open_trail:
        for hour, event in enumerate(made):
            open_trail.append(event | {"time": START + hour * HOUR})
    yield root


def memfs_log(*args: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "memfs", "log", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status in (0, 1) else done.stderr


def found(*args: str | Path) -> list[int]:
    events: list[dict[str, Any]] = json.loads(memfs_log(*args, "--json"))["events"]
    return [event["seq"] for event in events]


def test_what_is_asked_for(root: Path) -> None:
    assert found(root) == [1, 2, 3, 4, 5]
    assert found(root, "-n", "2") == [4, 5]
    assert found(root, "--user", "root") == [1, 4]
    assert found(root, "--user", "1002") == [3]
    assert found(root, "--op", "mounted", "--op", "denied") == [2, 3]
    assert found(root, "--cube", "law") == [1, 2]
    assert found(root / "law") == [1, 2], "it need not be there any more"
    assert found(root / "work/notes") == [3, 4], "and follows what it was renamed with"
    assert found(root, "--cube", "/trade/") == [4, 5]
    assert found(root, "--since", "2023-11-14T23:13:20+00:00") == [2, 3, 4, 5]
    assert found(root, "--until", "2023-11-14T23:13:20+00:00") == [1]
    assert found(root, "--since", "1d") == []
    assert found(root / "law", "--op", "mounted", "--user", "1001", "-n", "5") == [2]


def test_for_people(root: Path) -> None:
    lines = memfs_log(root).splitlines()
    assert lines[0].split() == ["TIME", "USER", "PROGRAM", "EVENT", "CUBE"]
    assert "sha256 aaaaaaaaaaaa…" in lines[1]
    assert "law" in lines[1]
    assert len(lines) == 6


def test_bad_questions(root: Path, tmp_path: Path) -> None:
    assert "no time" in memfs_log(root, "--since", "yesterday", status=7)
    assert "no user" in memfs_log(root, "--user", "no such user", status=7)
    assert "no store" in memfs_log(tmp_path, status=3)


def test_verifying(root: Path) -> None:
    with Store.open(root) as store:
        *_, last = records.events(store)
        file = root / records.name_of(1)
    said = memfs_log(root, "--verify")
    assert "5 lines" in said
    assert last["hash"] in said
    report = json.loads(memfs_log(root, "--verify", "--json"))
    assert report["last"] == {"seq": 5, "hash": last["hash"]}
    assert report["problems"] == []
    file.write_bytes(file.read_bytes().replace(b'"uid":1002', b'"uid":1001'))
    assert "line 3 of the file was changed" in memfs_log(root, "--verify", status=1)
    report = json.loads(memfs_log(root, "--verify", "--json", status=1))
    assert report["problems"][0]["path"] == records.name_of(1)


def test_a_store_without_a_trail(tmp_path: Path) -> None:
    (tmp_path / ".memfs").mkdir()
    assert "no trail" in memfs_log(tmp_path, "--verify")
    assert memfs_log(tmp_path) == ""


@needs_root
def test_it_is_the_owners(root: Path) -> None:
    def others() -> list[tuple[int, str]]:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        found = []
        for more in ([], ["--verify"]):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found.append((cli.main(["log", str(root), *more]), said.getvalue()))
        return found

    try:
        for status, said in as_user(70001, others):
            assert status == 8
            assert "owner" in said
    finally:
        shutil.rmtree("/tmp/memfs-70001", ignore_errors=True)
