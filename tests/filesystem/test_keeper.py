"""The keeper of the index, by itself."""

from __future__ import annotations

import threading
from pathlib import Path

from memfs.filesystem.keeper import IndexKeeper
from memfs.vault.store import Store


def test_ended_as_soon_as_it_begins_nothing_goes_on(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        keeper = IndexKeeper(
            store,
            tell=lambda _: None,
            on_change=lambda _: None,
            on_scan=lambda: None,
            must_wait=lambda _: False,
        )
        before = set(threading.enumerate())
        keeper.start()
        keeper.stop()
        assert set(threading.enumerate()) == before
