"""The audit trail: what is written can be read, and whatever is done to it afterwards is found."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.vault.store import Store
from memfs.vault.trail import records, writer
from memfs.vault.trail.writer import Trail


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    root = tmp_path / "store"
    root.mkdir()
    with Store.open(root) as store:
        yield store


def fill(store: Store, count: int = 12, **more: str) -> None:
    with Trail(store) as open_trail:
        for number in range(count):
            open_trail.append({"event": "changed", "path": f"c{number}"} | more)


def names(store: Store) -> list[str]:
    return [event["path"] for event in records.events(store) if "path" in event]


def said(store: Store) -> list[str]:
    """What the trail tells of itself."""
    return [event["what"] for event in records.events(store) if event["event"] == "trail"]


def file_of(store: Store, number: int = 1) -> Path:
    return store.root / records.name_of(number)


def whats(store: Store) -> list[str]:
    return [problem.what for problem in records.problems(store)]


def test_events_in_their_order(store: Store) -> None:
    with Trail(store) as open_trail:
        assert open_trail.append({"event": "mounted", "path": "a\udcff"}) == 1
        assert open_trail.append({"event": "asked", "time": 7.5, "seq": 9, "hash": "x"}) == 2
        first, second = records.events(store)
        assert (first["seq"], first["path"]) == (1, "a\udcff")
        assert abs(first["time"] - time.time()) < 60
        assert (second["seq"], second["event"], second["time"]) == (2, "asked", 7.5)
        assert second["prev"] == first["hash"]
        assert list(records.events(store, after=1)) == [second]
        assert whats(store) == []
    assert whats(store) == []


def test_nothing_is_written_once_it_is_closed(store: Store, tmp_path: Path) -> None:
    fill(store, 2)
    with Trail(store) as open_trail:
        pass
    with contextlib.ExitStack() as stack:  # one of these gets the number that the trail had
        files = [stack.enter_context((tmp_path / f"{n}").open("wb")) for n in range(64)]
        assert open_trail.append({"event": "changed", "path": "late"}) == 0
        assert [os.fstat(file.fileno()).st_size for file in files] == [0] * 64
    assert names(store) == ["c0", "c1"]


def test_a_hash_can_be_made_without_memfs(store: Store) -> None:
    fill(store, 3)
    for line in file_of(store).read_text().splitlines():
        body, _, rest = line.partition(',"hash":"')
        assert hashlib.sha256(body.encode()).hexdigest() == rest[:-2]
        json.loads(line)


def test_it_goes_on_where_it_ended(store: Store) -> None:
    for _ in range(3):
        fill(store, 4)
    assert [event["seq"] for event in records.events(store)] == list(range(1, 13))
    assert said(store) == []
    assert whats(store) == []


def test_nobody_else_reads_it(store: Store) -> None:
    if os.geteuid() == 0:
        os.chown(store.root, 4321, 1234)
        os.chown(store.control_dir, 4321, 1234)
    fill(store)
    for path in (store.root / records.TRAIL, store.root / records.HEAD, file_of(store)):
        found = path.stat()
        assert not stat.S_IMODE(found.st_mode) & 0o077, path
        assert found.st_uid == store.root.stat().st_uid, path


def test_many_threads_make_one_chain(store: Store) -> None:
    with Trail(store) as open_trail:

        def work(name: str) -> None:
            for number in range(100):
                open_trail.append({"event": "changed", "path": f"{name}{number}"})

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert whats(store) == []
    assert len(set(names(store))) == 400


def test_any_byte_that_is_changed_is_found(store: Store) -> None:
    fill(store, 3)
    for file in (file_of(store), store.root / records.HEAD):
        whole = file.read_bytes()
        for place in range(len(whole)):
            for bit in (0x01, 0x20):
                data = bytearray(whole)
                data[place] ^= bit
                if file.name == "head" and _says_the_same(whole, bytes(data)):
                    continue
                file.write_bytes(data)
                assert whats(store), (file.name, place, bit, bytes(data))
        file.write_bytes(whole)
    assert whats(store) == []


def _says_the_same(one: bytes, other: bytes) -> bool:
    """The head's size and file say where to go on, and no more; the rest of it is a claim."""
    try:
        left, right = json.loads(one), json.loads(other)
    except ValueError:
        return False
    return all(left.get(n) == right.get(n) for n in ("seq", "hash", "dropped_seq", "dropped_hash"))


def removed(lines: list[bytes]) -> list[bytes]:
    return lines[:4] + lines[5:]


def inserted(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[2], *lines[4:]]


def moved(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[5], lines[4], *lines[6:]]


def truncated(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def beheaded(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def emptied(lines: list[bytes]) -> list[bytes]:
    return []


def rehashed(lines: list[bytes]) -> list[bytes]:
    """A line that was changed and given a hash that is right for it."""
    event = json.loads(lines[4])
    content = {n: v for n, v in event.items() if n not in ("seq", "time", "prev", "hash")}
    forged, _ = records.render(
        event["seq"], event["time"], content | {"path": "forged"}, event["prev"]
    )
    return [*lines[:4], forged, *lines[5:]]


@pytest.mark.parametrize(
    "damage",
    [removed, inserted, moved, truncated, beheaded, emptied, rehashed],
    ids=lambda damage: damage.__name__,
)
def test_lines_that_are_changed_as_a_whole_are_found(
    store: Store, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    fill(store)
    lines = file_of(store).read_bytes().splitlines(keepends=True)
    file_of(store).write_bytes(b"".join(damage(lines)))
    assert whats(store)
    fill(store)  # it goes on, and what was done to it is found all the same
    assert whats(store)
    assert [name for name in names(store) if name == "c11"][-1:] == ["c11"]


def test_a_file_that_is_gone_is_missed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 1000)
    fill(store, 40)
    files = records.list_files(store)
    assert len(files) > 5
    for number in (files[0], files[2], files[-1]):
        kept = file_of(store, number).read_bytes()
        file_of(store, number).unlink()
        assert whats(store), number
        file_of(store, number).write_bytes(kept)
        file_of(store, number).chmod(0o600)
    assert whats(store) == []
    for number in files:
        file_of(store, number).unlink()
    assert whats(store)
    fill(store, 1)
    assert said(store) == ["its files are gone"]


def test_the_head_is_missed(store: Store) -> None:
    fill(store)
    (store.root / records.HEAD).unlink()
    assert "missing" in whats(store)[0]
    fill(store, 1)
    assert said(store) == ["head was missing"]
    assert whats(store) == []


def test_the_oldest_files_go_whole_and_the_rest_has_a_beginning(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 1000)
    monkeypatch.setattr(writer, "KEEP_FILES", 3)
    fill(store, 60)
    files = records.list_files(store)
    assert len(files) == 3
    assert files[0] > 1
    assert [event["seq"] for event in records.events(store)] == list(range(files[0], 61))
    assert whats(store) == []
    first = file_of(store, files[0])
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(lines[1:]))
    assert whats(store)
    first.unlink()
    assert whats(store)


@pytest.mark.parametrize("rest", [b'{"seq":13,"ti', b"\0" * 300, b'{"seq":13}\0\0'])
def test_half_a_line_is_cut_off_and_said_so(store: Store, rest: bytes) -> None:
    fill(store)
    with file_of(store).open("ab") as file:
        file.write(rest)
    assert "unfinished" in whats(store)[0]
    fill(store, 1)
    assert said(store) == [f"{len(rest)} bytes of an unfinished line were cut off"]
    assert whats(store) == []
    assert names(store) == [*(f"c{number}" for number in range(12)), "c0"]


def test_lines_younger_than_the_head_are_kept(store: Store) -> None:
    """As after kill -9: everything was written, and the last second not flushed."""
    fill(store, 5)
    head = (store.root / records.HEAD).read_bytes()
    fill(store, 5)
    (store.root / records.HEAD).write_bytes(head)
    assert whats(store) == []
    fill(store, 1)
    assert said(store) == []
    assert whats(store) == []
    assert len(names(store)) == 11


KILLED = """
import os, sys
from pathlib import Path
from memfs.vault.trail import writer
from memfs.vault.store import Store
writer.FILE_BYTES, writer.KEEP_FILES = 30_000, 10_000
trail = writer.Trail(Store.open(Path(sys.argv[1])))
sys.stdout.write("ready\\n")
sys.stdout.flush()
number = 0
while True:
    number += 1
    records.append({"event": "changed", "path": f"c{number}"})
    os.write(1, f"{number}\\n".encode())
"""


def test_a_killed_writer_loses_nothing(store: Store) -> None:
    for delay in (0.0, 0.01, 0.03, 1.2):
        before = len(names(store))
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, store.root], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.kill()
            told = child.stdout.read().split()
        assert len(names(store)) - before in (len(told), len(told) + 1)
        fill(store, 1)
        assert said(store) == []
        assert whats(store) == []


def test_a_full_disk_fails_nothing_and_is_told_of(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    with Trail(store) as open_trail:
        assert open_trail.append({"event": "changed", "path": "a"}) == 1
        size = file_of(store).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A limit on the size of files writes a part of the line first, as a full disk may.
        import signal

        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            assert open_trail.append({"event": "changed", "path": "b"}) == 0
            assert open_trail.append({"event": "changed", "path": "c"}) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert file_of(store).stat().st_size == size
        assert open_trail.append({"event": "changed", "path": "d"}) == 3
    assert said(store) == ["2 events were lost"]
    assert names(store) == ["a", "d"]
    assert whats(store) == []


def test_no_symlink_is_followed(store: Store, tmp_path: Path) -> None:
    fill(store)
    elsewhere = tmp_path / "elsewhere"
    (store.root / records.TRAIL).rename(elsewhere)
    (store.root / records.TRAIL).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links") as raised:
        Trail(store)
    assert raised.value.errno == errno.ELOOP
