"""Cubes that are copied, moved and unpacked, by the programs that people use for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.cube import metadata

from .conftest import Mount, until
from .kvmaker import kv_file

TEXT = b"A text that came from elsewhere.\n"
FILES = ("payload.md", "kv.safetensors", "meta.json", "notes.txt")


@pytest.fixture(params=[FILES, FILES[::-1], ("meta.json", "payload.md", "kv.safetensors")])
def outside(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A cube from another machine; its files in several orders, as a directory lists them."""
    cube = tmp_path / "outside"
    cube.mkdir()
    meta = metadata.new(title="Outside")
    meta["behavioural"] |= {"reads": 7, "last_used": "2020-01-02T03:04:05Z"}
    contents = {
        "payload.md": TEXT,
        "kv.safetensors": kv_file(TEXT),
        "meta.json": metadata.render(meta),
        "notes.txt": b"more",
    }
    for name in request.param:
        (cube / name).write_bytes(contents[name])
        os.utime(cube / name, (10**9, 10**9 + len(name)))
    return cube


def in_order(source: Path, target: Path, names: list[str]) -> None:
    """Copies as ``cp`` does into a new directory: each file is made exclusively."""
    target.mkdir()
    for name in names:
        fd = os.open(target / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, (source / name).read_bytes())
        os.utime(fd, (10**9, 10**9))
        os.close(fd)


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


COPIERS: dict[str, Callable[[Path, Path], None]] = {
    "cp -a": lambda source, target: run("cp", "-a", source, target),
    "cp -r": lambda source, target: run("cp", "-r", source, target),
    "mv": lambda source, target: run("mv", source, target),
    "rsync -a": lambda source, target: run("rsync", "-a", f"{source}/", f"{target}/"),
    "rsync -aX": lambda source, target: run("rsync", "-aX", f"{source}/", f"{target}/"),
    "tar": lambda source, target: run(
        "sh", "-c", f"mkdir {target} && tar -C {source} -cf - . | tar -C {target} -xf -"
    ),
    "tar --xattrs": lambda source, target: run(
        "sh",
        "-c",
        f"mkdir {target} && tar -C {source} --xattrs --xattrs-include=* -cf - . |"
        f"tar -C {target} --xattrs --xattrs-include=* -xf -",
    ),
    "shutil.copytree": shutil.copytree,
    "in order": lambda source, target: in_order(source, target, sorted(os.listdir(source))),
    "in reverse": lambda source, target: in_order(
        source, target, sorted(os.listdir(source), reverse=True)
    ),
}


@pytest.mark.parametrize("copier", COPIERS)
def test_a_cube_from_elsewhere_arrives_whole(mount: Mount, outside: Path, copier: str) -> None:
    if copier.startswith("rsync") and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    given = json.loads((outside / "meta.json").read_text())
    contents = {f.name: f.read_bytes() for f in outside.iterdir() if f.name != "meta.json"}
    times = {f.name: f.stat().st_mtime for f in outside.iterdir()}
    target = mount.dir / "arrived"
    COPIERS[copier](outside, target)
    meta = mount.meta("arrived")  # first: reading the KV cache counts
    assert sorted(os.listdir(target)) == sorted([*contents, "meta.json"])
    for name, content in contents.items():
        assert (target / name).read_bytes() == content
    assert meta["descriptive"] == given["descriptive"]
    assert meta["behavioural"]["reads"] == 7
    assert meta["behavioural"]["last_used"] == "2020-01-02T03:04:05Z"
    assert meta["state"]["kv"]["state"] == "unchecked"
    assert meta["state"]["kv"]["tokens"] == 8
    if copier in ("cp -a", "mv", "rsync -a", "tar", "tar --xattrs"):
        for name, when in times.items():
            assert (target / name).stat().st_mtime == when, name
    assert not (target / "meta.json.rejected").exists()
    leftovers = [name for name in os.listdir(mount.store / "arrived") if name.startswith(".memfs")]
    assert leftovers == []


@pytest.mark.parametrize("copier", [name for name in COPIERS if name != "mv"])
def test_a_copy_within_the_mount_has_its_own_id(mount: Mount, copier: str) -> None:
    if copier.startswith("rsync") and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    cube = mount.cube("one", TEXT.decode())
    (cube / "kv.safetensors").write_bytes(kv_file(TEXT))
    COPIERS[copier](cube, mount.dir / "two")
    one, two = mount.meta("one")["descriptive"], mount.meta("two")["descriptive"]
    assert one["id"] != two["id"]
    assert two["origin"]["copied_from"] == one["id"]
    assert one["origin"]["copied_from"] is None
    assert (mount.dir / "two/kv.safetensors").read_bytes() == kv_file(TEXT)


def test_a_copy_made_beside_the_mount_has_its_own_id(mount: Mount) -> None:
    cube = mount.cube("one")
    run("cp", "-a", mount.store / "one", mount.store / "two")
    until(lambda: mount.meta("two")["descriptive"]["origin"]["copied_from"])
    assert mount.meta("two")["descriptive"]["id"] != mount.meta("one")["descriptive"]["id"]
    assert cube.exists()


def test_a_cube_made_beside_the_mount_is_indexed(mount: Mount) -> None:
    (mount.store / "deep/er").mkdir(parents=True)
    (mount.store / "deep/er/payload.md").write_text("x")
    until(lambda: mount.status()["index"]["cubes"] == 1)
    until((mount.dir / "deep/er/meta.json").exists)
    shutil.rmtree(mount.store / "deep")
    until(lambda: mount.status()["index"]["cubes"] == 0)


def test_copying_a_cube_out_takes_its_live_header(mount: Mount, tmp_path: Path) -> None:
    cube = mount.cube("one", TEXT.decode())
    (cube / "kv.safetensors").write_bytes(kv_file(TEXT))
    run("cp", "-a", cube, tmp_path / "out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["state"]["kv"]["tokens"] == 8
    assert (tmp_path / "out/kv.safetensors").read_bytes() == kv_file(TEXT)


def test_the_same_cube_synced_twice_is_one_cube(mount: Mount, outside: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    target = mount.dir / "arrived"
    run("rsync", "-a", f"{outside}/", f"{target}/")
    first = mount.meta("arrived")["descriptive"]
    (outside / "payload.md").write_text("A newer text.\n")
    run("rsync", "-a", f"{outside}/", f"{target}/")
    assert mount.meta("arrived")["descriptive"] == first
    assert mount.meta("arrived")["state"]["kv"]["state"] == "stale"
