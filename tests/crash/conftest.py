"""Options of the crash harness, for ``tools/crash``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crash")
    group.addoption("--crash-rounds", type=int, help="rounds of one long campaign")
    group.addoption("--crash-seed", type=int, default=0)
    group.addoption("--crash-what", default="both", choices=["mount", "runtime", "both"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3"):
        return
    skip = pytest.mark.skip(reason="needs /dev/fuse and fusermount3")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
