"""Running a piece of a test as another user: a real child process with other ids."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def as_user(
    uid: int, body: Callable[[], T], *, gid: int | None = None, groups: Iterable[int] = ()
) -> T:
    """What ``body`` returns in a child of that user; what it raises is raised here.

    The ids need not be in the user database. The group is the same number unless another is given.
    """
    gid = uid if gid is None else gid
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(heard)
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
