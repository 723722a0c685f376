"""Where the mounts are, from the kernel's list and the records."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from memfs.filesystem import registry
from memfs.filesystem.registry import MountRecord


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The kernel's list, to be filled."""
    listed: list[tuple[str, str]] = []
    monkeypatch.setattr(registry, "_kernel_list", lambda: iter(listed))
    return listed


def test_a_record_is_the_mounts_own(kernel: list[tuple[str, str]], tmp_path: Path) -> None:
    store, mountpoint = str(tmp_path / "s"), str(tmp_path / "m")
    registry.write(MountRecord(store, mountpoint, model="default"))
    assert registry.running() == []  # written, but the kernel knows no such mount
    kernel.append((mountpoint, store))
    (record,) = registry.running()
    assert (record.pid, record.model, record.alive) == (os.getpid(), "default", True)
    kernel[0] = (mountpoint, "/another/store")
    assert registry.running() == [MountRecord("/another/store", mountpoint)]
    registry.remove(mountpoint)
    registry.remove(mountpoint)


def test_a_dead_process_serves_nothing(kernel: list[tuple[str, str]], tmp_path: Path) -> None:
    kernel.append((str(tmp_path), "/store"))
    registry.write(MountRecord("/store", str(tmp_path)))
    (record,) = registry.running()
    reused = replace(record, started=record.started - 1)
    assert reused.alive is False
    assert replace(record, pid=None).alive is None
    registry.remove(str(tmp_path))


def test_the_innermost_mount_is_found(kernel: list[tuple[str, str]]) -> None:
    kernel += [("/mem", "/store"), ("/mem/inner", "/elsewhere")]
    outer, inner = registry.running()
    assert registry.find("/mem/law/payload.md") == (outer, "law/payload.md")
    assert registry.find("/mem") == (outer, "")
    assert registry.find("/mem/inner/x") == (inner, "x")
    assert registry.find("/elsewhere/x") == (inner, "x")
    assert registry.find("/memory") is None


def test_the_kernels_way_to_write_a_path() -> None:
    assert registry._unescaped(r"/a\040b\011c\134040") == "/a b\tc\\040"
