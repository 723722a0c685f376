"""Commands of other users on root's mount of a store that they could not walk to."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.cli import main as cli
from tests.mount.conftest import Mount, mounted_at, until
from tests.users import as_user, needs_root

pytestmark = needs_root

BEN = 70002


@pytest.fixture
def mount(public: Path) -> Iterator[Mount]:
    """Its mountpoint is open to everybody, and the store lies in a home that is not."""
    home = public / "home"
    home.mkdir(0o700)
    (public / "store").symlink_to(home / "store")
    (home / "store").mkdir()
    with mounted_at(public) as mount:
        until(mount.has_index)
        mount.cube("law")
        yield mount


def memfs_as_ben(public: Path, *args: str) -> tuple[int, str]:
    """Exit status, and what was printed."""

    def run() -> tuple[int, str]:
        os.environ["XDG_RUNTIME_DIR"] = str(public)
        os.chdir("/")
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            status = cli.main([*args])
        return status, out.getvalue() + said.getvalue()

    return as_user(BEN, run)


def test_a_cube_is_found_through_the_mount(mount: Mount, public: Path) -> None:
    # Root's first, which loads what the interpreter may have where others cannot read it.
    assert cli.main(["dump", str(mount.dir / "law"), "-o", "/dev/null"]) == 0
    for name in (str(mount.dir / "law"), str(mount.dir / "law/payload.md"), "law"):
        status, said = memfs_as_ben(public, "dump", name, "-o", "/dev/null")
        assert (status, "1 cube" in said) == (0, True), said
    status, said = memfs_as_ben(public, "dump", str(mount.dir / "none"), "-o", "/dev/null")
    assert status == 3
    assert "none" in said


def test_the_log_is_the_mounts(mount: Mount, public: Path) -> None:
    (mount.dir / "law/payload.md").chmod(0o600)
    with pytest.raises(PermissionError):
        as_user(BEN, (mount.dir / "law/payload.md").read_bytes)

    assert cli.main(["log", str(mount.dir), "--verify"]) == 0
    codecs.lookup("ascii")  # loaded, as above

    def told() -> list[dict[str, object]]:
        status, out = memfs_as_ben(public, "log", str(mount.dir), "--json")
        assert status == 0, out
        found: list[dict[str, object]] = json.loads(out)["events"]
        return found

    assert {(event["event"], event["uid"]) for event in until(told)} == {("denied", BEN)}
    status, said = memfs_as_ben(public, "log", str(mount.dir), "--verify")
    assert status == 8
    assert "owner" in said
