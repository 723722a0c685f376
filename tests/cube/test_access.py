"""Rights from mode bits, as the kernel gives them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfs.cube.access import Caller, allowed, owner_names
from memfs.cube.acl import READ, SEARCH, WRITE, XATTR, Acl, Who
from tests.users import as_user, needs_root

ANN, BEN, STAFF, OTHER = 70001, 70002, 70010, 70011


def found(mode: int, uid: int = ANN, gid: int = STAFF) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("caller", "mode", "rights", "yes"),
    [
        (Caller(ANN, frozenset()), 0o400, READ, True),
        (Caller(ANN, frozenset({STAFF})), 0o044, READ, False),  # the owner's bits alone count
        (Caller(BEN, frozenset({STAFF})), 0o040, READ, True),
        (Caller(BEN, frozenset({STAFF})), 0o404, READ, False),
        (Caller(BEN, frozenset({OTHER})), 0o004, READ, True),
        (Caller(BEN, frozenset({OTHER})), 0o770, READ, False),
        (Caller(BEN, frozenset()), 0o006, READ | WRITE, True),
        (Caller(BEN, frozenset()), 0o004, READ | WRITE, False),
        (Caller(0, frozenset()), 0o000, READ | WRITE, True),
        (Caller(0, frozenset()), 0o600, SEARCH, False),
        (Caller(0, frozenset()), 0o601, SEARCH, True),
    ],
)
def test_modes(caller: Caller, mode: int, rights: int, yes: bool) -> None:
    assert allowed(caller, found(mode), rights) is yes


ASK_THE_KERNEL = """
import os, sys
path, gid, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([gid]); os.setgid(gid); os.setuid(uid)
print(*(int(os.access(path, right)) for right in (os.R_OK, os.W_OK, os.X_OK)))
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be other users")
@pytest.mark.parametrize(("uid", "gid"), [(ANN, OTHER), (BEN, STAFF), (BEN, OTHER)])
def test_the_kernel_says_the_same(uid: int, gid: int, open_directory: Path) -> None:
    path = open_directory / "file"
    path.touch()
    os.chown(path, ANN, STAFF)
    for mode in (0o700, 0o570, 0o407, 0o026):
        path.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-S", "-c", ASK_THE_KERNEL, path, str(gid), str(uid)],
            capture_output=True,
            text=True,
            check=True,
        )
        caller = Caller(uid, frozenset({gid}))
        ours = [int(allowed(caller, path.stat(), right)) for right in (READ, WRITE, SEARCH)]
        assert done.stdout.split() == [str(bit) for bit in ours], oct(mode)


BITS = st.integers(0, 7)
WHOS = st.builds(Who, st.sampled_from(["user", "group"]), st.sampled_from([BEN, STAFF, OTHER]))
ACLS = st.tuples(BITS, BITS, BITS, BITS, st.dictionaries(WHOS, BITS, min_size=1)).map(
    lambda parts: Acl(*parts)
)


@needs_root
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    acl=ACLS,
    uid=st.sampled_from([ANN, BEN, 70003]),
    gids=st.sets(st.sampled_from([STAFF, OTHER, 70012]), min_size=1),
)
def test_the_kernel_says_the_same_of_access_lists(
    open_directory: Path, acl: Acl, uid: int, gids: set[int]
) -> None:
    path = open_directory / "file"
    path.touch()
    os.chown(path, ANN, STAFF)
    try:
        os.setxattr(path, XATTR, acl.render())
    except OSError:
        pytest.skip("no access lists on this filesystem")
    first, *others = gids
    wanted = (READ, WRITE, SEARCH)

    def kernel() -> list[bool]:
        return [os.access(path, right) for right in wanted]

    caller, status = Caller(uid, frozenset(gids)), path.stat()
    ours = [allowed(caller, status, right, acl) for right in wanted]
    assert as_user(uid, kernel, gid=first, groups=others) == ours


def test_the_groups_of_a_user() -> None:
    assert Caller.of(0, 0) == Caller(0, frozenset(os.getgrouplist("root", 0)))
    assert Caller.of(BEN, OTHER) == Caller(BEN, frozenset({OTHER})), "a user nobody knows"


def test_names_of_owners() -> None:
    assert owner_names(found(0o600, 0, 0)) == ("root", "root")
    assert owner_names(found(0o600)) == (str(ANN), str(STAFF))
