"""A store that cannot be written: mounted read-only by itself, and everything that reads works."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfs.config import Config
from memfs.runtime.client import RuntimeClient

from .conftest import Mount, memfs, mounted_at, needs_root, until

pytestmark = needs_root

USER = 65534
"""nobody: fusermount3 wants a user that has a name."""


@pytest.fixture
def filled(tmp_path: Path, ready: RuntimeClient, environment: dict[str, str]) -> Mount:
    """A store with a cube that has a KV cache and a past, and one that has neither; not mounted."""
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        cube = mount.cube("law", "The first law.\n")
        until(lambda: os.listdir(cube / ".versions"))
        (cube / "payload.md").write_text("The second law.\n")
        (cube / "kv.safetensors").read_bytes()
        mount.cube("bare", "Nothing but text.\n")
        until(lambda: len(os.listdir(cube / ".versions")) > 1)
    return mount


@pytest.fixture
def frozen_disk(filled: Mount) -> Iterator[Mount]:
    """The same on a read-only filesystem."""
    subprocess.run(["mount", "--bind", filled.store, filled.store], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", filled.store], check=True)
    yield filled
    subprocess.run(["umount", "--lazy", filled.store], check=True)


def options_of(mountpoint: Path) -> list[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        if fields[1] == str(mountpoint):
            return fields[3].split(",")
    raise AssertionError("it is not mounted")


def require_no_writes(mount: Mount) -> None:
    cube = mount.dir / "law"
    for write in (
        lambda: (cube / "payload.md").write_text("x"),
        lambda: (cube / "meta.json").write_text("{}"),
        lambda: (cube / "kv.safetensors").write_bytes(b"x"),
        (cube / "new").touch,
        (mount.dir / "new").mkdir,
        (cube / "payload.md").unlink,
        lambda: cube.rename(mount.dir / "other"),
        lambda: os.utime(cube / "payload.md"),
        lambda: os.setxattr(cube / "payload.md", "user.x", b"y"),
    ):
        with pytest.raises(OSError, match="Read-only"):
            write()


def from_json(*args: str | Path, **env: str) -> Any:
    return json.loads(memfs(*args, "--json", **env).stdout)


def test_a_read_only_disk(frozen_disk: Mount, config: Config, environment: dict[str, str]) -> None:
    mount = frozen_disk
    said = memfs("mount", mount.store, mount.dir, **environment).stdout
    assert said.endswith(f"mounted at {mount.dir}, read-only: the store cannot be written\n")
    try:
        assert "ro" in options_of(mount.dir)
        require_no_writes(mount)
        cube = mount.dir / "law"
        assert (cube / "payload.md").read_text() == "The second law.\n"
        until(lambda: mount.status()["index"]["cubes"] == 2)
        until(lambda: mount.meta("law")["state"]["kv"]["state"] == "ready")
        assert mount.meta("law")["descriptive"]["title"] == "law"
        (cube / "kv.safetensors").read_bytes()
        until(lambda: os.listdir(mount.dir / ".memfs/mounted") == ["law"])
        with pytest.raises(FileNotFoundError):  # it cannot be made here
            (mount.dir / "bare/kv.safetensors").read_bytes()
        first, *_ = sorted(os.listdir(cube / ".versions"))
        assert (cube / ".versions" / first / "payload.md").read_text() == "The first law.\n"
        assert from_json("attach", cube, **environment)[0]["cube"] == "law"
        for name, how in (("law", "kv"), ("bare", "text")):
            answer = from_json("ask", "-c", mount.dir / name, "Which law?", **environment)
            assert [part["how"] for part in answer["cubes"]] == [how]
        assert from_json("status", mount.dir, **environment)["mounts"][0]["store"] == str(
            mount.store
        )
        for place in (mount.dir, mount.store):
            assert [c["path"] for c in from_json("index", "find", place)] == ["bare", "law"]
            assert from_json("fsck", place)["problems"] == []
    finally:
        mount.stop()
    assert from_json("fsck", mount.store)["problems"] == []
    done = memfs("fsck", "--repair", mount.store, check=False)
    assert (done.returncode, "cannot be written" in done.stderr) == (8, True)


SCRIPT = """
mount --bind "$1/fuse" /dev/fuse
exec setpriv --reuid $2 --regid $2 --clear-groups \\
    --inh-caps +dac_read_search --ambient-caps +dac_read_search sh -ec '
memfs() { "$0" -m memfs.cli.main "$@"; }
memfs mount "$2" "$1/theirs"
grep " $1/theirs " /proc/self/mounts
cat "$1/theirs/law/payload.md"
memfs index find "$2"
memfs fsck "$2"
touch "$1/theirs/new" 2>&1 || true
memfs umount "$1/theirs"
' "$3" "$1" "$4"
"""
"""As a user who may read everything and write nothing of it, in a namespace in which everybody may
use FUSE."""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody may enter, as those of pytest are not."""
    place = Path(tempfile.mkdtemp(prefix="memfs-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.mark.skipif(
    not (shutil.which("setpriv") and shutil.which("unshare")), reason="needs setpriv and unshare"
)
def test_a_directory_that_belongs_to_somebody_else(filled: Mount, open_place: Path) -> None:
    for name in ("theirs", "run"):
        (open_place / name).mkdir(mode=0o700)
        os.chown(open_place / name, USER, USER)
    os.mknod(open_place / "fuse", 0o666 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    (open_place / "fuse").chmod(0o666)
    (filled.store / "law/payload.md").chmod(0o644)
    arguments = open_place, f"{USER}", sys.executable, filled.store
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", SCRIPT, "sh", *arguments],
        env=os.environ | {"XDG_RUNTIME_DIR": str(open_place / "run"), "MEMFS_AUTOSTART": "off"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    mounted, options, text, _, *cubes, checked, wrote = done.stdout.splitlines()
    assert mounted.endswith("read-only: the store cannot be written")
    assert "ro" in options.split()[3].split(",")
    assert text == "The second law."
    assert [line.split()[0] for line in cubes] == ["bare", "law"]
    assert checked == "2 cubes: nothing is wrong"
    assert "Read-only" in wrote
    assert sorted(os.listdir(filled.store)) == [".memfs", "bare", "law"]
