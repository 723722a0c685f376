"""KV caches and adapters as files: published whole, checked, never changed in place."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from .conftest import Mount, until
from .kvmaker import kv_file

TEXT = "A text.\n"
KV = kv_file(TEXT.encode(), tokens=64)


@pytest.fixture
def cube(mount: Mount) -> Path:
    return mount.cube("law", TEXT)


@pytest.fixture
def kv(cube: Path) -> Path:
    (cube / "kv.safetensors").write_bytes(KV)
    return cube / "kv.safetensors"


def test_a_kv_cache_that_could_be_made_is_shown_but_not_listed(mount: Mount, cube: Path) -> None:
    found = (cube / "kv.safetensors").stat()
    assert found.st_size == 0
    assert os.listdir(cube) == ["meta.json", "payload.md"] or len(os.listdir(cube)) == 2
    assert "kv.safetensors" not in os.listdir(cube)
    (cube / "payload.md").write_text("")
    assert not (cube / "kv.safetensors").exists()
    assert not (mount.dir / "kv.safetensors").exists()


def test_without_a_runtime_it_cannot_be_opened(mount: Mount, cube: Path) -> None:
    with pytest.raises(OSError, match="unavailable") as raised:
        (cube / "kv.safetensors").read_bytes()
    assert raised.value.errno == errno.EAGAIN
    refusals = mount.status()["refusals"]
    assert refusals[0]["path"] == "law"
    assert "runtime" in refusals[0]["reason"]
    assert "law: no runtime" in (mount.dir / ".memfs/status").read_text()
    events = (mount.dir / ".memfs/events").read_text()
    assert '"refused"' in events


def test_what_can_only_be_made_cannot_be_changed_by_name(cube: Path) -> None:
    kv = cube / "kv.safetensors"
    with pytest.raises(FileNotFoundError):
        kv.unlink()
    with pytest.raises(FileNotFoundError):
        kv.rename(cube / "other")
    with pytest.raises(FileNotFoundError):
        kv.chmod(0o600)
    with pytest.raises(FileNotFoundError):
        os.truncate(kv, 0)
    with pytest.raises(BlockingIOError):
        os.open(kv, os.O_RDONLY | os.O_NONBLOCK)


def test_it_can_be_created_exclusively(cube: Path) -> None:
    fd = os.open(cube / "kv.safetensors", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(fd, KV)
    os.close(fd)
    with pytest.raises(FileExistsError):
        os.open(cube / "kv.safetensors", os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_a_written_one_is_read_listed_and_judged(mount: Mount, kv: Path) -> None:
    assert kv.read_bytes() == KV
    assert kv.stat().st_size == len(KV)
    assert sorted(os.listdir(kv.parent)) == ["kv.safetensors", "meta.json", "payload.md"]
    with os.scandir(kv.parent) as entries:
        inodes = {entry.name: entry.inode() for entry in entries}
    assert inodes["kv.safetensors"] == kv.stat().st_ino
    assert mount.meta("law")["state"]["kv"]["tokens"] == 64
    with safe_open(kv, "np") as opened:
        assert sorted(opened.keys()) == ["layers.000", "token_ids"]
        assert opened.get_tensor("token_ids").shape == (64,)
    with safe_open(kv, "np", backend="pread") as opened:
        assert opened.get_tensor("layers.000").shape == (2, 1, 64, 4)
    with kv.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        assert mapped[:] == KV


def test_damage_is_seen_when_it_is_closed(mount: Mount, kv: Path) -> None:
    damaged = bytearray(KV)
    damaged[-1] ^= 1
    kv.write_bytes(damaged)
    state = mount.meta("law")["state"]["kv"]
    assert state["state"] == "corrupt"
    assert "token_ids" in state["reason"], "which are last"
    kv.write_bytes(KV[:-5])
    assert mount.meta("law")["state"]["kv"]["state"] == "corrupt"
    assert kv.read_bytes() == KV[:-5]
    kv.write_bytes(KV)
    assert mount.meta("law")["state"]["kv"]["state"] == "unchecked"


def test_a_reader_keeps_the_file_it_opened(kv: Path) -> None:
    with kv.open("rb") as before:
        other = kv_file(b"other", tokens=96)
        kv.write_bytes(other)
        assert before.read() == KV
        assert kv.read_bytes() == other
        with kv.open("r+b") as changing:
            changing.seek(100)
            changing.write(b"!")
            assert kv.read_bytes()[100:101] in (other[100:101], b"!")
    assert kv.read_bytes() == other[:100] + b"!" + other[101:]


def test_nothing_shows_in_the_store_before_the_close(mount: Mount, cube: Path) -> None:
    file = (cube / "kv.safetensors").open("wb")
    file.write(KV[:1000])
    file.flush()
    assert not (mount.store / "law/kv.safetensors").exists()
    assert (cube / "kv.safetensors").stat().st_size == 1000
    assert "kv.safetensors" in os.listdir(cube)
    (cube / "payload.md").chmod(0o640)
    os.fchmod(file.fileno(), 0o604)  # what it holds is the text: its rights are the text's
    os.utime(file.fileno(), (5, 6))
    file.write(KV[1000:])
    file.close()
    found = (mount.store / "law/kv.safetensors").stat()
    assert (found.st_mode & 0o777, found.st_size) == (0o640, len(KV))
    assert (mount.store / "law/kv.safetensors").read_bytes() == KV


def test_removed_while_it_is_written_it_stays_away(mount: Mount, cube: Path) -> None:
    with (cube / "kv.safetensors").open("wb") as file:
        file.write(KV)
        file.flush()
        (cube / "kv.safetensors").unlink()
        assert os.fstat(file.fileno()).st_size == len(KV)
    until(lambda: sorted(os.listdir(mount.store / "law")) == ["meta.json", "payload.md"])


def test_renamed_while_it_is_written_it_arrives(mount: Mount, cube: Path) -> None:
    with (cube / "kv.safetensors").open("wb") as file:
        file.write(KV[:1000])
        file.flush()
        os.rename(cube, mount.dir / "moved")
        file.write(KV[1000:])
    assert (mount.dir / "moved/kv.safetensors").read_bytes() == KV
    assert not cube.exists()
    file = (mount.dir / "moved/kv.safetensors").open("wb")
    file.write(KV)
    file.flush()
    os.rename(mount.dir / "moved/kv.safetensors", mount.dir / "moved/kept")
    file.close()
    assert (mount.dir / "moved/kept").read_bytes() == KV


def test_two_writers_at_once(cube: Path) -> None:
    first = os.open(cube / "kv.safetensors", os.O_WRONLY | os.O_CREAT)
    second = os.open(cube / "kv.safetensors", os.O_RDWR)
    os.pwrite(first, KV[:500], 0)
    os.pwrite(second, KV[500:], 500)
    assert os.pread(second, 500, 0) == KV[:500]
    os.close(first)
    os.close(second)
    assert (cube / "kv.safetensors").read_bytes() == KV


def test_touching_and_truncating(kv: Path) -> None:
    before = kv.stat().st_ino
    subprocess.run(["touch", "-d", "@5", kv], check=True)
    assert (kv.stat().st_mtime, kv.stat().st_ino) == (5, before)
    os.truncate(kv, 100)
    assert kv.read_bytes() == KV[:100]
    assert kv.stat().st_ino != before
    with kv.open("ab") as file:
        file.write(b"+")
    assert kv.read_bytes() == KV[:100] + b"+"


def test_many_readers(kv: Path) -> None:
    wrong: list[int] = []

    def read() -> None:
        for _ in range(5):
            if kv.read_bytes() != KV:
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_adapter(mount: Mount, cube: Path, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    save_file({"a": np.zeros(100)}, source / "adapter_model.safetensors")
    shutil.copytree(source, cube / "adapter")
    assert mount.meta("law")["state"]["adapter"]["state"] == "unchecked"
    weights = cube / "adapter/adapter_model.safetensors"
    assert weights.read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    weights.write_bytes(b"broken")
    assert mount.meta("law")["state"]["adapter"]["state"] == "corrupt"
    shutil.rmtree(cube / "adapter")
    assert mount.meta("law")["state"]["adapter"]["state"] == "none"


def test_a_large_kv_cache_is_checked_behind_the_operations(mount: Mount, cube: Path) -> None:
    large = kv_file(TEXT.encode(), tokens=(40 << 20) // 32)
    (cube / "kv.safetensors").write_bytes(large)
    assert mount.meta("law")["state"]["kv"]["state"] == "unchecked"
    until(lambda: mount.meta("law")["state"]["kv"]["tokens"] == (40 << 20) // 32)
    assert os.getxattr(cube, "user.memfs.tokens") == str((40 << 20) // 32).encode()


def test_files_that_are_no_plain_files_do_not_matter(mount: Mount) -> None:
    for name in ("fifo", "link", "directory"):
        (mount.dir / name).mkdir()
    os.mkfifo(mount.dir / "fifo/payload.md")
    os.symlink("/etc/passwd", mount.dir / "link/payload.md")
    os.symlink("/etc/passwd", mount.dir / "link/kv.safetensors")
    (mount.dir / "directory/payload.md").mkdir()
    (mount.dir / "directory/kv.safetensors").mkdir()
    for name in ("fifo", "directory"):
        assert not (mount.dir / name / "kv.safetensors").is_file()
    (mount.dir / "fifo/meta.json").unlink()
    os.mkfifo(mount.dir / "fifo/meta.json")
    assert not (mount.dir / "fifo/meta.json").is_file()
    assert os.readlink(mount.dir / "link/kv.safetensors") == "/etc/passwd"
    with pytest.raises(OSError, match="No data"):
        os.getxattr(mount.dir / "link", "user.memfs.payload_sha256")


def test_a_shell_writes_a_blob(mount: Mount, cube: Path, tmp_path: Path) -> None:
    (tmp_path / "kv").write_bytes(KV)
    subprocess.run(["sh", "-c", f"cat {tmp_path}/kv > {cube}/kv.safetensors"], check=True)
    assert (cube / "kv.safetensors").read_bytes() == KV
    assert mount.meta("law")["state"]["kv"]["tokens"] == 64
    subprocess.run(["sh", "-c", f": > {cube}/kv.safetensors"], check=True)
    until(lambda: (mount.store / "law/kv.safetensors").stat().st_size == 0)
