"""Waiting for a KV cache that is being made, and what must not wait for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from memfs.runtime.client import RuntimeClient

from .conftest import Mount, mounted_at, stopped, until
from .kvmaker import kv_file

TEXT = "The keeper of the light wrote down what the ships had passed, and when. " * 30


@pytest.fixture
def linked(tmp_path: Path, environment: dict[str, str], ready: RuntimeClient) -> Iterator[Mount]:
    """A mount that knows of the loaded model, with nothing in that."""
    ready.call("unmount")
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        until(lambda: mount.status()["runtime"] == "ready")
        yield mount


def in_the_model(mount: Mount) -> list[str]:
    return [line["cube"] for line in mount.status()["mounted"] if line["store"] == str(mount.store)]


def made(mount: Mount, name: str = "law", text: str = TEXT) -> Path:
    """A cube with a KV cache that is not in the model."""
    cube = mount.cube(name, text)
    fd = os.open(cube / "kv.safetensors", os.O_RDONLY | os.O_NOATIME)
    assert os.read(fd, 8)
    os.close(fd)
    assert in_the_model(mount) == []
    return cube


def test_cp_takes_a_whole_one(linked: Mount, tmp_path: Path) -> None:
    cube = linked.cube("law", TEXT)
    subprocess.run(["cp", cube / "kv.safetensors", tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == (linked.store / "law/kv.safetensors").read_bytes()
    assert len((tmp_path / "copy").read_bytes()) > 10_000
    assert in_the_model(linked) == ["law"]


def test_safetensors_reads_one_that_was_not_there(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    with safe_open(cube / "kv.safetensors", "np") as opened:
        names = opened.keys()
    assert "token_ids" in names


def test_a_resident_one_is_read_again(linked: Mount) -> None:
    kv = linked.cube("law", TEXT) / "kv.safetensors"
    first = kv.read_bytes()
    until(lambda: in_the_model(linked) == ["law"])
    until(lambda: os.getxattr(kv, "user.memfs.mounted") == b"yes")
    assert kv.read_bytes() == first
    assert kv.read_bytes() == first
    assert linked.meta("law")["behavioural"]["reads"] == 3


def test_a_renamed_cube_stays_in_the_model(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    (cube / "kv.safetensors").read_bytes()
    until(lambda: in_the_model(linked) == ["law"])
    (linked.dir / "100% new").mkdir()
    os.rename(cube, linked.dir / "100% new/law")
    until(lambda: in_the_model(linked) == ["100% new/law"])
    assert os.listdir(linked.dir / ".memfs/mounted") == ["100%25 new%2Flaw"]
    link = linked.dir / ".memfs/mounted/100%25 new%2Flaw"
    assert (link / "payload.md").read_text() == TEXT
    shutil.rmtree(linked.dir / "100% new")
    until(lambda: in_the_model(linked) == [])


def test_an_adapter_is_refused_with_a_reason(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    (cube / "adapter").mkdir()
    weights = cube / "adapter/adapter_model.safetensors"
    weights.write_bytes(kv_file(b""))
    weights.read_bytes()
    refusal = until(lambda: linked.status()["refusals"])[0]
    assert (refusal["path"], refusal["kind"]) in (("law", "adapter"), ("law", "kv"))
    assert "adapter" in refusal["reason"]


def test_the_state_of_a_kv_cache_is_known_without_a_runtime(
    tmp_path: Path, environment: dict[str, str], ready: RuntimeClient
) -> None:
    with mounted_at(tmp_path, **environment) as mount:
        until(lambda: mount.status()["runtime"] == "ready")
        made(mount)
        assert mount.meta("law")["state"]["kv"]["state"] == "ready"
    with mounted_at(tmp_path, MEMFS_MODEL="nowhere", MEMFS_AUTOSTART="off") as mount:
        until(mount.has_index)
        assert mount.status()["runtime"] == "absent"
        assert mount.meta("law")["state"]["kv"]["state"] == "ready"


def timed(function: Any, *args: Any) -> float:
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def test_no_file_operation_waits_for_a_busy_runtime(linked: Mount, ready: RuntimeClient) -> None:
    cube = made(linked)
    other = linked.cube("other", TEXT)
    with stopped(ready.call("status", timeout=60)["pid"]):
        readers = [
            subprocess.Popen(["cat", other / "kv.safetensors"], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        time.sleep(0.2)
        assert timed((cube / "kv.safetensors").read_bytes) < 2.5  # one close may wait, once
        assert timed((cube / "kv.safetensors").read_bytes) < 1
        assert timed((cube / "payload.md").write_text, "x") < 1
        assert timed(linked.meta, "law") < 1
        assert timed(linked.status) < 1.5
        assert timed(os.listdir, other) < 1
        assert timed((other / "payload.md").read_text) < 1
        assert timed(os.rename, other, linked.dir / "moved") < 1
        assert timed(shutil.rmtree, linked.dir / "moved") < 1
        assert all(reader.poll() is None for reader in readers)
        readers[0].send_signal(signal.SIGTERM)
        readers[0].wait(60)
        readers[1].kill()
        readers[1].wait(60)
    readers[2].communicate(timeout=60)
    for reader in readers[:2]:
        assert reader.stdout is not None
        reader.stdout.close()
    assert readers[2].returncode != 0  # the text is gone


def test_many_who_wait_leave_threads_for_others(linked: Mount, ready: RuntimeClient) -> None:
    cube = linked.cube("law", TEXT)
    results: list[str] = []

    def read() -> None:
        try:
            results.append(str(len((cube / "kv.safetensors").read_bytes())))
        except OSError as e:
            results.append(e.strerror)

    with stopped(ready.call("status", timeout=60)["pid"]):
        readers = [threading.Thread(target=read) for _ in range(50)]
        for reader in readers:
            reader.start()
        until(lambda: len(results) >= 50 - 32)
        assert set(results) == {"Device or resource busy"}
        assert timed((cube / "payload.md").read_text) < 2
    for reader in readers:
        reader.join(30)
    size = str((linked.store / "law/kv.safetensors").stat().st_size)
    assert results.count(size) == 32


def test_files_go_on_when_the_runtime_is_killed(linked: Mount, ready: RuntimeClient) -> None:
    cube = linked.cube("law", TEXT)
    (cube / "kv.safetensors").read_bytes()
    until(lambda: in_the_model(linked) == ["law"])
    os.kill(ready.call("status", timeout=10)["pid"], signal.SIGKILL)
    assert (cube / "payload.md").read_text() == TEXT
    until(lambda: linked.status()["runtime"] == "absent")
    assert in_the_model(linked) == []
    # The next one that needs it starts it again; nothing waits for that but who asked for it.
    (linked.cube("other", TEXT) / "kv.safetensors").read_bytes()
    until(lambda: in_the_model(linked) == ["other"], 30)
