"""In a directory that is everybody's, no name that a file is given opens it to anybody, now or in
the past: what a disk would let no other user read, root's mount reads for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import Mount, mounted_at, until
from tests.users import as_user, needs_root, open_way

pytestmark = needs_root

ANN, BEN, CAT = 70001, 70002, 70003
SECRET = "Ben's secret.\n"


@pytest.fixture(scope="module")
def open_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount that every user may enter."""
    root = tmp_path_factory.mktemp("everybodys")
    open_way(root)
    with mounted_at(root) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o777)
        yield mount


@pytest.fixture
def shared(open_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory in which everybody may rename everything, as it is not sticky."""
    directory = open_mount.dir / request.node.name.replace("/", "-")
    directory.mkdir()
    directory.chmod(0o777)
    return directory


def own(uid: int, path: Path, text: str = "Some text.\n", mode: int = 0o600) -> Path:
    """A user's own file, and its directories."""

    def make() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    as_user(uid, make)
    return path


def reads(uid: int, path: Path) -> str | None:
    """What a user reads there; None where he may not, or there is nothing."""
    try:
        return as_user(uid, path.read_text)
    except (PermissionError, FileNotFoundError):
        return None


def attributes(uid: int, path: Path) -> list[str]:
    found: list[str] = as_user(uid, lambda: os.listxattr(path))
    return found


PLACES = ["meta.json.rejected", "kv.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("place", [*PLACES, "adapter/adapter_model.safetensors", "payload.md"])
def test_anothers_file_stays_his_whatever_it_is_called(shared: Path, place: str) -> None:
    secret = own(BEN, shared / "secret.txt", SECRET)
    text = own(ANN, shared / "hers/payload.md", mode=0o644)
    target = shared / "hers" / place

    def steal() -> None:
        target.parent.mkdir(exist_ok=True)
        secret.rename(target)
        for mode in (0o600, 0o666):
            with contextlib.suppress(PermissionError):  # it is Ben's, where it is the text
                text.chmod(mode)

    as_user(ANN, steal)
    assert reads(ANN, target) is None
    assert reads(CAT, target) is None
    found = target.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (BEN, 0o600)
    assert reads(BEN, target) == SECRET


def test_nor_where_the_directory_becomes_a_cube_later(shared: Path) -> None:
    secret = own(BEN, shared / "secret.txt", SECRET)
    target = shared / "later/meta.json.rejected"

    def steal() -> None:
        target.parent.mkdir()
        secret.rename(target)
        (target.parent / "payload.md").write_text("Hers.\n")
        (target.parent / "payload.md").chmod(0o644)

    as_user(ANN, steal)
    assert reads(ANN, target) is None


def test_nor_in_his_own_cube(shared: Path) -> None:
    """The text is Ben's and public; his other file is not, though somebody calls it a cube's."""
    secret = own(BEN, shared / "secret.txt", SECRET)
    own(BEN, shared / "his/payload.md", mode=0o644)
    as_user(BEN, lambda: (shared / "his").chmod(0o777))
    target = shared / "his/kv.safetensors"
    as_user(ANN, lambda: secret.rename(target))
    assert reads(ANN, target) is None


@pytest.mark.parametrize("text", [SECRET, json.dumps({"memfs_version": 1})])
def test_anothers_file_becomes_no_header(shared: Path, text: str) -> None:
    """Not even a refused one, whose text would be kept for who wrote it."""
    secret = own(BEN, shared / "secret.txt", text)
    own(ANN, shared / "hers/payload.md")
    before = reads(ANN, shared / "hers/meta.json")
    with pytest.raises(PermissionError) as caught:
        as_user(ANN, lambda: secret.rename(shared / "hers/meta.json"))
    assert caught.value.errno == errno.EACCES
    assert not (shared / "hers/meta.json.rejected").exists()
    assert reads(ANN, shared / "hers/meta.json") == before
    assert reads(BEN, secret) == text


def test_ones_own_files_follow_as_before(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", mode=0o600).parent
    own(ANN, shared / "cache", "her kv", mode=0o644)
    as_user(ANN, lambda: (shared / "cache").rename(cube / "kv.safetensors"))
    assert reads(CAT, cube / "kv.safetensors") is None
    as_user(ANN, lambda: (cube / "payload.md").chmod(0o644))
    assert reads(CAT, cube / "kv.safetensors") == "her kv"
    os.chown(cube / "payload.md", BEN, -1)
    assert (cube / "kv.safetensors").stat().st_uid == BEN
    assert (cube / "meta.json").stat().st_uid == BEN


def test_attributes_tell_of_the_text_to_who_may_read_it(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", mode=0o600).parent
    told = {f"user.memfs.{name}" for name in ("id", "title", "payload_sha256")}
    for path in (cube, cube / "payload.md", cube / "meta.json"):
        assert told <= set(attributes(ANN, path))
        assert told <= set(os.listxattr(path))
        assert not [name for name in attributes(BEN, path) if "memfs" in name]
    for name in (*told, "user.memfs.reads", "user.memfs.mounted"):
        assert as_user(ANN, lambda name=name: os.getxattr(cube, name))
        with pytest.raises(OSError, match="No data") as caught:
            as_user(BEN, lambda name=name: os.getxattr(cube, name))
        assert caught.value.errno == errno.ENODATA
    as_user(ANN, lambda: (cube / "payload.md").chmod(0o644))
    assert told <= set(attributes(BEN, cube))


def test_trusted_attributes_are_listed_to_root_alone(shared: Path) -> None:
    file = own(ANN, shared / "file", mode=0o644)
    beside = shared.parents[1] / "store" / shared.name / "file"
    os.setxattr(beside, "trusted.secret", b"x")
    assert "trusted.secret" in os.listxattr(file)
    assert "trusted.secret" not in attributes(ANN, file)
    assert "trusted.secret" not in as_user(ANN, lambda: os.listxattr(beside)), "as on the disk"
