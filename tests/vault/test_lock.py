"""One process at a time has a store; the lock ends with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfs.errors import MountFailed, NotAllowed
from memfs.vault.lock import lock
from memfs.vault.store import Store

HOLDER = """
import sys
from pathlib import Path
from memfs.vault.lock import lock
from memfs.vault.store import Store
held = lock(Store.open(Path(sys.argv[1])), "is mounted at /mnt/x")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        held = lock(store, "is mounted at /home/ann/mem")
        with pytest.raises(MountFailed, match="is mounted at /home/ann/mem"):
            lock(store)
        held.release()
        held.release()
        with lock(store), pytest.raises(MountFailed, match=f"process {os.getpid()}"):
            lock(store)
        lock(store).release()


def test_a_killed_holder_gives_it_back(tmp_path: Path) -> None:
    with (
        Store.open(tmp_path) as store,
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder,
    ):
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(MountFailed, match="/mnt/x"):
            lock(store)
        holder.kill()
        holder.wait()
        lock(store).release()


def test_a_child_goes_on_holding_it(tmp_path: Path) -> None:
    """A mount forks into the background after it took the lock."""
    with Store.open(tmp_path) as store:
        held = lock(store)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        held.release()
        with pytest.raises(MountFailed):
            lock(store)
        os.close(write)
        os.waitpid(child, 0)
        lock(store).release()


def test_a_symlink_is_no_lock(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "store").mkdir()
    with Store.open(tmp_path / "store") as store:
        (store.control_dir / "lock").symlink_to(victim)
        with pytest.raises(NotAllowed):
            lock(store)
    assert victim.read_text() == "mine"


def test_a_store_that_cannot_be_written_needs_none(tmp_path: Path) -> None:
    with Store.open(tmp_path, create_control=False) as store:
        lock(store).release()
    assert not (tmp_path / ".memfs").exists()
