"""Groups and calling context of a process, as the kernel has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memfs.cube.process import context_of, groups_of, unit_in
from tests.users import as_user, in_context, needs_root


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/agent.service\n", "agent.service"),
        ("0::/system.slice/agent.service/worker\n", "agent.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        # What users make below the part that is theirs to arrange is theirs, whatever its name.
        ("0::/user.slice/user-1000.slice/user@1000.service/agent.service\n", "user@1000.service"),
        ("4:memory:/x\n1:name=systemd:/system.slice/agent.service\n0::/\n", "agent.service"),
        ("4:memory:/system.slice/agent.service\n", None),
        ("0::/\n", None),
        ("0::/../../agent.service\n", None),
        ("0::/.service\n", None),
        ("", None),
        ("nonsense", None),
    ],
)
def test_the_unit_in_a_path(text: str, unit: str | None) -> None:
    assert unit_in(text) == unit


def test_of_this_process() -> None:
    assert groups_of(os.getpid()) == frozenset(os.getgroups())
    assert context_of(2**22 + 1) is None
    assert groups_of(2**22 + 1) is None


@needs_root
def test_a_real_control_group() -> None:
    def context() -> str | None:
        return context_of(os.getpid())

    with in_context("memfs-agent.service") as enter:
        assert as_user(70001, context, before=enter) == "memfs-agent.service"
        assert as_user(70001, context) != "memfs-agent.service"

        def leave() -> str | None:
            for path in Path("/sys/fs/cgroup").rglob("cgroup.procs"):
                try:
                    path.write_text(str(os.getpid()))
                except OSError:
                    continue
                raise AssertionError(f"{path} could be written")
            return context()

        assert as_user(70001, leave, before=enter) == "memfs-agent.service"
