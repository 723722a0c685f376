"""What a program that flushes or closes is promised: whose close counts, and in which order things
reach the disk, as the kernel saw it (strace).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from memfs.config import Config
from memfs.errors import RuntimeUnavailable
from memfs.runtime.client import RuntimeClient, connect
from memfs.runtime.protocol import socket_path

from .conftest import Mount, has_ended, mounted_at, until
from .kvmaker import kv_file

CALLS = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,write,writev,pwrite64,sendfile"

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def kv(cube: Path) -> Path:
    return cube / "kv.safetensors"


def test_a_child_that_ends_does_not_publish_what_its_parent_has_half_written(mount: Mount) -> None:
    cube, whole = mount.cube("law"), kv_file(b"one")
    kv(cube).write_bytes(whole)
    with kv(cube).open("wb", buffering=0) as file:
        file.write(kv_file(b"two")[:100])
        subprocess.run(["true"], check=True)  # which closes its copy of the descriptor
        assert kv(mount.store / "law").read_bytes() == whole
        file.write(kv_file(b"two")[100:])
    assert kv(mount.store / "law").read_bytes() == kv_file(b"two")


def test_a_child_that_writes_publishes(mount: Mount) -> None:
    cube = mount.cube("law")
    with kv(cube).open("wb") as file:
        subprocess.run(["printf", "from a child"], stdout=file, check=True)
        assert kv(mount.store / "law").read_bytes() == b"from a child"
    assert kv(mount.store / "law").read_bytes() == b"from a child"


def killed(mount: Mount) -> None:
    pid = mount.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid))


@pytest.mark.parametrize("name", ["kv.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "half"])
def test_what_was_flushed_is_kept_where_it_is_whole(
    tmp_path: Path, name: str, *, whole: bool
) -> None:
    """What was flushed by half leaves what stood."""
    old, new = kv_file(b"one"), kv_file(b"two")
    with mounted_at(tmp_path) as mount:
        path = mount.cube("law") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(old)
        file = path.open("wb", buffering=0)
        file.write(new if whole else new[:-1])
        os.fsync(file.fileno())
        killed(mount)
        with pytest.raises(OSError, match=r"not connected|abort"):
            file.close()
        mount.start()
        assert path.read_bytes() == (new if whole else old)


def test_writing_goes_on_after_it_was_flushed_whole(mount: Mount) -> None:
    path = kv(mount.cube("law"))
    with path.open("wb", buffering=0) as file:
        file.write(kv_file(b"one"))
        os.fsync(file.fileno())
        assert kv(mount.store / "law").read_bytes() == kv_file(b"one")
        file.write(b"more")
        assert kv(mount.store / "law").read_bytes() == kv_file(b"one")
    assert kv(mount.store / "law").read_bytes() == kv_file(b"one") + b"more"


class Call(NamedTuple):
    """A system call: its name, the files it is about, and when it began and ended, in lines."""

    name: str
    files: tuple[str, ...]
    began: int
    ended: int


_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>")
_FILE = re.compile(r"\d+<([^>]*)>|\"([^\"]*)\"")


def parsed(log: str) -> list[Call]:
    """The calls in what ``strace -f -y`` wrote; a directory and a name make one path."""
    found: list[Call] = []
    unfinished: dict[tuple[str, str], Call] = {}
    for number, line in enumerate(log.splitlines()):
        if resumed := _RESUMED.match(line):
            call = unfinished.pop((resumed[1], resumed[2]))
            found.append(call._replace(ended=number))
        elif begun := _LINE.match(line):
            parts = [by_fd or by_name for by_fd, by_name in _FILE.findall(begun[3])]
            if begun[2].startswith(("rename", "link")) and len(parts) == 4:
                parts = ["/".join(parts[:2]), "/".join(parts[2:])]
            call = Call(begun[2], tuple(parts), number, number)
            if line.endswith("<unfinished ...>"):
                unfinished[begun[1], begun[2]] = call
            else:
                found.append(call)
    return sorted(found, key=lambda call: call.began)


@contextlib.contextmanager
def traced(pid: int, tmp_path: Path) -> Iterator[Callable[[], list[Call]]]:
    """Writes down the calls of a process while the block runs; then gives them."""
    log, said = tmp_path / "strace.log", tmp_path / "strace.said"
    command = ["strace", "-f", "-y", "-s0", "-p", str(pid), "-e", f"trace={CALLS}", "-o", log]
    with said.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as tracer:
        until(lambda: "attached" in said.read_text(), 30)
        try:
            yield lambda: parsed(log.read_text())
        finally:
            time.sleep(0.1)
            tracer.send_signal(signal.SIGINT)


def require_order(calls: list[Call], target: Path) -> None:
    """Written, flushed, renamed into place, its directory flushed; nothing written in between."""
    (rename,) = [c for c in calls if c.name.startswith("rename") and c.files[1] == str(target)]
    source = rename.files[0]
    (flushed, *_) = [c for c in calls if c.name == "fsync" and c.files == (source,)]
    written = [c for c in calls if "write" in c.name or c.name == "sendfile"]
    into_it = [c for c in written if c.files[0] == source and c.began < rename.began]
    assert into_it
    assert all(c.ended < flushed.began for c in into_it)
    assert flushed.ended < rename.began
    after = [c for c in calls if c.name == "fsync" and c.files == (str(target.parent),)]
    assert any(c.began > rename.ended for c in after)


@needs_strace
def test_a_header_and_a_copied_blob_are_flushed_before_they_are_put_in_place(
    mount: Mount, tmp_path: Path
) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["descriptive"]["title"] = "Another"
    with traced(mount.pid, tmp_path) as calls:
        (cube / "meta.json").write_text(json.dumps(meta))
        kv(cube).write_bytes(kv_file(b"x"))
    require_order(calls(), mount.store / "law/meta.json")
    require_order(calls(), kv(mount.store / "law"))


@needs_strace
def test_a_new_header_is_flushed_before_it_gets_its_name(mount: Mount, tmp_path: Path) -> None:
    with traced(mount.pid, tmp_path) as calls:
        mount.cube("law")
    (link,) = [c for c in calls() if c.name.startswith("link")]
    assert link.files[1] == str(mount.store / "law/meta.json")
    (flushed,) = [c for c in calls() if c.name == "fsync" and c.files == (link.files[0],)]
    assert flushed.ended < link.began
    assert any(
        c.began > link.ended and c.files == (str(mount.store / "law"),)
        for c in calls()
        if c.name == "fsync"
    )


@needs_strace
def test_a_new_index_is_flushed_before_it_is_put_in_place(mount: Mount, tmp_path: Path) -> None:
    mount.cube("law")
    with traced(mount.pid, tmp_path) as calls:
        (mount.dir / ".memfs/control").write_text("rebuild\n")  # returns when it is done
    index = str(mount.store / ".memfs/index")
    (rename,) = [c for c in calls() if c.name.startswith("rename") and c.files[1] == index]
    data = rename.files[0] + "/data.mdb"
    flushed = [c for c in calls() if c.name in ("fsync", "fdatasync") and c.files == (data,)]
    written = [c for c in calls() if "write" in c.name and c.files[0] == data]
    assert max(c.ended for c in written) < max(c.began for c in flushed)
    assert max(c.ended for c in flushed) < rename.began
    assert any(
        c.began > rename.ended and c.files == (str(mount.store / ".memfs"),)
        for c in calls()
        if c.name == "fsync"
    )


@needs_strace
def test_a_made_kv_cache_is_flushed_before_it_is_put_in_place(
    tmp_path: Path, config: Config, ready: RuntimeClient, environment: dict[str, str]
) -> None:
    pid = int(socket_path(config).with_suffix(".pid").read_text())
    with mounted_at(tmp_path, **environment) as mount:
        cube = mount.cube("law", "Some text to encode.\n")
        with traced(pid, tmp_path) as calls:
            kv(cube).read_bytes()
        require_order(calls(), kv(mount.store / "law"))


@needs_strace
def test_a_deleted_cube_is_flushed_before_it_is_put_in_place(tmp_path: Path) -> None:
    """Its files, its directories, and the collections that are made again on its way."""
    with mounted_at(tmp_path) as mount:
        cube = mount.cube("work/law")
        (cube / "adapter").mkdir()
        (cube / "adapter/adapter_config.json").write_text("{}")
        (cube / "adapter/adapter_model.safetensors").write_bytes(kv_file(b"x"))
        shutil.rmtree(mount.dir / "work")
    place, log = mount.store / "work/law", tmp_path / "strace.log"
    tracer = ["strace", "-f", "-y", "-s0", "-e", f"trace={CALLS}", "-o", log]
    command = [sys.executable, "-m", "memfs.cli.main", "restore", place]
    subprocess.run([*tracer, *command], check=True, capture_output=True)
    calls = parsed(log.read_text())
    (rename,) = [c for c in calls if c.name.startswith("rename") and c.files[1] == str(place)]
    flushed = {Path(c.files[0]) for c in calls if c.name == "fsync" and c.ended < rename.began}
    staged, files = Path(rename.files[0]), [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {staged / path.relative_to(place) for path in files} <= flushed
    assert {staged, staged / "adapter", mount.store} <= flushed
    after = [c for c in calls if c.name == "fsync" and c.began > rename.ended]
    assert any(c.files == (str(place.parent),) for c in after)


@contextlib.contextmanager
def killed_at(pid: int, call: str, tmp_path: Path) -> Iterator[None]:
    """Within it a process is killed as it enters a system call."""
    said = tmp_path / "strace.said"
    inject = f"inject={call}:signal=SIGKILL"
    command = ["strace", "-f", "-p", str(pid), "-e", f"trace={call}", "-e", inject]
    with (
        said.open("w") as stderr,
        subprocess.Popen([*command, "-o", os.devnull], stderr=stderr) as tracer,
    ):
        until(lambda: "attached" in said.read_text(), 30)
        yield
        until(lambda: has_ended(pid), 30)
        tracer.wait(10)


@needs_strace
@pytest.mark.parametrize(("call", "old"), [("fsync", None), ("renameat", "The old text.\n")])
def test_a_runtime_killed_as_it_publishes_leaves_the_old_file_or_none(
    tmp_path: Path, config: Config, environment: dict[str, str], call: str, old: str | None
) -> None:
    with connect(config, start=True) as client, mounted_at(tmp_path, **environment) as mount:
        client.call("ready", timeout=120)
        cube = mount.cube("law", old or "The new text.\n")
        before = kv(cube).read_bytes() if old else None
        named = {"store": str(mount.store), "path": "law"}
        if old:
            (cube / "payload.md").write_text("The new text.\n")
        pid = int(socket_path(config).with_suffix(".pid").read_text())
        with killed_at(pid, call, tmp_path), pytest.raises(RuntimeUnavailable):
            client.call("encode", timeout=60, **named)
        real = kv(mount.store / "law")
        assert (real.read_bytes() if real.exists() else None) == before
        with connect(config, start=True) as again:
            again.call("encode", timeout=120, **named)
        assert real.exists()
        assert real.read_bytes() != before


@needs_strace
@pytest.mark.parametrize("call", ["fsync", "renameat"])
@pytest.mark.parametrize("name", ["meta.json", "kv.safetensors"])
def test_a_mount_killed_as_it_publishes_leaves_the_old_file(
    tmp_path: Path, name: str, call: str
) -> None:
    with mounted_at(tmp_path) as mount:
        path = mount.cube("law") / name
        if name == "meta.json":
            until(mount.has_index)
            new = json.dumps(mount.meta("law") | {"mine": True}).encode()
        else:
            path.write_bytes(kv_file(b"old"))
            new = kv_file(b"new")
        before = (mount.store / "law" / name).read_bytes()
        with killed_at(mount.pid, call, tmp_path), pytest.raises(OSError, match=r"connect|abort"):
            path.write_bytes(new)
        assert (mount.store / "law" / name).read_bytes() == before
        mount.start()
        until(lambda: not list(mount.store.rglob(".memfs-tmp-*")))
        path.write_bytes(new)


def test_a_mount_that_is_killed_is_mounted_again_at_once(tmp_path: Path) -> None:
    """By the next command, while the old one's connection may not even be aborted yet."""
    with mounted_at(tmp_path) as mount:
        mount.cube("law", "The law.\n")
        for _ in range(4):
            with (mount.dir / "law/payload.md").open() as held:
                os.kill(mount.pid, signal.SIGKILL)
                mount.start()
                assert (mount.dir / "law/payload.md").read_text() == "The law.\n"
                with pytest.raises(OSError, match=r"not connected|abort"):
                    held.read()


@needs_strace
def test_flushing_through_the_mount_reaches_the_stores_file(mount: Mount, tmp_path: Path) -> None:
    """fsync, fdatasync, of a directory; and a write through O_SYNC or O_DSYNC before it returns."""
    path, real = mount.dir / "plain", str(mount.store / "plain")
    wanted = ("fsync", "fdatasync", "pwrite64")

    def flushes(do: Callable[[int], object], flags: int = 0) -> list[Call]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        try:
            with traced(mount.pid, tmp_path) as calls:
                do(fd)
        finally:
            os.close(fd)
        return [c for c in calls() if c.name in wanted and real in c.files]

    assert [(c.name, c.files) for c in flushes(os.fsync)] == [("fsync", (real,))]
    assert [(c.name, c.files) for c in flushes(os.fdatasync)] == [("fdatasync", (real,))]
    path.unlink()
    for flags, name in ((os.O_SYNC, "fsync"), (os.O_DSYNC, "fdatasync")):
        for _ in ("made", "there"):
            wrote, flushed = flushes(lambda fd: os.write(fd, b"x"), flags)
            assert (wrote.name, flushed.name) == ("pwrite64", name)
            assert wrote.files[0] == flushed.files[0] == real
        path.unlink()
    path = mount.dir
    with traced(mount.pid, tmp_path) as calls:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
    assert ("fsync", (str(mount.store),)) in [(c.name, c.files) for c in calls()]
