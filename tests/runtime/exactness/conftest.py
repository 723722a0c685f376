"""Daemons that tell what they heard from their model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .listening import Nursery


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where this package's daemons come from."""
    found = Nursery(tmp_path_factory.mktemp("nursery"))
    yield found
    found.close()
