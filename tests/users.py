"""Running a piece of a test as another user: a real child process with other ids."""

from __future__ import annotations

import contextlib
import os
import pickle
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def as_user(
    uid: int,
    body: Callable[[], T],
    *,
    gid: int | None = None,
    groups: Iterable[int] = (),
    before: Callable[[], object] = lambda: None,
) -> T:
    """What ``body`` returns in a child of that user; what it raises is raised here.

    The ids need not be in the user database. The group is the same number unless another is given.

    Args:
        before: called in the child while it is still root's.
    """
    gid = uid if gid is None else gid
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(heard)
            before()
            os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            try:
                outcome = pickle.dumps((body(), None))
            except BaseException as e:  # noqa: BLE001  it is raised in the parent
                outcome = pickle.dumps((None, e))
            with os.fdopen(said, "wb") as pipe:
                pipe.write(outcome)
        finally:
            os._exit(0)
    os.close(said)
    with os.fdopen(heard, "rb") as pipe:
        raw = pipe.read()
    os.waitpid(child, 0)
    result, error = pickle.loads(raw)
    if error is not None:
        raise error
    return result


def open_way(path: Path) -> None:
    """Lets every user through to a directory; pytest makes its own for nobody else."""
    for above in (path, *path.parents):
        mode = stat.S_IMODE(above.stat().st_mode)
        if mode & 0o711 != 0o711:
            above.chmod(mode | 0o711)


@contextlib.contextmanager
def in_context(unit: str) -> Iterator[Callable[[], None]]:
    """Makes a control group as systemd does for a unit; what it gives moves a process into it.

    The test is skipped where none can be made.
    """
    for hierarchy in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/systemd"):
        group = Path(hierarchy, unit)
        if not Path(hierarchy, "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        break
    else:
        pytest.skip("no control group can be made here")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()
