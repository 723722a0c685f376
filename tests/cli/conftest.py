"""Commands as they are typed, run in the test's own process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from memfs.cli import main as cli

needs_fuse = pytest.mark.skipif(
    not (os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3")),
    reason="needs /dev/fuse and fusermount3",
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("dump", cube)``: its exit status, what it printed, and what on standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        status = cli.main([*map(str, args)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
