"""Mounting and unmounting: the command, its refusals, dead mounts, what a crash leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfs.filesystem import registry

from ..conftest import needs
from .conftest import Mount, has_ended, memfs, mounted_at, needs_root, until


def test_the_command_makes_store_and_mountpoint(tmp_path: Path) -> None:
    done = memfs("mount", tmp_path / "store", tmp_path / "mem")
    assert done.stdout == f"{tmp_path}/store is mounted at {tmp_path}/mem\n"
    assert done.stderr == ""
    assert os.path.ismount(tmp_path / "mem")
    assert memfs("umount", tmp_path / "mem").stdout == ""
    assert not os.path.ismount(tmp_path / "mem")


def test_json(tmp_path: Path) -> None:
    record = json.loads(memfs("mount", "--json", tmp_path / "store", tmp_path / "mem").stdout)
    assert record["mountpoint"] == str(tmp_path / "mem")
    os.kill(record["pid"], 0)
    memfs("umount", "--json", tmp_path / "mem")


def test_relative_paths_and_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "a, b\\c\td é"
    odd.mkdir()
    command = [sys.executable, "-m", "memfs.cli.main"]
    subprocess.run([*command, "mount", "st,ore", "me m"], cwd=odd, check=True, capture_output=True)
    (odd / "me m/file").write_text("x")
    assert (odd / "st,ore/file").read_text() == "x"
    record, path = registry.find(odd / "me m/file") or (None, "")
    assert record is not None
    assert (record.store, path) == (str(odd / "st,ore"), "file")
    assert registry.find(odd / "st,ore/deep/path") == (record, "deep/path")
    assert registry.find(tmp_path) is None
    subprocess.run([*command, "umount", "me m"], cwd=odd, check=True, capture_output=True)


@pytest.mark.parametrize("how", ["fusermount3 -u", "umount", "SIGTERM", "SIGINT", "memfs umount"])
def test_every_way_to_end_it_is_clean(tmp_path: Path, how: str) -> None:
    if how == "umount" and os.geteuid() != 0:
        pytest.skip("needs root")
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
        until(mount.has_index)
        pid = mount.pid
        if how.startswith("SIG"):
            os.kill(pid, getattr(signal, how))
        elif how == "memfs umount":
            memfs("umount", mount.dir)
        else:
            subprocess.run([*how.split(), mount.dir], check=True)
        until(lambda: has_ended(pid))
        until(lambda: not os.path.ismount(mount.dir))
        mount.require_clean_log()
        assert not (mount.store / ".memfs/index/unclean").exists()
        mount.start()
        assert mount.meta("law")["descriptive"]["title"] == "law"


def test_the_foreground(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "memfs.cli.main",
        "mount",
        "-f",
        tmp_path / "s",
        tmp_path / "m",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: os.path.ismount(tmp_path / "m"))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert not os.path.ismount(tmp_path / "m")


def refused(*args: str | Path) -> str:
    done = memfs("mount", *args, check=False)
    assert done.returncode == 9, done
    assert done.stdout == ""
    return done.stderr


def test_what_cannot_be_mounted_says_why(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "full/inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert "not empty" in refused(tmp_path / "store", tmp_path / "full")
    assert "not a directory" in refused(tmp_path / "store", tmp_path / "file")
    assert "not a directory" in refused(tmp_path / "file", tmp_path / "mem")
    assert "in one another" in refused(tmp_path / "store", tmp_path / "store/mem")
    assert "not empty" in refused(tmp_path / "store", tmp_path / "store")
    assert "No such file" in refused(tmp_path / "no/where", tmp_path / "mem")
    assert "No such file" in refused(tmp_path / "store", tmp_path / "no/where")
    assert "libfuse" in refused("-o", "nonsense", tmp_path / "store", tmp_path / "mem")
    assert not os.path.ismount(tmp_path / "mem")


def test_wrong_options_are_wrong_usage(tmp_path: Path) -> None:
    for option in ("fsname=x", "mount_on_read", "mount_on_read=perhaps", "A=b"):
        done = memfs("mount", "-o", option, tmp_path / "s", tmp_path / "m", check=False)
        assert done.returncode == 7, option
    assert not (tmp_path / "s").exists()


def test_a_store_is_mounted_once(mount: Mount, tmp_path: Path) -> None:
    assert f"is mounted at {mount.dir}" in refused(mount.store, tmp_path / "other")
    assert "is mounted at" in refused(tmp_path / "other_store", mount.dir)
    assert "lies in a mount" in refused(mount.dir / "inside", tmp_path / "other")
    os.symlink(mount.store, tmp_path / "way")
    assert f"is mounted at {mount.dir}" in refused(tmp_path / "way", tmp_path / "other")


def test_a_dead_mount_is_cleared(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    mount.start()
    mount.cube("law")
    pid = mount.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid))
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.listdir(mount.dir)
    assert [r for r in registry.running() if r.mountpoint == str(mount.dir)] == []
    mount.start()
    assert mount.meta("law")["descriptive"]["title"] == "law"
    os.kill(mount.pid, signal.SIGKILL)
    until(lambda: registry.at(mount.dir).alive is False)  # type: ignore[union-attr]
    memfs("umount", mount.dir)
    assert not os.path.ismount(mount.dir)


def test_a_crash_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    mount.start()
    cube = mount.cube("law")
    opened = (cube / "kv.safetensors").open("wb")
    opened.write(b"half of it")
    opened.flush()
    kept = (cube / "notes").open("w")
    (cube / "notes").unlink()
    assert any(name.startswith(".memfs-tmp-") for name in os.listdir(mount.store / "law"))
    assert os.listdir(mount.store / ".memfs/unlinked")
    os.kill(mount.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"not connected|abort"):
        opened.close()
    kept.close()  # of an ordinary file no close is told of
    mount.start()
    assert os.listdir(mount.store / ".memfs/unlinked") == []
    until(lambda: sorted(os.listdir(mount.store / "law")) == ["meta.json", "payload.md"])
    mount.stop()


def test_a_mount_in_use_says_by_whom(mount: Mount) -> None:
    mount.cube("law")
    with (mount.dir / "law/payload.md").open():
        done = memfs("umount", mount.dir, check=False)
        assert done.returncode == 9
        assert f"({os.getpid()})" in done.stderr
    done = memfs("umount", mount.store, check=False)
    assert (done.returncode, "no mount of memfs" in done.stderr) == (9, True)


@needs_root
@needs("unshare")
def test_a_mount_that_another_namespace_holds_says_whose(tmp_path: Path) -> None:
    """A container, or a service with mounts of its own, that began while it was mounted."""
    with mounted_at(tmp_path) as mount:
        pid = mount.pid
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read wait"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            done = memfs("umount", mount.dir, check=False)
            assert done.returncode == 9
            assert "another mount namespace" in done.stderr
            assert f"({holder.pid})" in done.stderr
            assert not has_ended(pid)
            holder.communicate()
        until(lambda: has_ended(pid))


@pytest.mark.parametrize("damage", ["missing", "zeros", "cut", "no directory"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        mount.cube("law", "Text.\n")
        wanted = mount.meta("law")["descriptive"]["id"]
    index = mount.store / ".memfs/index"
    data = index / "data.mdb"
    if damage == "missing":
        shutil.rmtree(index)
    elif damage == "zeros":
        data.write_bytes(bytes(data.stat().st_size))
    elif damage == "cut":
        os.truncate(data, 5000)
    else:
        shutil.rmtree(index)
        index.write_text("not a directory")
    with mounted_at(tmp_path) as mount:
        assert mount.meta("law")["descriptive"]["id"] == wanted
        until(lambda: mount.status()["index"]["cubes"] == 1)
        assert mount.status()["index"]["reason"] is None


def test_what_was_changed_while_it_was_not_mounted(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        for name in ("changed", "gone", "kept"):
            mount.cube(name, "Text.\n")
    (mount.store / "changed/payload.md").write_text("Other.\n")
    shutil.rmtree(mount.store / "gone")
    (mount.store / "new").mkdir()
    (mount.store / "new/payload.md").write_text("x")
    with mounted_at(tmp_path) as mount:
        assert mount.meta("changed")["state"]["payload"]["bytes"] == 7
        until((mount.dir / "new/meta.json").exists)
        until(lambda: mount.status()["index"]["cubes"] == 3)


def test_it_can_be_read_only(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
    with mounted_at(tmp_path, "-o", "ro") as mount:
        assert mount.meta("law")["descriptive"]["title"] == "law"
        with pytest.raises(OSError, match="Read-only"):
            (mount.dir / "law/payload.md").write_text("x")


@needs_root
def test_a_store_on_a_read_only_filesystem(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
    subprocess.run(["mount", "--bind", mount.store, mount.store], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", mount.store], check=True)
    try:
        with mounted_at(tmp_path) as mount:
            assert mount.meta("law")["descriptive"]["title"] == "law"
            until(lambda: mount.status()["index"]["cubes"] == 1)
            with pytest.raises(OSError, match="Read-only"):
                (mount.dir / "law/payload.md").write_text("x")
    finally:
        subprocess.run(["umount", mount.store], check=True)


def test_the_mount_process_has_no_torch_and_comes_up_at_once(tmp_path: Path) -> None:
    memfs("--version")  # compiles what has to be
    start = time.monotonic()
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
        assert time.monotonic() - start < 5  # 0.3 s, where nothing else runs
        until(mount.has_index)
        maps = Path(f"/proc/{mount.pid}/maps").read_text()
        assert "libfuse3" in maps
        assert "torch" not in maps


def test_the_control_tree(mount: Mount) -> None:
    mount.cube("law")
    control = mount.dir / ".memfs"
    assert ".memfs" not in os.listdir(mount.dir)
    names = ["at", "control", "deleted", "events", "mounted", "status", "status.json"]
    assert sorted(os.listdir(control)) == names
    assert "1 cube\n" in (control / "status").read_text()
    status = json.loads((control / "status.json").read_text())
    assert status["store"] == str(mount.store)
    assert status["mounted"] == []
    assert {"model", "device", "budget_bytes"} <= status.keys()
    assert (control / "status").stat().st_size == len((control / "status").read_bytes())
    (event,) = map(json.loads, (control / "events").read_text().splitlines())
    assert (event["event"], event["path"], event["uid"]) == ("created", "law", os.getuid())
    assert os.listdir(control / "mounted") == []
    assert stat.S_IMODE((control / "control").stat().st_mode) == 0o200
    for name in ("status", "control", "new"):
        with pytest.raises(OSError, match=r"denied|permitted"):
            (control / name).unlink() if name != "new" else (control / name).write_text("x")
    for name in ("status", "missing"):
        with pytest.raises(OSError, match=r"denied|No such"):
            (control / name).open("r+" if name == "status" else "r")
    with pytest.raises(PermissionError):
        os.rename(mount.dir / "law", control / "law")
    with pytest.raises(FileExistsError):
        control.mkdir()
    with pytest.raises(PermissionError):
        (mount.dir / ".memfs-tmp-mine").touch()
    with pytest.raises(OSError, match="permitted"):
        control.chmod(0o777)
    assert os.listxattr(control) == []


def test_words_for_the_control_file(mount: Mount) -> None:
    mount.cube("law")
    shutil.rmtree(mount.store / ".memfs/index/", ignore_errors=True)
    for word in ("rescan", "rebuild", "rebuild\nrescan"):
        (mount.dir / ".memfs/control").write_text(f"{word}\n")
    until(lambda: mount.status()["index"] == {"cubes": 1, "reason": None})
    with pytest.raises(OSError, match="Invalid"):
        (mount.dir / ".memfs/control").write_text("format")
    with pytest.raises(OSError, match="Invalid"):
        (mount.dir / ".memfs/control").write_text("x" * 100)


def test_usage_outlives_the_index(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        cube = mount.cube("law", "Text.\n")
        (cube / "kv.safetensors").write_bytes(b"anything " * 1000)
        (cube / "kv.safetensors").read_bytes()
        assert mount.meta("law")["behavioural"]["reads"] == 1
        assert os.getxattr(cube, "user.memfs.reads") == b"1"
    shutil.rmtree(mount.store / ".memfs")
    with mounted_at(tmp_path) as mount:
        assert mount.meta("law")["behavioural"]["reads"] == 1
        until(mount.has_index)
        until(lambda: mount.meta("law")["behavioural"]["reads"] == 1)
