"""Versions on the disk: cheap, whole or not at all, and found again from the directories alone."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from memfs.cube import metadata
from memfs.errors import VersionDamaged
from memfs.vault.store import Store
from memfs.vault.versions import making, records
from memfs.vault.versions.check import problems
from memfs.vault.versions.files import Unfinished, clear
from memfs.vault.versions.look import look
from memfs.vault.versions.records import LARGE, Version

ID = "01234567-89ab-4cde-8f01-23456789abcd"
BUDGET = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "store/work/law").mkdir(parents=True)
    with Store.open(tmp_path / "store") as store:
        yield store


def cube(store: Store) -> Path:
    return store.root / "work/law"


def write(store: Store, text: str, **descriptive: object) -> None:
    cube(store).mkdir(exist_ok=True)
    (cube(store) / "payload.md").write_text(text)
    meta = metadata.new(title="law")
    meta["descriptive"] |= {"id": ID, "created": "2026-01-01T00:00:00Z", **descriptive}
    (cube(store) / "meta.json").write_bytes(metadata.render(meta))


def make(store: Store, *, budget: int = BUDGET, patient: bool = False) -> Version | None:
    previous = records.newest(store, ID)
    present = look(store, "work/law", previous)
    assert present is not None
    return making.make(store, ID, present, previous, budget=budget, patient=patient)


def made(store: Store, **options: object) -> Version:
    version = make(store, **options)  # type: ignore[arg-type]
    assert version is not None
    return version


def place(store: Store, version: Version) -> Path:
    return store.root / version.directory


def test_a_version_is_the_files_as_they_were(store: Store) -> None:
    write(store, "one")
    first = made(store)
    assert (first.event, first.path) == ("created", "work/law")
    assert (place(store, first) / "payload.md").read_text() == "one"
    assert first.files["payload.md"].sha256 == hashlib.sha256(b"one").hexdigest()
    write(store, "two")
    second = made(store)
    assert second.event == "changed"
    assert second.stamp > first.stamp
    assert (place(store, first) / "payload.md").read_text() == "one"
    assert records.stamps(store, ID) == [first.stamp, second.stamp]
    assert [records.read(store, ID, v.stamp) for v in (first, second)] == [first, second]
    assert records.newest(store, ID, first.stamp) == first
    assert records.newest(store, ID, "2020") is None
    assert records.cube_ids(store) == [ID]


def test_what_did_not_change_is_a_second_name(store: Store) -> None:
    write(store, "one")
    (cube(store) / "adapter").mkdir()
    (cube(store) / "adapter/adapter_config.json").write_text("{}")
    first = made(store)
    write(store, "two")
    second = made(store)
    for name in ("meta.json", "adapter/adapter_config.json"):
        assert (place(store, first) / name).samefile(place(store, second) / name)
        assert not (place(store, first) / name).samefile(cube(store) / name)
    assert not (place(store, first) / "payload.md").samefile(place(store, second) / "payload.md")


def test_what_is_no_change_makes_none(store: Store) -> None:
    write(store, "one")
    made(store)
    write(store, "one")
    os.chmod(cube(store) / "payload.md", 0o600)
    meta = json.loads((cube(store) / "meta.json").read_text())
    meta["behavioural"]["reads"] = 7
    meta["governance"]["owner"] = "ann"
    meta["state"]["kv"] = {"state": "ready", "reason": None, "bytes": 1, "tokens": 1}
    (cube(store) / "meta.json").write_text(json.dumps(meta))
    (cube(store) / "kv.safetensors").write_bytes(b"a KV cache can be made again")
    assert make(store) is None
    meta["licence"] = "of an unknown key"
    (cube(store) / "meta.json").write_text(json.dumps(meta))
    assert made(store).event == "changed"


def test_an_invalid_header_is_no_finished_change(store: Store) -> None:
    write(store, "one")
    first = made(store)
    (cube(store) / "meta.json").write_text("{ bad")
    assert make(store) is None
    (cube(store) / "payload.md").write_text("two")
    second = made(store)
    assert (place(store, second) / "meta.json").samefile(place(store, first) / "meta.json")


def test_what_comes_back_says_what_it_was(store: Store) -> None:
    write(store, "one")
    first = made(store)
    write(store, "two")
    made(store)
    write(store, "one")
    third = made(store)
    assert (third.event, third.origin) == ("restored", first.stamp)
    digests = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two", b"one")]
    assert third.payloads == digests


def test_a_move_and_an_end_are_versions_too(store: Store) -> None:
    write(store, "one")
    first = made(store)
    os.rename(cube(store), store.root / "law")
    present = look(store, "law", first)
    assert present is not None
    moved = making.make(store, ID, present, first, budget=BUDGET, patient=False)
    assert moved is not None
    assert (moved.event, moved.path) == ("moved", "law")
    assert moved.content == first.content
    shutil.rmtree(store.root / "law")
    assert look(store, "law", moved) is None
    end = making.bury(store, moved, None)
    assert (end.deleted, end.files, end.path) == (True, {}, "law")
    assert records.newest(store, ID) == end
    write(store, "one")
    again = made(store)
    assert (again.event, again.origin) == ("restored", moved.stamp)


def test_a_copy_says_what_of_and_an_arrival_brings_its_chain(store: Store) -> None:
    write(store, "one", origin={"copied_from": "another"})
    meta = json.loads((cube(store) / "meta.json").read_text())
    meta["behavioural"]["versions"] = ["a" * 64]
    (cube(store) / "meta.json").write_text(json.dumps(meta))
    version = made(store)
    assert (version.event, version.origin) == ("copied", "another")
    assert version.payloads == ["a" * 64, hashlib.sha256(b"one").hexdigest()]


def test_the_chain_has_an_end(store: Store) -> None:
    for number in range(records.CHAIN + 5):
        write(store, f"text {number}")
        version = made(store)
    assert len(version.chain) == records.CHAIN
    assert version.payloads[-1] == hashlib.sha256(f"text {number}".encode()).hexdigest()


def test_clocks_that_go_back(store: Store) -> None:
    early = datetime(2026, 11, 22, 10, 42, 13, 123456, UTC)
    assert records.stamp_after(None, early) == "2026-11-22T10:42:13.123456Z"
    assert records.stamp_after("2027-01-01T00:00:00.999999Z", early) == (
        "2027-01-01T00:00:01.000000Z"
    )
    assert records.moment_of("2026-11-22T10:42:13.123456Z") == early


def weights(store: Store, byte: bytes, size: int = LARGE) -> Path:
    (cube(store) / "adapter").mkdir(exist_ok=True)
    file = cube(store) / "adapter/adapter_model.safetensors"
    file.unlink(missing_ok=True)  # as a publish does: a new file
    file.write_bytes(byte * size)
    return file


def test_large_weights_are_linked_at_once_and_copied_later(store: Store) -> None:
    write(store, "one")
    live = weights(store, b"a")
    name = "adapter/adapter_model.safetensors"
    first = made(store)
    entry = first.files[name]
    if not entry.linked:
        pytest.skip("this disk shares blocks, so there is nothing to link")
    assert entry.sha256 is None
    assert (place(store, first) / name).samefile(live)
    write(store, "two")
    second = made(store)
    whole = [making.complete(store, ID, v.stamp) for v in (first, second)]
    for version in whole:
        assert version.files[name].sha256 == hashlib.sha256(b"a" * LARGE).hexdigest()
        assert not version.files[name].linked
        assert not (place(store, version) / name).samefile(live)
        assert version == records.read(store, ID, version.stamp)
    assert (place(store, first) / name).samefile(place(store, second) / name)
    assert live.stat().st_nlink == 1
    assert make(store) is None


def test_weights_that_were_changed_in_place_before_the_copy_are_given_up(store: Store) -> None:
    write(store, "one")
    live = weights(store, b"a")
    first = made(store)
    name = "adapter/adapter_model.safetensors"
    if not first.files[name].linked:
        pytest.skip("this disk shares blocks")
    with live.open("r+b") as file:
        file.write(b"b")
    whole = making.complete(store, ID, first.stamp)
    assert not whole.files[name].kept
    assert not (place(store, first) / name).exists()


def changing(monkeypatch: pytest.MonkeyPatch, live: Path) -> None:
    """Whatever is copied is changed in place while it is."""
    sendfile = os.sendfile

    def changes(*args: int) -> int:
        done = sendfile(*args)
        with live.open("r+b") as file:
            file.seek(LARGE - 1)
            file.write(b"b")
        return done

    monkeypatch.setattr(os, "sendfile", changes)


def test_weights_that_are_changed_in_place_during_the_copy_are_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, "one")
    live = weights(store, b"a")
    os.utime(live, (1, 1))
    first = made(store)
    name = "adapter/adapter_model.safetensors"
    if not first.files[name].linked:
        pytest.skip("this disk shares blocks")
    changing(monkeypatch, live)
    whole = making.complete(store, ID, first.stamp)
    assert not whole.files[name].kept
    assert os.listdir(place(store, first) / "adapter") == []
    assert list(problems(store)) == []
    assert live.stat().st_nlink == 1


def test_a_patient_copy_is_whole_or_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "one")
    live = weights(store, b"a")
    os.utime(live, (1, 1))
    changing(monkeypatch, live)
    try:
        version = made(store, patient=True)
    except BlockingIOError:
        assert records.stamps(store, ID) == []
        assert os.listdir(store.root / records.directory(ID)) == []
    else:  # this disk shares blocks
        assert (place(store, version) / "adapter/adapter_model.safetensors").read_bytes()[-1:] == (
            b"a"
        )
    monkeypatch.undo()
    made(store, patient=True)


def test_a_kill_before_what_is_given_up_was_removed(store: Store) -> None:
    write(store, "one")
    weights(store, b"a")
    version = made(store)
    name = "adapter/adapter_model.safetensors"
    given_up = dataclasses.replace(version.files[name], kept=False, linked=False)
    file = place(store, version) / records.DESCRIPTION
    file.unlink()
    file.write_text(
        json.dumps(dataclasses.replace(version, files={name: given_up}).to_json()),
    )
    for left in ("payload.md", "meta.json"):
        (place(store, version) / left).unlink()
    assert list(problems(store)) == []
    clear(store, records.read(store, ID, version.stamp))
    assert os.listdir(place(store, version) / "adapter") == []


def test_another_id_takes_over_all_but_a_moment_that_it_has(store: Store) -> None:
    write(store, "one")
    first = made(store)
    write(store, "two")
    second = made(store)
    other = "11111111-89ab-4cde-8f01-23456789abcd"
    shutil.copytree(place(store, first), store.root / records.directory(other, first.stamp))
    making.take_over(store, ID, other)
    assert records.stamps(store, other) == [first.stamp, second.stamp]
    assert records.stamps(store, ID) == [first.stamp]


def test_what_does_not_fit_the_budget_is_described_only(store: Store) -> None:
    write(store, "one")
    weights(store, b"a")
    version = made(store, budget=LARGE - 1, patient=True)
    entry = version.files["adapter/adapter_model.safetensors"]
    if entry.kept:
        pytest.skip("this disk shares blocks, which takes none of the budget")
    assert entry.size == LARGE
    assert os.listdir(place(store, version) / "adapter") == []
    assert make(store, budget=LARGE - 1) is None


def test_where_nothing_can_be_linked_the_copy_waits_for_somebody_patient(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, "one")
    weights(store, b"a")

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)  # as on a disk that has no hard links
    name = "adapter/adapter_model.safetensors"
    try:
        version = made(store)
    except Unfinished:
        assert records.stamps(store, ID) == []
        version = made(store, patient=True)
        assert version.files[name].sha256 == hashlib.sha256(b"a" * LARGE).hexdigest()
    write(store, "two")
    second = made(store, patient=True)
    assert (place(store, second) / name).read_bytes() == b"a" * LARGE


def test_a_full_disk_leaves_nothing_half_made(store: Store) -> None:
    write(store, "one")
    first = made(store)
    write(store, "a text that does not fit " * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            make(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(store.root / records.directory(ID)) == [first.stamp]
    assert made(store).event == "changed"


def test_removing_one_leaves_the_others_whole(store: Store) -> None:
    write(store, "one")
    first = made(store)
    write(store, "two")
    second = made(store)
    making.remove(store, ID, first.stamp)
    assert records.stamps(store, ID) == [second.stamp]
    assert json.loads((place(store, second) / "meta.json").read_text())["memfs"] == 1
    making.remove(store, ID, second.stamp)
    assert records.cube_ids(store) == []


def test_what_a_kill_left_is_removed(store: Store) -> None:
    write(store, "one")
    first = made(store)
    base = store.root / records.directory(ID)
    (base / ".memfs-tmp-dead").mkdir()
    (base / ".memfs-tmp-dead/payload.md").touch()
    assert records.stamps(store, ID) == [first.stamp]
    making.remove_leftovers(store, ID, before=0)
    assert (base / ".memfs-tmp-dead").exists()
    making.remove_leftovers(store, ID, before=2e9)
    assert os.listdir(base) == [first.stamp]


def test_descriptions_are_not_trusted(store: Store) -> None:
    write(store, "one")
    version = made(store)
    file = place(store, version) / records.DESCRIPTION
    for change in (
        {"path": "../out"},
        {"path": "/etc"},
        {"path": None},
        {"files": {"../payload.md": {}}},
        {"files": {"adapter/..": dataclasses.asdict(version.files["payload.md"])}},
        {"memfs_version": 9},
        {"chain": [1]},
    ):
        file.unlink()
        file.write_text(json.dumps(version.to_json() | change))
        with pytest.raises(VersionDamaged):
            records.read(store, ID, version.stamp)
    file.write_text("{")
    with pytest.raises(VersionDamaged):
        records.read(store, ID, version.stamp)
    assert records.newest(store, ID) is None


def test_the_mark_of_a_mount_at_work(store: Store) -> None:
    assert making.mark(store) is None
    making.mark_flushed(store, 1234.5)
    assert making.mark(store) == 1234.5
    making.unmark(store)
    assert making.mark(store) is None
    assert records.cube_ids(store) == []


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_new_content_shares_blocks_where_the_disk_can(tmp_path: Path, kind: str) -> None:
    """On a file system of its own, in a loop device."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    if os.geteuid() != 0 or not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"needs root and mkfs.{kind}")
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    disk.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, disk], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.decode().strip()}")
    try:
        (disk / "store/work").mkdir(parents=True)
        with Store.open(disk / "store") as store:
            write(store, "one")
            live = weights(store, b"a", 64 << 20)
            os.sync()
            before = os.statvfs(disk).f_bavail
            version = made(store)
            os.sync()
            taken = (before - os.statvfs(disk).f_bavail) * os.statvfs(disk).f_frsize
            assert taken < 8 << 20
            name = "adapter/adapter_model.safetensors"
            assert not version.files[name].linked
            assert live.stat().st_nlink == 1
            with live.open("r+b") as opened:
                opened.write(b"b")
            assert (place(store, version) / name).read_bytes()[:1] == b"a"
            whole = making.complete(store, ID, version.stamp)
            assert whole.files[name].sha256 == hashlib.sha256(b"a" * (64 << 20)).hexdigest()
    finally:
        subprocess.run(["umount", disk], check=True)
