"""A published file is there whole or not at all, with the right owner, and nothing is left."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import memfs
from memfs.cube import layout
from memfs.vault.publish import (
    publish_bytes,
    publishing,
    remove_leftover,
)
from memfs.vault.sig import sig_of
from memfs.vault.store import Store

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "a").mkdir()
    with Store.open(tmp_path) as opened:
        yield opened


def names(store: Store) -> list[str]:
    return sorted(os.listdir(store.root / "a"))


def test_a_file_is_published(store: Store) -> None:
    status = publish_bytes(store, "a/meta.json", b"one")
    assert (store.root / "a" / "meta.json").read_bytes() == b"one"
    assert sig_of(status) == sig_of((store.root / "a" / "meta.json").stat())
    assert names(store) == ["meta.json"]


def test_a_published_file_is_a_new_one(store: Store) -> None:
    """Who has the old one open or mapped keeps it as it was."""
    publish_bytes(store, "a/f", b"old")
    with open(store.root / "a" / "f", "rb") as before:
        publish_bytes(store, "a/f", b"new and longer")
        assert before.read() == b"old"
    assert (store.root / "a" / "f").read_bytes() == b"new and longer"


def test_the_path_that_is_given_opens_the_same_file(store: Store) -> None:
    with publishing(store, "a/f") as (fd, path):
        Path(path).write_bytes(b"by path")
        assert os.pread(fd, 100, 0) == b"by path"
        assert layout.is_temporary(names(store)[0])
    assert names(store) == ["f"]


def test_nothing_is_left_where_it_fails(store: Store) -> None:
    publish_bytes(store, "a/f", b"old")
    with pytest.raises(ZeroDivisionError), publishing(store, "a/f") as (fd, _):
        os.write(fd, b"half")
        raise ZeroDivisionError
    assert (store.root / "a" / "f").read_bytes() == b"old"
    os.mkdir(store.root / "a" / "directory")
    with pytest.raises(IsADirectoryError):
        publish_bytes(store, "a/directory", b"x")
    assert names(store) == ["directory", "f"]


def test_a_file_that_must_not_be_replaced(store: Store) -> None:
    publish_bytes(store, "a/f", b"first", replace=False)
    with pytest.raises(FileExistsError):
        publish_bytes(store, "a/f", b"second", replace=False)
    assert (store.root / "a" / "f").read_bytes() == b"first"
    assert names(store) == ["f"]


def test_a_symlink_is_replaced_not_followed(store: Store, tmp_path_factory) -> None:
    victim = tmp_path_factory.mktemp("outside") / "victim"
    victim.write_bytes(b"mine")
    (store.root / "a" / "f").symlink_to(victim)
    publish_bytes(store, "a/f", b"new")
    assert victim.read_bytes() == b"mine"
    assert not (store.root / "a" / "f").is_symlink()


@pytest.mark.parametrize(("mode", "wanted"), [(0o640, 0o640), (0o4777, 0o666), (0o400, 0o400)])
def test_the_mode_is_that_of_another_file(store: Store, mode: int, wanted: int) -> None:
    other = store.root / "a" / "payload.md"
    other.write_bytes(b"x")
    other.chmod(mode)
    found = publish_bytes(store, "a/f", b"x", like=other.stat())
    assert stat.S_IMODE(found.st_mode) == wanted


def test_without_another_file_the_umask_counts(store: Store) -> None:
    before = os.umask(0o027)
    try:
        found = publish_bytes(store, "a/f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(found.st_mode) == 0o640


@needs_root
def test_the_owner_is_that_of_another_file(store: Store) -> None:
    other = store.root / "a" / "payload.md"
    other.write_bytes(b"x")
    os.chown(other, 4321, 1234)
    found = publish_bytes(store, "a/f", b"x", like=other.stat())
    assert (found.st_uid, found.st_gid) == (4321, 1234)


@needs_root
def test_a_group_that_cannot_be_given_gives_no_other_group_its_rights() -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from memfs.vault.store import Store; from memfs.vault.publish import publish_bytes\n"
        "store = Store.open(Path(sys.argv[1])); like = store.stat('a/payload.md')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(oct(publish_bytes(store, 'a/f', b'x', like=like).st_mode & 0o777))"
    )
    with tempfile.TemporaryDirectory() as root:  # pytest's own is closed to other users
        (Path(root) / "a").mkdir()
        other = Path(root) / "a" / "payload.md"
        other.write_bytes(b"x")
        other.chmod(0o660)
        os.chmod(root, 0o755)
        os.chmod(other.parent, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", code, root], capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == "0o600"


WRITER = """
import sys
from pathlib import Path
from memfs.vault.publish import publish_bytes
from memfs.vault.store import Store
store = Store.open(Path(sys.argv[1]))
for i in range(1, 1 << 20):
    publish_bytes(store, "a/f", b"%07d" % i * (1 << 15))
    if i == 1:
        print("going", flush=True)
"""


def test_a_writer_killed_at_any_instant_leaves_a_whole_file(store: Store) -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(memfs.__file__).parent.parent)}
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, store.root], stdout=subprocess.PIPE, env=environ
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
        data = (store.root / "a" / "f").read_bytes()
        assert len(data) == 7 << 15
        assert data == data[:7] * (1 << 15)
        for name in names(store):
            if layout.is_temporary(name):
                assert remove_leftover(store, f"a/{name}", time.time() + 1)
        assert names(store) == ["f"]


def test_only_leftovers_are_removed(store: Store) -> None:
    name = f"a/{layout.TEMPORARY}x"
    (store.root / name).write_bytes(b"x")
    young = (store.root / name).stat().st_mtime
    assert not remove_leftover(store, name, young)  # made after the mount
    with open(store.root / name, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not remove_leftover(store, name, young + 1)  # somebody writes it
    assert remove_leftover(store, name, young + 1)
    assert not remove_leftover(store, name, young + 1)
    (store.root / name).symlink_to("f")
    assert not remove_leftover(store, name, young + 100)
    assert (store.root / name).is_symlink()


def test_a_filesystem_without_hard_links(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "as FAT says it")

    monkeypatch.setattr(os, "link", link)
    publish_bytes(store, "a/f", b"first", replace=False)
    with pytest.raises(FileExistsError):
        publish_bytes(store, "a/f", b"second", replace=False)
    assert (store.root / "a" / "f").read_bytes() == b"first"
    assert names(store) == ["f"]


def test_the_files_own_attributes_stay_and_no_others(store: Store) -> None:
    publish_bytes(store, "a/file", b"1")
    own = {"user.note": b"mine", "user.empty": b"", "user.big": bytes(900)}
    for name, value in own.items():
        os.setxattr(store.root / "a/file", name, value)
    os.setxattr(store.root / "a/file", "user.memfs.id", b"of somewhere else")
    publish_bytes(store, "a/file", b"2")
    publish_bytes(store, "a/other", b"3", like="a/file")
    found = os.listxattr(store.root / "a/file")
    assert {name: os.getxattr(store.root / "a/file", name) for name in found} == own
    assert os.listxattr(store.root / "a/other") == []
