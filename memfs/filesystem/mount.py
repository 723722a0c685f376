"""Mounting a store: what is checked before, the process that serves it, and the end of it.

``memfs mount`` must return in well under half a second with the mount usable, so what a mount can
do without at first (the index, the watcher, the connection to the runtime) is brought up behind it.
The serving process is forked before any thread is started. Used by the commands; the main thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import resource
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfs.config import Config, runtime_dir
from memfs.errors import MemfsError, MountFailed
from memfs.filesystem import registry
from memfs.filesystem.registry import MountRecord
from memfs.vault.lock import StoreLock, lock
from memfs.vault.store import Store

READY_SECONDS = 20.0
ENDING_SECONDS = 15.0
"""A mount that has ended may still write usage counters for some seconds, and holds the lock."""

_DEVICE = "/dev/fuse"


@dataclass(frozen=True)
class Wanted:
    """A mount that is asked for."""

    store: Path
    mountpoint: str
    config: Config
    options: Mapping[str, str | bool] = field(default_factory=dict)
    """Of FUSE, as after ``-o``."""


def mount(wanted: Wanted, *, foreground: bool = False) -> MountRecord:
    """Mounts, and returns when the mount can be used; in the foreground, when it has ended.

    The store and the mountpoint are made where only their last part is missing.

    Raises:
        MountFailed: with what is wrong, and what mends it where that is one command.
    """
    _require_fuse()
    mountpoint = _prepare_mountpoint(wanted.mountpoint)
    root = _prepare_store(wanted.store, mountpoint)
    model = wanted.config.model
    if os.path.exists(model):
        # The serving process is at home in ``/``.
        config = dataclasses.replace(wanted.config, model=os.path.abspath(model))
        wanted = dataclasses.replace(wanted, config=config)
    store = Store.open(root)
    held = _lock(store, mountpoint)
    record = MountRecord(
        str(store.root), mountpoint, model=wanted.config.model, read_only=store.read_only
    )
    if foreground:
        _serve(wanted, store, held, record, None)
        return record
    return _in_background(wanted, store, held, record)


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """Ends the mount at a directory, and waits until its process is gone.

    Raises:
        MountFailed: there is none, or it is in use (with who uses it), also where only processes
            in another mount namespace can still see it.
    """
    record = registry.at(mountpoint)
    if record is None:
        raise MountFailed(f"{mountpoint} is no mount of memfs; see memfs status")
    dead = record.alive is False
    problem = _detach(record.mountpoint, lazy=lazy or dead)
    if problem is not None:
        users = _users(record.mountpoint)
        raise MountFailed(f"{mountpoint}: {problem}" + (f"; used by {users}" if users else ""))
    if record.alive and not lazy and (elsewhere := registry.seen_by(record.store)):
        raise MountFailed(
            f"{mountpoint} is unmounted here, but goes on in another mount namespace, which took it"
            f" over when it began: that of {', '.join(map(_named, elsewhere[:8]))}"
        )
    deadline = time.monotonic() + ENDING_SECONDS
    while record.alive and not lazy and time.monotonic() < deadline:
        time.sleep(0.01)
    if record.alive and not lazy:
        raise MountFailed(
            f"{mountpoint} is unmounted, but process {record.pid} goes on;"
            f" see {log_path(record.mountpoint)}"
        )
    if dead:
        registry.remove(record.mountpoint)


def log_path(mountpoint: str) -> Path:
    """Where the process that serves a mount writes what it has to say."""
    return runtime_dir() / f"mount-{registry.key(mountpoint)}.log"


def _require_fuse() -> None:
    if not os.path.exists(_DEVICE):
        raise MountFailed(f"there is no {_DEVICE}; try: modprobe fuse")
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise MountFailed(f"you may not use {_DEVICE}; try: sudo chmod 666 {_DEVICE}")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountFailed("fusermount3 is not installed; try: sudo apt-get install fuse3")


def _prepare_mountpoint(given: str) -> str:
    """The real path of an empty directory; a dead mount there is cleared first."""
    mountpoint = registry.real_mountpoint(given)
    try:
        found = os.stat(mountpoint)
    except FileNotFoundError:
        try:
            os.mkdir(mountpoint)
        except OSError as e:
            raise MountFailed(f"{given}: {e.strerror}") from e
        found = os.stat(mountpoint)
    except OSError as e:
        if e.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise MountFailed(f"{given}: {e.strerror}") from e
        problem = _detach(mountpoint, lazy=True)
        if problem is not None:
            raise MountFailed(f"{given} is a dead mount: {problem}") from e
        registry.remove(mountpoint)
        return _prepare_mountpoint(given)
    mountpoint = os.path.realpath(mountpoint)
    there = registry.at(mountpoint)
    if there is not None and there.alive is not False:
        raise MountFailed(f"{there.store} is mounted at {given} already")
    if not stat.S_ISDIR(found.st_mode):
        raise MountFailed(f"{given} is not a directory")
    try:
        if os.listdir(mountpoint):
            raise MountFailed(f"{given} is not empty")
    except PermissionError as e:
        raise MountFailed(f"{given}: {e.strerror}") from e
    return mountpoint


def _prepare_store(given: Path, mountpoint: str) -> Path:
    root = os.path.realpath(given)
    for outer, inner in ((root, mountpoint), (mountpoint, root)):
        if inner == outer or inner.startswith(outer.rstrip("/") + "/"):
            raise MountFailed(
                f"the store {root} and the mountpoint {mountpoint} lie in one another"
            )
    if any(f"{root}/".startswith(f"{record.mountpoint}/") for record in registry.running()):
        raise MountFailed(f"{given} lies in a mount of memfs, and can be no store")
    try:
        os.mkdir(root)
    except FileExistsError:
        if not os.path.isdir(root):
            raise MountFailed(f"{given} is not a directory") from None
    except OSError as e:
        raise MountFailed(f"{given}: {e.strerror}") from e
    return Path(root)


def _lock(store: Store, mountpoint: str) -> StoreLock:
    """The store's lock. One that a mount holds which has just ended is waited for."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            return lock(store, f"is mounted at {mountpoint}")
        except MountFailed:
            mounted = any(r.store == str(store.root) for r in registry.mounted())
            if mounted or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _detach(mountpoint: str, *, lazy: bool) -> str | None:
    """Unmounts; what went wrong, if anything did."""
    commands = [["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]]
    if os.geteuid() == 0:
        commands.append(["umount", *(["-l"] if lazy else []), "--", mountpoint])
    problem: str | None = None
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            problem = problem or f"{command[0]} is not installed"
            continue
        if done.returncode == 0:
            return None
        problem = done.stderr.strip().rpartition(": ")[2] or "it cannot be unmounted"
    return problem


def _users(mountpoint: str) -> str:
    """Processes with something open below a mount, by name and number, as far as we may know."""
    below, found = mountpoint.rstrip("/") + "/", []
    for process in filter(str.isdigit, os.listdir("/proc")):
        links = [f"/proc/{process}/cwd", f"/proc/{process}/root"]
        with contextlib.suppress(OSError):
            links += [f"/proc/{process}/fd/{fd}" for fd in os.listdir(f"/proc/{process}/fd")]
        for link in links:
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target == mountpoint or target.startswith(below):
                    found.append(_named(process))
                    break
    return ", ".join(found[:8])


def _named(process: int | str) -> str:
    """A process by name and number."""
    name = "process"
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{process}/comm").read_text().strip()
    return f"{name} ({process})"


def _in_background(
    wanted: Wanted, store: Store, held: StoreLock, record: MountRecord
) -> MountRecord:
    """Forks the process that serves; it says when the mount is there, or what went wrong."""
    log = log_path(record.mountpoint)
    heard, said = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        parent = _Parent(said)
        try:
            os.close(heard)
            os.setsid()
            if os.fork():
                os._exit(0)
            _turn_away(log)
            _serve(wanted, store, held, record, parent)
        except BaseException as e:  # nothing runs after this
            logging.exception("the mount failed")
            parent.tell({"error": str(e) if isinstance(e, MemfsError | OSError) else repr(e)})
            os._exit(1)
        os._exit(0)
    os.close(said)
    os.wait()
    try:
        ready, _, _ = select.select([heard], [], [], READY_SECONDS)
        raw = os.read(heard, 65536) if ready else b""
    finally:
        os.close(heard)
        held.release()
        store.close()
    answer: dict[str, Any] = json.loads(raw) if raw else {"error": "it did not come up"}
    if "error" in answer:
        detail = str(answer["error"]).removeprefix(f"{MountFailed.__doc__}: ")
        raise MountFailed(f"{detail}; see {log}")
    return dataclasses.replace(record, pid=answer["pid"])


class _Parent:
    """The process that waits for a mount to come up."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def tell(self, message: dict[str, Any]) -> None:
        """Says how it went, the first time it is called."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # it did not wait
                os.write(fd, json.dumps(message).encode())
            os.close(fd)


def _turn_away(log: Path) -> None:
    """Away from the terminal and whoever called: what is said from now on goes to the log."""
    os.chdir("/")
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):  # none of ours is
                os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    for fd, target in ((0, null), (1, file), (2, file)):
        os.dup2(target, fd)
    os.close(null)
    os.close(file)


def _serve(
    wanted: Wanted, store: Store, held: StoreLock, record: MountRecord, parent: _Parent | None
) -> None:
    """Serves the mount until it ends."""
    from memfs.filesystem.serving import Server

    logging.basicConfig(
        level=os.environ.get("MEMFS_LOG", "INFO"),
        format="%(asctime)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    _allow_open_files()
    server = Server(store, record, wanted.config, noatime="noatime" in wanted.options)

    def started() -> None:
        server.start()
        registry.write(record)
        if parent is not None:
            parent.tell({"pid": os.getpid()})

    os.umask(0)
    try:
        server.serve({**_fuse_options(record), **wanted.options}, started)
    finally:
        registry.remove(record.mountpoint)
        held.release()


def _allow_open_files() -> None:
    """As many descriptors as this process may have: it opens all that its users have open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError, ValueError):
            system = int(Path("/proc/sys/fs/nr_open").read_text())
            resource.setrlimit(resource.RLIMIT_NOFILE, (system, system))
            return
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _fuse_options(record: MountRecord) -> dict[str, str | bool]:
    name = record.store.replace("\\", "\\\\").replace(",", "\\,")
    options: dict[str, str | bool] = {"fsname": name, "subtype": "memfs"}
    if record.read_only:
        options["ro"] = True  # so that the mount says it, and the kernel refuses whoever writes
    if os.geteuid() == 0:
        options["allow_other"] = True  # the kernel checks every access: see default_permissions
    return options
