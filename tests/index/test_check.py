"""Whatever was done to the file, this process lives, and either trusts rightly or not at all."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.index import environment
from memfs.index.check import salvage, sound
from memfs.index.lmdb_index import Index
from memfs.index.records import FORMAT, Usage
from memfs.vault.facts import CubeFacts

PAGE = 4096
ID = str(uuid.UUID(int=7))


def fill(directory: Path, cubes: int = 300) -> dict[str, CubeFacts]:
    known = {
        f"work/c{i}": CubeFacts(id=str(uuid.UUID(int=i)), title="t" * 600, tags=("a",), changed=i)
        for i in range(cubes)
    }
    with Index.open(directory) as index:
        index.put_many(known.items())
        for i in range(cubes):
            index.count(str(uuid.UUID(int=i)), reads=1, at=5.0)
    return known


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "index"


def test_a_sound_index(directory: Path) -> None:
    assert sound(directory) == "there is none"
    fill(directory)
    assert sound(directory) is None
    with Index.open(directory) as index:
        assert sound(directory, live=True) is None  # beside its writer, too
        index.put("new", CubeFacts())
        assert sound(directory, live=True) is None


def test_an_empty_index_is_sound(directory: Path) -> None:
    Index.open(directory).close()
    assert sound(directory) is None


def truncated(data: bytearray) -> None:
    del data[len(data) // 2 :]


def to_nothing(data: bytearray) -> None:
    data.clear()


def to_the_headers(data: bytearray) -> None:
    del data[2 * PAGE :]


def zeroed_pages(data: bytearray) -> None:
    for page in range(2, len(data) // PAGE, 3):
        data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)


def zeroed_headers(data: bytearray) -> None:
    data[: 2 * PAGE] = bytes(2 * PAGE)


def of_noise(data: bytearray) -> None:
    data[2 * PAGE :] = random.Random(1).randbytes(len(data) - 2 * PAGE)


def all_noise(data: bytearray) -> None:
    data[:] = random.Random(2).randbytes(len(data))


def of_text(data: bytearray) -> None:
    data[:] = b"this is no index\n"


def flipped_in_a_record(data: bytearray) -> None:
    """In every copy of it: LMDB leaves old ones in the file."""
    at = data.find(b'work/c7"')
    while at >= 0:
        data[at + 5] ^= 1
        at = data.find(b'work/c7"', at)


def swapped_pages(data: bytearray) -> None:
    """Each page of records stands where another one belongs."""
    pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    records = [number for number, page in enumerate(pages) if b"t" * 600 in page]
    for number, other in zip(records, records[1:] + records[:1], strict=True):
        data[number * PAGE : (number + 1) * PAGE] = pages[other]


DAMAGE = [
    truncated,
    to_nothing,
    to_the_headers,
    zeroed_pages,
    zeroed_headers,
    of_noise,
    all_noise,
    of_text,
    flipped_in_a_record,
    swapped_pages,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found(directory: Path, damage: Callable[[bytearray], None]) -> None:
    known = fill(directory)
    file = directory / "data.mdb"
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    assert sound(directory)
    sound(directory, live=True)  # may find less, and is as safe
    # What is saved from it is what was there, however little.
    for path, cube_id in salvage(directory, "cubes"):
        assert known[path].id == cube_id
    for cube_id, *counts in salvage(directory, "usage"):
        assert uuid.UUID(cube_id).int < len(known)
        assert counts == [1, 0, 5.0, True]


def test_any_byte_may_be_wrong(directory: Path, tmp_path: Path) -> None:
    """What passes for sound gives right answers or IndexDamaged: never a wrong fact."""
    known = fill(directory, 60)
    whole = (directory / "data.mdb").read_bytes()
    rng = random.Random(os.environ.get("MEMFS_TEST_SEED", "3"))
    for number in range(12):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        other = tmp_path / f"other{number}"
        other.mkdir()
        (other / "data.mdb").write_bytes(data)
        if sound(other) is None:
            with Index.open(other) as index:
                assert {path: index.get(path) for path in known} == known
                assert dict(index.under("")) == known


def test_what_is_whole_beside_the_damage_is_saved(directory: Path) -> None:
    fill(directory)
    file = directory / "data.mdb"
    data = bytearray(file.read_bytes())
    flipped_in_a_record(data)
    file.write_bytes(data)
    assert len(list(salvage(directory, "cubes"))) == 299
    assert len(list(salvage(directory, "usage"))) == 300
    assert dict(salvage(directory, "info")) == {"format": FORMAT}


def test_saving_may_end_early(directory: Path) -> None:
    fill(directory)
    rows = salvage(directory, "usage")
    next(rows)
    rows.close()


def test_salvage_of_nothing(directory: Path) -> None:
    assert list(salvage(directory, "usage")) == []


def test_an_index_that_was_open_when_the_machine_stopped(directory: Path) -> None:
    fill(directory)
    index = Index.open(directory)
    assert (directory / environment.UNCLEAN).read_text() == environment.boot_id()
    assert sound(directory) is None  # it was this process that might have been killed
    index.close()
    assert not (directory / environment.UNCLEAN).exists()
    for text in ("another-boot", ""):
        (directory / environment.UNCLEAN).write_text(text)
        assert sound(directory) == "the machine stopped while it was open"


KILLED = """
import os, sys
from pathlib import Path
from memfs.index.lmdb_index import Index
from memfs.vault.facts import CubeFacts
index = Index.open(Path(sys.argv[1]))
for i in range(1000):
    index.put(f"c{i}", CubeFacts(title="x" * 100))
    if i == 500:
        os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_loses_nothing(directory: Path) -> None:
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", KILLED, directory], check=False)
    assert sound(directory) is None
    with Index.open(directory) as index:
        assert len(index) == 501
        index.put("after", CubeFacts())
        assert not index.key_errors()


def test_modules_of_the_working_directory_are_not_run(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(directory, 3)
    (tmp_path / "lmdb.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    assert sound(directory) is None


def test_usage_survives_the_way_through_a_child(directory: Path) -> None:
    with Index.open(directory) as index:
        index.set_usage(ID, Usage(3, 4, None))
    assert list(salvage(directory, "usage")) == [[ID, 3, 4, None, False]]
