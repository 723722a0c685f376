"""Options of the campaign of damaged KV caches, for ``tools/mutations``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mutations")
    group.addoption("--mutations-count", type=int, help="damaged files of one long campaign")
    group.addoption("--mutations-seed", type=int, default=0)
