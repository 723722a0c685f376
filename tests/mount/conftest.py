"""Real mounts in temporary directories. Where FUSE is not to be had, these tests are skipped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfs.config import Config
from memfs.filesystem import registry
from memfs.filesystem.mount import log_path
from memfs.runtime.client import RuntimeClient, connect, stop

from ..waiting import until

pytest.register_assert_rewrite(f"{__package__}.desk")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    usable = os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3")
    if usable:
        return
    skip = pytest.mark.skip(reason="needs /dev/fuse and fusermount3")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


def memfs(*args: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; its environment may be added to."""
    command = [sys.executable, "-m", "memfs.cli.main", *map(str, args)]
    try:
        return subprocess.run(
            command, check=check, capture_output=True, text=True, env=os.environ | env, timeout=60
        )
    except subprocess.CalledProcessError as e:
        e.add_note(e.stderr)
        raise


class Mount:
    """A mounted store."""

    def __init__(self, root: Path, **env: str) -> None:
        self.store = root / "store"
        self.dir = root / "mem"
        self.env = {"MEMFS_AUTOSTART": "off"} | env

    def start(self, *options: str) -> None:
        memfs("mount", *options, self.store, self.dir, **self.env)

    def stop(self) -> None:
        """Ends it; whatever went wrong in it unexpectedly fails the test."""
        memfs("umount", self.dir)
        self.require_clean_log()

    def require_clean_log(self) -> None:
        log = log_path(str(self.dir)).read_text()
        assert "Traceback" not in log, log

    @property
    def pid(self) -> int:
        record = registry.at(self.dir)
        assert record is not None
        assert record.pid is not None
        return record.pid

    def cube(self, name: str, text: str = "Some text.\n") -> Path:
        """A cube with a payload, made through the mount."""
        directory = self.dir / name
        directory.mkdir(parents=True)
        (directory / "payload.md").write_text(text)
        return directory

    def meta(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.dir / name / "meta.json").read_text())
        return loaded

    def status(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.dir / ".memfs/status.json").read_text())
        return loaded

    def has_index(self) -> bool:
        return self.status()["index"]["cubes"] is not None


@contextlib.contextmanager
def mounted_at(root: Path, *options: str, **env: str) -> Iterator[Mount]:
    """A mount that is ended afterwards, if it is there still."""
    mount = Mount(root, **env)
    mount.start(*options)
    try:
        yield mount
    finally:
        if os.path.ismount(mount.dir):
            mount.stop()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A mount of the test's own, with its index open."""
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        yield mount


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount for all tests of a module."""
    with mounted_at(tmp_path_factory.mktemp("shared")) as mount:
        until(mount.has_index)
        yield mount


@pytest.fixture
def place(shared_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own in the module's mount."""
    directory = shared_mount.dir / request.node.name
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> Iterator[Config]:
    """The small model, for mounts with a runtime; it is stopped in the end."""
    config = Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)
    yield config
    stop(config)


@pytest.fixture(scope="module")
def environment(config: Config) -> dict[str, str]:
    """The same, as the commands are told."""
    return {
        "MEMFS_MODEL": config.model,
        "MEMFS_DEVICE": config.device,
        "MEMFS_DTYPE": config.dtype,
        "MEMFS_THREADS": "1",
        "MEMFS_AUTOSTART": "on",
    }


@pytest.fixture
def ready(config: Config) -> Iterator[RuntimeClient]:
    """A client of that model's runtime, with the model loaded."""
    with connect(config, start=True) as client:
        client.call("ready", timeout=120)
        yield client


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process does not move, as one that computes for ever."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or gone but for its parent's taking notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
