"""What a thread that asks is really doing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memfs.filesystem.context import _open_flags, creates, program

from .conftest import until

EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")


def words(number: int, *args: int) -> list[bytes]:
    """A line of ``/proc/PID/syscall``."""
    padded = [*args, *[0] * (8 - len(args))]
    return [str(number).encode(), *[hex(arg).encode() for arg in padded]]


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        (words(2, 0x1000, EXCLUSIVE, 0o644), EXCLUSIVE),
        (words(257, 0xFFFFFF9C, 0x1000, EXCLUSIVE, 0o644), EXCLUSIVE),
        (words(257, 0xFFFFFF9C, 0x1000, os.O_RDONLY), os.O_RDONLY),
        (words(262, 0xFFFFFF9C, 0x1000, EXCLUSIVE), None),  # newfstatat
        ([b"-1", b"0x7ffd", b"0x7f89"], None),  # in no system call at all
    ],
)
def test_the_flags_of_an_open(line: list[bytes], flags: int | None) -> None:
    assert _open_flags(os.getpid(), line) == flags


def test_the_flags_that_openat2_points_to() -> None:
    import ctypes

    how = (ctypes.c_uint64 * 3)(EXCLUSIVE, 0o644, 0)
    line = words(437, 0xFFFFFF9C, 0x1000, ctypes.addressof(how), 24)
    assert _open_flags(os.getpid(), line) == EXCLUSIVE
    assert _open_flags(os.getpid(), words(437, 0, 0, 8, 24)) == 0


def test_a_thread_that_sleeps_in_an_open(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ids: list[int] = []

    def wait() -> None:
        ids.append(threading.get_native_id())
        os.close(os.open(fifo, os.O_RDONLY))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: ids and creates(ids[0]) is not None)
    assert creates(ids[0]) is False
    os.close(os.open(fifo, os.O_WRONLY))
    thread.join()


def test_a_thread_that_runs_or_is_gone_is_not_known() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        until(lambda: creates(busy.pid) is None)
    finally:
        busy.kill()
        busy.wait()
    assert creates(busy.pid) is None
    assert program(busy.pid) == ""


def test_programs_are_known_by_name() -> None:
    sleeping = subprocess.Popen(["sleep", "60"])
    try:
        until(lambda: program(sleeping.pid) == "sleep")
    finally:
        sleeping.kill()
        sleeping.wait()
