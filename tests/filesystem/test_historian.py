"""The policy applied to a store's versions, and jobs that are done later."""

from __future__ import annotations

import errno
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from memfs.cube import layout
from memfs.filesystem.past import historian
from memfs.filesystem.past.later import Later
from memfs.filesystem.past.upkeep import Upkeep
from memfs.vault.store import Store
from memfs.vault.versions import making, records
from memfs.vault.versions.records import LARGE, Version

from .conftest import Forest, until


def made(forest: Forest, name: str, count: int) -> str:
    """A cube with so many versions; its id."""
    forest.tree.names.mkdir(name, 0o755)
    for number in range(count):
        forest.write(f"{name}/payload.md", f"{name} {number} ".encode() * 1000)
    facts = forest.catalogue.facts(name)
    assert facts is not None
    assert facts.id is not None
    return facts.id


def aged(forest: Forest, cube_id: str, *ages: timedelta) -> list[str]:
    """Makes versions look older: each is renamed to a time so long ago; their new names."""
    base = forest.root / records.directory(cube_id)
    stamps = records.stamps(forest.store, cube_id)
    new = [records.stamp_of(datetime.now(UTC) - age) for age in ages]
    for old, stamp in zip(stamps, new, strict=True):
        os.rename(base / old, base / stamp)
    forest.catalogue.history.forget(cube_id)
    return new


def test_a_file_put_together_aside_is_a_change_of_its_cube(forest: Forest) -> None:
    cube_id = made(forest, "law", 1)
    aside = f"law/{layout.INCOMING}1"
    forest.tree.names.mkdir(aside, 0o700)
    (forest.root / aside / "0").write_text("brought back")
    forest.tree.names.rename(f"{aside}/0", "law/payload.md", 0)
    assert newest(forest, cube_id).files["payload.md"].size == len("brought back")
    (event,) = [e for e in forest.catalogue.journal.events() if e["event"] == "changed"][-1:]
    assert event["path"] == "law"


def test_a_cube_that_is_not_in_the_index_yet_is_not_gone(forest: Forest) -> None:
    cube_id = made(forest, "law", 1)
    until(lambda: forest.catalogue.keeper.reason == "")
    forest.catalogue.keeper.ask(lambda index: index.remove_under("law"), None)
    Upkeep(forest.catalogue.history).compare_all()
    assert newest(forest, cube_id).event == "created"


WEIGHTS = "law/adapter/adapter_model.safetensors"


def with_weights(forest: Forest, monkeypatch: pytest.MonkeyPatch, failing: int) -> str:
    """A cube with a large adapter, whose copies fail so often; its id."""
    sendfile, left = os.sendfile, [failing]

    def fails(*args: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sendfile(*args)

    cube_id = made(forest, "law", 1)
    forest.tree.names.mkdir("law/adapter", 0o755)
    monkeypatch.setattr(os, "sendfile", fails)
    forest.write(WEIGHTS, b"a" * LARGE)
    entry = newest(forest, cube_id).files["adapter/adapter_model.safetensors"]
    if not entry.linked and entry.sha256:
        pytest.skip("this disk shares blocks, so there is nothing to copy")
    return cube_id


def newest(forest: Forest, cube_id: str) -> Version:
    found = records.newest(forest.store, cube_id)
    assert found is not None
    return found


def test_a_copy_that_failed_is_made_later(
    forest: Forest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(historian, "RETRY_S", 0.1)
    cube_id = with_weights(forest, monkeypatch, failing=2)
    until(lambda: not making.is_wanting(newest(forest, cube_id)))
    assert (forest.root / WEIGHTS).stat().st_nlink == 1
    assert caplog.text.count("is not a copy yet") == 2
    caplog.clear()


def test_a_copy_that_could_not_be_made_is_left_to_the_next_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forest = Forest(tmp_path)
    try:
        cube_id = with_weights(forest, monkeypatch, failing=1 << 30)
        until(lambda: "is not a copy yet" in caplog.text)
    finally:
        forest.close()
        monkeypatch.undo()
        caplog.clear()
    with Store.open(tmp_path) as store:
        version = records.newest(store, cube_id)
        assert version is not None
        assert making.is_wanting(version)
        (tmp_path / version.directory / "adapter/.memfs-tmp-1").write_bytes(b"half a copy")
    (tmp_path / WEIGHTS).unlink()  # it is there no more, and the version has it
    forest = Forest(tmp_path)
    try:
        until(lambda: not making.is_wanting(records.read(forest.store, cube_id, version.stamp)))
    finally:
        forest.close()
    place = tmp_path / version.directory / "adapter"
    assert os.listdir(place) == ["adapter_model.safetensors"]
    assert (place / "adapter_model.safetensors").stat().st_nlink == 1


def test_what_cannot_be_cleared_up_is_in_nobodys_way(
    forest: Forest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = [made(forest, name, 1) for name in ("a", "b")]
    cube_id = with_weights(forest, monkeypatch, failing=1)
    for other, name in zip(damaged, (records.DESCRIPTION, None), strict=True):
        version = forest.root / newest(forest, other).directory
        if name is None:
            os.rename(version, version.with_name(".memfs-tmp-1"))
            version.mkdir()
        else:
            (version / name).unlink()
            (version / name).write_text("{")
    until(lambda: "is not a copy yet" in caplog.text)
    forest.catalogue.history.flushed = 0.0
    forest.catalogue.history.started = time.time() + 60
    Upkeep(forest.catalogue.history).start()
    until(lambda: not making.is_wanting(newest(forest, cube_id)))
    until(lambda: caplog.text.count("is not cleared up") == 2)
    caplog.clear()


def prune(forest: Forest) -> None:
    until(lambda: forest.catalogue.keeper.reason == "")
    Upkeep(forest.catalogue.history).prune()


def test_the_policy_is_applied(forest: Forest) -> None:
    cube_id = made(forest, "law", 5)
    day = timedelta(days=1)
    stamps = aged(
        forest, cube_id, 400 * day, 400 * day - timedelta(seconds=9), 40 * day, day / 2, day / 4
    )
    prune(forest)
    left = records.stamps(forest.store, cube_id)
    assert left in (stamps[1:], stamps)  # unless a week ended within those nine seconds
    assert forest.read(f"law/.versions/{left[-1]}/payload.md").startswith(b"law 4")


def test_the_last_version_of_a_living_cube_stays_whatever_its_age(forest: Forest) -> None:
    cube_id = made(forest, "law", 1)
    stamps = aged(forest, cube_id, timedelta(days=4000))
    forest.catalogue.history.budget = 1
    prune(forest)
    assert records.stamps(forest.store, cube_id) == stamps


def test_a_deleted_cube_goes_after_a_month(forest: Forest) -> None:
    ids = [made(forest, name, 1) for name in ("old", "young")]
    for name, cube_id in zip(("old", "young"), ids, strict=True):
        for file in ("payload.md", "meta.json"):
            forest.tree.names.unlink(f"{name}/{file}")
        forest.tree.names.rmdir(name)
        assert forest.catalogue.history.settle(name, cube_id)
    aged(forest, ids[0], timedelta(days=32), timedelta(days=31))
    aged(forest, ids[1], timedelta(days=30), timedelta(days=29))
    prune(forest)
    assert records.cube_ids(forest.store) == [ids[1]]
    assert len(records.stamps(forest.store, ids[1])) == 2


def test_beyond_the_budget_the_oldest_go(forest: Forest) -> None:
    one, two = made(forest, "one", 4), made(forest, "two", 4)
    everything = {i: records.stamps(forest.store, i) for i in (one, two)}
    size = sum(
        sum(records.blocks(forest.store, i, stamp).values())
        for i, stamps in everything.items()
        for stamp in stamps
    )
    forest.catalogue.history.budget = size * 2 // 3
    prune(forest)
    left = {i: records.stamps(forest.store, i) for i in (one, two)}
    for cube_id, stamps in left.items():
        assert stamps == everything[cube_id][-len(stamps) :]
    assert len(left[one]) < len(left[two]) == 4  # the first cube's are all older
    assert len(left[one]) >= 1


def test_jobs_come_in_time_once_and_put_off(caplog: pytest.LogCaptureFixture) -> None:
    later = Later("test")
    done: list[str] = []
    ended = threading.Event()

    def fails() -> None:
        raise OSError("as jobs may")

    began = time.monotonic()
    later.after(0.3, lambda: done.append("last"))
    later.after(0.1, lambda: done.append("once"), "key")
    later.after(0.0, lambda: done.append("never"), "key")
    later.after(0.1, lambda: done.append("put off"), "other")
    later.after(0.4, lambda: None, "other", put_off=True)
    later.after(0.0, fails)
    later.after(0.5, ended.set)
    later.start()
    assert ended.wait(10)
    assert time.monotonic() - began >= 0.5
    assert done == ["once", "last", "put off"]
    assert "as jobs may" in caplog.text
    later.after(60, lambda: done.append("too late"), "waits")
    later.after(0, ended.set)
    later.stop()
    assert [item for item in later.left() if item[0]] == [("waits", False)]
    assert later.stopping
