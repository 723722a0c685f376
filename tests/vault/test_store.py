"""The store is reached step by step: no symlink leads out of it, nothing makes us wait."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.errors import NotAllowed, NotFound
from memfs.vault.store import Store


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "payload.md").write_text("secret")
    return directory


@pytest.fixture(params=["at once", "step by step"])
def store(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A store on a machine that has ``openat2``, and on one that has not."""
    if request.param == "step by step":
        monkeypatch.setattr("memfs.vault.store.OFFERED", False)
    root = tmp_path / "store"
    (root / "work" / "a").mkdir(parents=True)
    (root / "work" / "a" / "payload.md").write_text("text")
    with Store.open(root) as opened:
        yield opened


def failure(call: object, *args: object) -> int | None:
    with pytest.raises(OSError) as raised:
        call(*args)  # type: ignore[operator]
    return raised.value.errno


def test_files_and_directories_are_opened(store: Store) -> None:
    assert store.read("work/a/payload.md", 100) == b"text"
    assert stat.S_ISDIR(store.stat("work/a").st_mode)
    assert store.stat("").st_ino == store.root.stat().st_ino
    for path in ("", "work", "work/a"):
        fd = store.open_dir(path)
        assert os.fstat(fd).st_ino == (store.root / path).stat().st_ino
        assert not os.get_inheritable(fd)
        os.close(fd)
    fd = store.open_file("work/new", os.O_WRONLY | os.O_CREAT, 0o640)
    os.write(fd, b"new")
    os.close(fd)
    assert (store.root / "work" / "new").read_bytes() == b"new"


@pytest.mark.parametrize("link", ["work/link", "link"])
def test_no_symlink_to_a_directory_is_followed(store: Store, outside: Path, link: str) -> None:
    (store.root / link).symlink_to(outside)
    for call in (store.open_dir, store.open_file, store.stat):
        assert failure(call, f"{link}/payload.md") == errno.ELOOP
    assert failure(store.open_dir, link) == errno.ELOOP
    assert failure(store.open_file, link) == errno.ELOOP
    assert stat.S_ISLNK(store.stat(link).st_mode)


def test_no_symlink_to_a_file_is_followed(store: Store, outside: Path) -> None:
    (store.root / "work" / "link.md").symlink_to(outside / "payload.md")
    assert failure(store.open_file, "work/link.md") == errno.ELOOP
    with pytest.raises(NotAllowed):
        store.open_regular("work/link.md")


@pytest.mark.parametrize(
    "path", ["..", "../outside/payload.md", "work/../..", ".", "a//b", "/", "a\0b"]
)
def test_no_path_leads_out(store: Store, outside: Path, path: str) -> None:
    for call in (store.open_file, store.open_dir, store.stat):
        assert failure(call, path) == errno.EINVAL


def test_a_swapped_directory_is_not_followed(store: Store, outside: Path) -> None:
    """What was a directory at the last look may be a symlink now."""
    fd = store.open_dir("work/a")
    os.close(fd)
    (store.root / "work" / "a").rename(store.root / "elsewhere")
    (store.root / "work" / "a").symlink_to(outside)
    assert failure(store.open_file, "work/a/payload.md") == errno.ELOOP


def test_what_is_no_regular_file_is_refused_at_once(store: Store) -> None:
    os.mkfifo(store.root / "fifo")
    (store.root / "link").symlink_to("fifo")
    for path in ("fifo", "link", "work"):
        with pytest.raises(NotAllowed):
            store.open_regular(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device files")
def test_a_device_is_not_even_opened(store: Store) -> None:
    os.mknod(store.root / "payload.md", stat.S_IFCHR | 0o666, os.makedev(10, 9999))  # no driver
    with pytest.raises(NotAllowed):  # opening it would be ENODEV or ENXIO
        store.open_regular("payload.md")


def test_a_file_that_is_too_long_is_not_read(store: Store) -> None:
    assert store.read("work/a/payload.md", 4) == b"text"
    assert failure(store.read, "work/a/payload.md", 3) == errno.EFBIG
    os.truncate(store.root / "work" / "a" / "payload.md", 1 << 40)
    assert failure(store.read, "work/a/payload.md", 1000) == errno.EFBIG


def test_names_that_are_not_utf8(store: Store) -> None:
    name = os.fsdecode(b"caf\xe9")
    (store.root / name).mkdir()
    (store.root / name / "payload.md").write_text("x")
    assert store.read(f"{name}/payload.md", 10) == b"x"
    assert (name, ["payload.md"]) in list(store.walk())


def test_the_walk_meets_every_directory_and_follows_nothing(store: Store, outside: Path) -> None:
    (store.root / "work" / "link").symlink_to(outside)
    (store.root / "work" / ".memfs").mkdir()
    found = dict(store.walk())
    assert found.keys() == {"", "work", "work/a", "work/.memfs"}
    assert found[""] == ["work"]
    assert sorted(found["work"]) == [".memfs", "a", "link"]
    assert dict(store.walk("work/a")) == {"work/a": ["payload.md"]}
    assert not list(store.walk("no/such"))


def test_the_walk_is_as_deep_as_the_store(store: Store) -> None:
    """Deeper than the interpreter recurses, with longer paths than a system call takes."""
    path, fd = "", store.open_dir("")
    for _ in range(1100):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        path, fd = f"{path}/deep" if path else "deep", below
    os.close(fd)
    try:
        assert path in dict(store.walk("deep"))
    finally:  # pytest's own way of removing it is recursive
        subprocess.run(["rm", "-rf", store.root / "deep"], check=True)


def test_the_control_directory(store: Store) -> None:
    assert store.writable
    assert stat.S_IMODE(store.control_dir.stat().st_mode) == 0o700
    assert (store.control_dir / ".gitignore").read_text() == "*\n"
    Store.open(store.root).close()


def test_the_control_directory_is_made_only_when_asked(tmp_path: Path) -> None:
    with Store.open(tmp_path, create_control=False) as store:
        assert not store.writable
    assert not (tmp_path / ".memfs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_roots_mount_does_not_shut_the_owner_out(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with Store.open(tmp_path) as store:
        assert store.control_dir.stat().st_uid == 12345
        assert (store.control_dir / ".gitignore").stat().st_uid == 12345


@pytest.mark.parametrize("kind", ["symlink", "file"])
def test_a_control_directory_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "store"
    root.mkdir()
    if kind == "symlink":
        (root / ".memfs").symlink_to(tmp_path)
    else:
        (root / ".memfs").write_text("x")
    with pytest.raises(NotAllowed):
        Store.open(root)


def test_where_there_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        with pytest.raises(NotFound):
            Store.open(tmp_path / name)


def test_the_root_may_be_given_as_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Store.open(tmp_path / "link") as store:
        assert store.root == (tmp_path / "real").resolve()
