"""What memfs needs of a machine, each as a check that says what is there and what mends it.

Used by ``memfs doctor``, in the main thread. Nothing is changed, and nothing heavy is imported:
that torch is there is told by its metadata.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from memfs.cli import output
from memfs.config import DEFAULT_MODEL, Config, cache_dir, runtime_dir
from memfs.errors import InvalidConfig
from memfs.filesystem import libfuse
from memfs.runtime.model import model_store

OK, NOTE, PROBLEM = "ok", "note", "problem"

DISTRIBUTION = "memcubefs"
SHOWN_PACKAGES = ("torch", "transformers", "mfusepy", "lmdb")
MODEL_BYTES = 800_000_000
"""Room to make the default model: its GGUF file and, for a while beside it, what becomes of it."""
WATCHES = 65_536
"""One a directory of a store; kernels since 5.11 allow a million where memory is ample."""
SOCKET_DIR_BYTES = 60
"""A socket's path may have 107 bytes, and its name takes up to 47."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    state: str
    """``ok``, ``note`` (works, but look) or ``problem``."""
    found: str
    mend: str = ""
    """The command that mends it."""

    def to_json(self) -> dict[str, str]:
        """This check as a JSON object."""
        return asdict(self)


def machine() -> Iterator[Check]:
    """The system: Python, libfuse 3, the right to mount, and the kernel's limits."""
    yield _python()
    yield from _libfuse()
    yield _device()
    yield _right_to_mount()
    if os.getuid() != 0:
        yield _allow_other()
    yield _watches()


def packages() -> Iterator[Check]:
    """The Python packages that memfs is declared to need, without importing them."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "packages", PROBLEM, "memfs is not installed", f"{sys.executable} -m pip install -e ."
        )
        return
    others = []
    for line in required:
        name, minimum = re.match(r"[\w.-]+", line), re.search(r">=([0-9.]+)", line)
        if name is None or "extra ==" in line:
            continue
        check = _package(name[0], minimum[1] if minimum else "0")
        if check.name in SHOWN_PACKAGES or check.state != OK:
            yield check
        else:
            others.append(f"{check.name} {check.found}")
    yield Check("other packages", OK, ", ".join(others))


def places(config: Config) -> Iterator[Check]:
    """Where memfs keeps things: the model, room for it, and the directory for sockets."""
    made = model_store.cached(config.model)
    if made is not None:
        yield Check("model", OK, f"{config.model}: {made}")
    else:
        option = "" if config.model == DEFAULT_MODEL else f" --model {config.model}"
        yield Check(
            "model", PROBLEM, f"{config.model} is not here yet", f"memfs runtime --prepare{option}"
        )
    yield _room(needed=0 if made else MODEL_BYTES)
    yield _runtime_dir()


def _sudo(command: str) -> str:
    return command if os.getuid() == 0 else f"sudo {command}"


def _python() -> Check:
    # On one too old memfs does not even start, and pip does not install it.
    return Check("Python", OK, f"{platform.python_version()} ({sys.executable})")


def _libfuse() -> Iterator[Check]:
    mend = _sudo("apt-get install -y fuse3")
    name = libfuse.find()
    if name is None:
        yield Check("libfuse 3", PROBLEM, "not installed", mend)
        return
    found = libfuse.version(name)
    yield Check("libfuse 3", OK, f"{found[0]}.{found[1]} ({name})")
    reason = libfuse.no_passthrough(found)
    used = f"not used: {reason}" if reason else "the kernel reads files of a mount by itself"
    yield Check("passthrough", OK, used)


def _device() -> Check:
    container = "start the container with: --device /dev/fuse --cap-add SYS_ADMIN"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError:
        inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
        mend = container if inside else _sudo("modprobe fuse")
        return Check("/dev/fuse", PROBLEM, "not there", mend)
    except PermissionError as e:
        mend = container if e.errno == errno.EPERM else _sudo("chmod 666 /dev/fuse")
        return Check("/dev/fuse", PROBLEM, "may not be opened", mend)
    except OSError as e:
        return Check("/dev/fuse", PROBLEM, e.strerror or str(e), _sudo("modprobe fuse"))
    return Check("/dev/fuse", OK, "can be opened")


def _right_to_mount() -> Check:
    """Root needs the capability; everybody else needs fusermount3, set-uid root."""
    program = shutil.which("fusermount3")
    if program is None:
        mend = _sudo("apt-get install -y fuse3")
        return Check("fusermount3", PROBLEM, "not installed", mend)
    if os.getuid() == 0:
        if not libfuse.capabilities() >> libfuse.CAP_SYS_ADMIN & 1:
            mend = "start the container with: --device /dev/fuse --cap-add SYS_ADMIN"
            return Check("fusermount3", PROBLEM, "root may not mount here", mend)
    else:
        found = os.stat(program)
        if found.st_uid != 0 or not found.st_mode & stat.S_ISUID:
            mend = _sudo(f"chown root {program} && sudo chmod u+s {program}")
            return Check("fusermount3", PROBLEM, f"{program} is not set-uid root", mend)
        if not os.path.exists("/etc/mtab"):
            mend = _sudo("ln -s /proc/self/mounts /etc/mtab")
            return Check("fusermount3", PROBLEM, "cannot unmount without /etc/mtab", mend)
    return Check("fusermount3", OK, program)


def _allow_other() -> Check:
    mend = "echo user_allow_other | sudo tee -a /etc/fuse.conf"
    try:
        text = Path("/etc/fuse.conf").read_text()
    except OSError:
        text = ""
    if re.search(r"^\s*user_allow_other\b", text, re.M):
        return Check("user_allow_other", OK, "set: a mount may be shared with -o allow_other")
    return Check("user_allow_other", NOTE, "not set: your mounts are yours alone", mend)


def _watches() -> Check:
    try:
        limit = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    except (OSError, ValueError):
        return Check("inotify watches", NOTE, "the limit cannot be read: stores are rescanned")
    found = f"{output.number(limit)} directories a user"
    if limit < WATCHES:
        mend = _sudo(f"sysctl fs.inotify.max_user_watches={8 * WATCHES}")
        return Check("inotify watches", NOTE, f"{found}: bigger stores are rescanned", mend)
    return Check("inotify watches", OK, found)


def _package(name: str, minimum: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, PROBLEM, "not installed", _pip(name, minimum))
    if _numbers(version) < _numbers(minimum):
        return Check(name, PROBLEM, f"{version}; memfs needs {minimum}", _pip(name, minimum))
    return Check(name, OK, version)


def _pip(name: str, minimum: str) -> str:
    return f"{sys.executable} -m pip install '{name}>={minimum}'"


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0): enough to compare releases."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def _room(*, needed: int) -> Check:
    place = cache_dir()
    existing = next(p for p in (place, *place.parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{output.size(free)} free for {place}"
    if free < needed:
        mend = "export XDG_CACHE_HOME=DIRECTORY   # one with more room"
        return Check("disk", PROBLEM, f"{found}; the model needs {output.size(needed)}", mend)
    return Check("disk", OK, found)


def _runtime_dir() -> Check:
    try:
        path = runtime_dir()
    except (InvalidConfig, OSError) as e:
        mend = "export XDG_RUNTIME_DIR=$(mktemp -d)"
        return Check("runtime directory", PROBLEM, str(e), mend)
    if len(os.fsencode(path)) > SOCKET_DIR_BYTES:
        mend = "export XDG_RUNTIME_DIR=$(mktemp -d)"
        return Check("runtime directory", PROBLEM, f"{path} is too long for a socket", mend)
    return Check("runtime directory", OK, f"{path}, private")
