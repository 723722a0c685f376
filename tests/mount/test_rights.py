"""Owner, group, mode and access list are one truth, held by the kernel for real other users."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import Mount, mounted_at, until
from tests.users import as_user, needs_root, open_way

pytestmark = needs_root

ANN, BEN, CAT, STAFF = 70001, 70002, 70003, 70010


@pytest.fixture(scope="module")
def open_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount that every user may enter and make cubes in."""
    root = tmp_path_factory.mktemp("open")
    open_way(root)
    with mounted_at(root) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o1777)
        yield mount


@pytest.fixture
def cube(open_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """Ann's cube, which nobody but her may read."""
    cube = open_mount.dir / request.node.name.replace("/", "-")

    def make() -> None:
        cube.mkdir(0o755)
        (cube / "payload.md").write_text("Ann's.\n")
        (cube / "kv.safetensors").write_bytes(b"her kv " * 100)
        (cube / "adapter").mkdir(0o755)
        (cube / "adapter/adapter_model.safetensors").write_bytes(b"her adapter")
        (cube / "payload.md").chmod(0o600)

    as_user(ANN, make)
    return cube


FILES = ["payload.md", "kv.safetensors", "meta.json", "adapter/adapter_model.safetensors"]


def may_read(uid: int, file: Path, **ids: Any) -> bool:
    return _may(lambda: file.open("rb").close(), uid, **ids)


def may_write(uid: int, file: Path, **ids: Any) -> bool:
    return _may(lambda: os.close(os.open(file, os.O_WRONLY)), uid, **ids)


def _may(body: Callable[[], object], uid: int, **ids: Any) -> bool:
    try:
        as_user(uid, body, **ids)
    except PermissionError as e:
        assert e.errno == errno.EACCES
        return False
    return True


def access(cube: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((cube / "meta.json").read_text())["governance"]
    return found["access"]


def set_access(cube: Path, *entries: tuple[str, str], uid: int = ANN) -> None:
    """Saves the header with this access list, as a user."""

    def save() -> None:
        meta = json.loads((cube / "meta.json").read_text())
        meta["governance"]["access"] = [
            {"who": who, "rights": rights.split()} for who, rights in entries
        ]
        (cube / "meta.json").write_text(json.dumps(meta))

    as_user(uid, save)


@pytest.mark.parametrize("name", FILES)
def test_what_holds_for_the_text_holds_for_all_of_it(cube: Path, name: str) -> None:
    file = cube / name
    assert may_read(ANN, file)
    assert not may_read(BEN, file)
    assert not may_write(BEN, file)
    as_user(ANN, lambda: (cube / "payload.md").chmod(0o640))
    os.chown(cube / "payload.md", -1, STAFF)
    assert may_read(BEN, file, groups=[STAFF])
    assert not may_read(BEN, file)
    assert not may_write(BEN, file, groups=[STAFF])
    os.chown(cube / "payload.md", BEN, -1)
    assert may_write(BEN, file)
    assert not may_read(ANN, file)
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (BEN, STAFF, 0o640)


def test_a_header_and_a_kv_cache_that_are_replaced_keep_their_rights(cube: Path) -> None:
    set_access(cube, (f"user:{BEN}", "read"))
    set_access(cube, (f"user:{BEN}", "read"), (f"user:{CAT}", "read write"))
    as_user(ANN, lambda: (cube / "kv.safetensors").write_bytes(b"another"))
    for name in FILES:
        assert may_read(BEN, cube / name), name
        assert not may_write(BEN, cube / name), name
        assert may_write(CAT, cube / name), name
        assert not may_read(70009, cube / name), name


def test_setfacl_and_the_header_are_one(cube: Path) -> None:
    text = cube / "payload.md"
    assert access(cube) == []
    as_user(ANN, lambda: subprocess.run(["setfacl", "-m", f"u:{BEN}:r", text], check=True))
    assert access(cube) == [{"who": f"user:{BEN}", "rights": ["read"]}]
    assert may_read(BEN, text)
    set_access(cube, (f"user:{BEN}", "read write"), (f"group:{STAFF}", "read"))
    said = subprocess.run(
        ["getfacl", "-cn", text], capture_output=True, text=True, check=True
    ).stdout
    assert f"user:{BEN}:rw-" in said
    assert f"group:{STAFF}:r--" in said
    assert stat.S_IMODE(text.stat().st_mode) == 0o660, "the mask, as ls -l shows it"
    assert may_write(BEN, text)
    assert may_read(CAT, text, groups=[STAFF])
    assert not may_write(CAT, text, groups=[STAFF])
    as_user(ANN, lambda: text.chmod(0o600))  # takes it from all but the owner
    assert access(cube) == []
    assert not may_read(BEN, text)
    assert not may_read(BEN, cube / "kv.safetensors")
    as_user(ANN, lambda: text.chmod(0o640))
    assert access(cube)[0] == {"who": f"user:{BEN}", "rights": ["read"]}
    set_access(cube)
    assert "user:7" not in subprocess.run(
        ["getfacl", "-cn", text], capture_output=True, text=True, check=True
    ).stdout.replace("user::", "")
    assert not may_read(BEN, text)


def test_whoever_is_named_finds_the_way_in(cube: Path) -> None:
    as_user(ANN, lambda: cube.chmod(0o700))
    assert not may_read(BEN, cube / "payload.md")
    set_access(cube, (f"user:{BEN}", "read"))
    assert may_read(BEN, cube / "payload.md")
    assert not may_read(CAT, cube / "payload.md")
    assert as_user(BEN, lambda: sorted(os.listdir(cube)))[0] == "adapter"
    with pytest.raises(PermissionError):
        as_user(BEN, (cube / "new").touch)
    set_access(cube)
    with pytest.raises(PermissionError):
        as_user(BEN, lambda: os.listdir(cube))


def test_a_kv_cache_that_could_be_made_is_shown_to_who_may_read(open_mount: Mount) -> None:
    cube = open_mount.dir / "promised"

    def make() -> None:
        cube.mkdir(0o755)
        (cube / "payload.md").write_text("Ann's.\n")
        (cube / "payload.md").chmod(0o600)

    as_user(ANN, make)
    set_access(cube, (f"user:{BEN}", "read"))
    assert not may_read(CAT, cube / "kv.safetensors")
    with pytest.raises(BlockingIOError):  # it may be read, and has to be waited for
        as_user(BEN, lambda: os.open(cube / "kv.safetensors", os.O_RDONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    ("who", "rights"),
    [
        ("user:no such user", "read"),
        ("group:no such group", "mount"),
        ("context:agent.service", "read"),
    ],
)
def test_an_entry_that_cannot_take_effect_is_refused(cube: Path, who: str, rights: str) -> None:
    with pytest.raises(OSError, match="Invalid"):
        set_access(cube, (who, rights))
    assert access(cube) == []


def test_only_the_owner_gives_rights(cube: Path) -> None:
    set_access(cube, (f"user:{BEN}", "read write mount"))
    before = access(cube)
    for entries in (
        [(f"user:{BEN}", "read write mount"), (f"user:{CAT}", "read")],
        [(f"user:{BEN}", "read write mount promote")],
        [],
    ):
        with pytest.raises(PermissionError):
            set_access(cube, *entries, uid=BEN)
    with pytest.raises(subprocess.CalledProcessError):
        as_user(
            BEN,
            lambda: subprocess.run(
                ["setfacl", "-m", f"u:{CAT}:r", cube / "payload.md"],
                check=True,
                capture_output=True,
            ),
        )
    assert access(cube) == before

    def title() -> None:
        meta = json.loads((cube / "meta.json").read_text())
        meta["descriptive"]["title"] = "Ben's word"
        (cube / "meta.json").write_text(json.dumps(meta))

    as_user(BEN, title)  # what is no right he may write
    assert access(cube) == before


def test_a_header_from_elsewhere_gives_nobody_anything(cube: Path, open_mount: Mount) -> None:
    set_access(cube, (f"user:{BEN}", "read"))
    copy = open_mount.dir / "copy-of-it"
    as_user(ANN, lambda: shutil.copytree(cube, copy, copy_function=shutil.copyfile))
    as_user(ANN, lambda: (copy / "payload.md").chmod(0o600))
    assert access(copy) == []
    assert not may_read(BEN, copy / "payload.md")
    as_user(ANN, lambda: subprocess.run(["cp", "-a", cube, f"{copy}2"], check=True))
    assert access(Path(f"{copy}2")) == access(cube)
    assert may_read(BEN, Path(f"{copy}2") / "payload.md")


def test_the_trail_tells_of_rights(cube: Path, open_mount: Mount) -> None:
    set_access(cube, (f"user:{BEN}", "read"))
    text = (open_mount.dir / ".memfs/events").read_text()
    events = [e for e in map(json.loads, text.splitlines()) if e.get("path") == cube.name]
    (event,) = [e for e in events if e["event"] == "access"]
    assert (event["before"], event["after"]) == ([], [f"user:{BEN} read"])
    assert event["uid"] == ANN


def denials(mount: Mount, cube: Path) -> list[tuple[int, str, str]]:
    """Who was denied what, and by which file, as the trail has it."""
    text = (mount.dir / ".memfs/events").read_text()
    return [
        (e["uid"], e["right"], e["file"].removeprefix(cube.name).strip("/"))
        for e in map(json.loads, text.splitlines())
        if e["event"] == "denied" and e["path"] == cube.name
    ]


def test_the_trail_tells_of_what_the_kernel_refused(cube: Path, open_mount: Mount) -> None:
    text, kv = cube / "payload.md", cube / "kv.safetensors"
    assert not may_read(BEN, text)
    assert denials(open_mount, cube) == [(BEN, "read", "payload.md")]
    assert not may_write(CAT, kv)
    assert denials(open_mount, cube)[1:] == [(CAT, "write", "kv.safetensors")]
    # Looking is not denied, nor is what a list or a group lets in.
    as_user(70004, lambda: [file.stat().st_size for file in (text, kv)])
    set_access(cube, (f"user:{BEN}", "read"), (f"group:{STAFF}", "read"))
    assert may_read(BEN, text)
    assert may_read(70004, text, groups=[STAFF])
    assert len(denials(open_mount, cube)) == 2
    as_user(ANN, lambda: cube.chmod(0o700))
    set_access(cube)
    assert not may_read(70005, text)
    assert denials(open_mount, cube)[2:] == [(70005, "read", "")]
