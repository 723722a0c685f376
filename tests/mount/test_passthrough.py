"""How the kernel reads open files: by itself, from its cache or from us, and never wrongly.

All of it holds with passthrough and without; tools/debian13 runs it with a libfuse that offers it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import Mount, memfs, mounted_at, needs_root, until
from .kvmaker import kv_file
from .test_posix import as_user, open_place  # noqa: F401  a fixture

TEXT = "A text.\n"
KV = kv_file(TEXT.encode(), tokens=4096)
OTHER = kv_file(b"other", tokens=5000)


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount on which nobody needs to see reads, so that everything is passed through that can."""
    with mounted_at(tmp_path_factory.mktemp("shared"), "-o", "mount_on_read=off") as mount:
        until(mount.has_index)
        yield mount


@pytest.fixture
def kv(place: Path) -> Path:
    (place / "payload.md").write_text(TEXT)
    (place / "kv.safetensors").write_bytes(KV)
    return place / "kv.safetensors"


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    return os.open(path, flags)


def content(fd: int) -> bytes:
    return os.pread(fd, 4 << 20, 0)


def test_the_status_and_the_doctor_say_which_mode_and_why(shared_mount: Mount) -> None:
    found = shared_mount.status()["passthrough"]
    assert found["on"] is (found["reason"] is None)
    text = (shared_mount.dir / ".memfs/status").read_text()
    said = memfs("doctor", check=False).stdout
    if found["on"]:
        assert "by the kernel itself" in text
        assert "the kernel reads files of a mount by itself" in said
    else:
        assert found["reason"] in text
        assert f"not used: {found['reason']}" in said


@pytest.mark.parametrize("name", ["kv.safetensors", "notes.txt"])
def test_passed_through_the_kernel_reads_without_the_mount(
    shared_mount: Mount, kv: Path, name: str
) -> None:
    if not shared_mount.status()["passthrough"]["on"]:
        pytest.skip(f"no passthrough here: {shared_mount.status()['passthrough']['reason']}")
    path = kv.parent / name
    if not path.exists():
        path.write_bytes(KV)
    fd = opened(path)
    stored = os.open(shared_mount.store / path.relative_to(shared_mount.dir), os.O_RDONLY)
    os.fsync(stored)
    os.posix_fadvise(stored, 0, 0, os.POSIX_FADV_DONTNEED)
    expected, found = content(stored), []
    os.kill(shared_mount.pid, signal.SIGSTOP)
    try:
        reader = threading.Thread(target=lambda: found.append(content(fd)), daemon=True)
        reader.start()
        reader.join(5)
    finally:
        os.kill(shared_mount.pid, signal.SIGCONT)
    assert found == [expected]
    os.close(fd)
    os.close(stored)


def test_replaced_while_it_is_open(kv: Path) -> None:
    before = opened(kv)
    kv.write_bytes(OTHER)
    after = opened(kv)
    assert content(before) == KV
    assert content(after) == OTHER == kv.read_bytes()
    os.close(before)
    assert content(after) == OTHER
    os.close(after)
    assert kv.read_bytes() == OTHER


def test_replaced_beside_the_mount_while_it_is_open(shared_mount: Mount, kv: Path) -> None:
    stored = shared_mount.store / kv.relative_to(shared_mount.dir)
    for path, real in ((kv, stored), (kv.parent / "notes", stored.parent / "notes")):
        real.write_bytes(KV)
        before = opened(path)
        assert content(before) == KV
        (real.parent / "new").write_bytes(OTHER)
        os.rename(real.parent / "new", real)
        after = opened(path)
        assert content(after) == OTHER
        assert content(before) == KV
        os.close(before)
        assert content(after) == path.read_bytes() == OTHER
        os.close(after)


def test_changed_beside_the_mount_it_is_read_anew(shared_mount: Mount, place: Path) -> None:
    path, real = place / "file", shared_mount.store / place.name / "file"
    path.write_bytes(b"a" * 5000)
    for byte in (b"b", b"c", b"d"):
        assert len(path.read_bytes()) == 5000
        real.write_bytes(byte * 5000)
        assert path.read_bytes() == byte * 5000


def test_written_while_others_read(kv: Path) -> None:
    reading = opened(kv)
    writing = opened(kv, os.O_RDWR)
    os.pwrite(writing, b"!", 100)
    assert content(writing)[100:101] == b"!"
    assert content(reading) == KV
    again = opened(kv)
    os.close(writing)
    assert kv.read_bytes() == KV[:100] + b"!" + KV[101:]
    for fd in (reading, again):
        os.close(fd)


def test_a_text_written_while_others_read_is_noticed(shared_mount: Mount, kv: Path) -> None:
    payload = kv.parent / "payload.md"
    reading = opened(payload)
    assert content(reading) == TEXT.encode()
    writing = opened(payload, os.O_RDWR | os.O_APPEND)
    os.write(writing, b"More.\n")
    assert content(reading) == TEXT.encode() + b"More.\n"
    os.close(writing)
    assert shared_mount.meta(kv.parent.name)["state"]["kv"]["state"] == "stale"
    os.ftruncate(fd := opened(payload, os.O_RDWR), 3)
    assert content(reading) == TEXT.encode()[:3]
    os.close(fd)
    os.close(reading)
    assert payload.read_bytes() == TEXT.encode()[:3]


def test_unlinked_and_made_again_while_open(kv: Path) -> None:
    first = opened(kv)
    kv.unlink()
    kv.write_bytes(OTHER)
    second = opened(kv)
    assert (content(first), content(second)) == (KV, OTHER)
    again = os.open(f"/proc/self/fd/{first}", os.O_RDONLY)
    assert content(again) == KV
    for fd in (first, second, again):
        os.close(fd)
    assert kv.read_bytes() == OTHER


def test_renamed_while_open(kv: Path) -> None:
    first = opened(kv)
    kept = kv.parent / "kept"
    kv.rename(kept)
    second = opened(kept, os.O_RDWR)
    os.pwrite(second, b"?", 0)
    kv.write_bytes(OTHER)
    third = opened(kv)
    assert content(first)[:1] == content(second)[:1] == b"?"
    assert content(third) == OTHER
    os.replace(kept, kv)
    fourth = opened(kv)
    assert content(fourth) == b"?" + KV[1:]
    assert content(third) == OTHER
    for fd in (first, second, third, fourth):
        os.close(fd)


def test_an_ordinary_file_becomes_a_blob_while_open(place: Path) -> None:
    plain = place / "plain"
    plain.write_bytes(KV)
    writing, reading = opened(plain, os.O_RDWR), opened(plain)
    assert content(reading) == KV
    plain.rename(place / "kv.safetensors")
    blob = opened(place / "kv.safetensors")
    assert content(blob) == content(reading) == content(writing) == KV
    for fd in (writing, reading, blob):
        os.close(fd)


def test_hard_links_show_the_same(place: Path) -> None:
    (place / "a").write_bytes(b"one")
    os.link(place / "a", place / "b")
    a, b = opened(place / "a"), opened(place / "b", os.O_RDWR)
    os.pwrite(b, b"two", 0)
    assert content(a) == content(b) == b"two"
    os.close(a)
    os.close(b)


def test_many_at_once_in_all_modes(kv: Path) -> None:
    """Opens for reading and for writing, and replacements, all on one name: none may fail."""

    def work(turn: int) -> None:
        for number in range(12):
            if (turn + number) % 4 == 0:
                kv.write_bytes(KV if turn % 2 else OTHER)
            else:
                fd = opened(kv, os.O_RDWR if turn % 3 == 0 else os.O_RDONLY)
                assert len(content(fd)) <= len(OTHER)  # one that is being written shows in part
                os.close(fd)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    kv.write_bytes(KV)
    assert kv.read_bytes() == KV


@needs_root
def test_several_users(open_place: Path) -> None:  # noqa: F811
    path = open_place / "kv.safetensors"
    path.write_bytes(KV)
    path.chmod(0o644)
    mine = opened(path)
    code = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    assert int(as_user(1234, 1234, code, path).stdout) == len(KV) == len(content(mine))
    path.chmod(0o600)
    assert "PermissionError" in as_user(1234, 1234, code, path).stderr
    os.close(mine)
