"""A store with an index, and cubes to put into it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.cube import metadata
from memfs.index.lmdb_index import Index
from memfs.vault.store import Store


class Place:
    """A store, its index, and what a test does to them beside a mount."""

    def __init__(self, store: Store, index: Index) -> None:
        self.store, self.index = store, index

    def cube(self, path: str, text: str = "text", *, header: metadata.Meta | None = None) -> Path:
        """Makes a cube, with a header where one is given."""
        directory = self.store.root / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "payload.md").write_text(text)
        if header is not None:
            (directory / "meta.json").write_bytes(metadata.render(header))
        return directory

    def header(self, path: str) -> metadata.Meta:
        """The header on disk."""
        return metadata.parse((self.store.root / path / "meta.json").read_bytes())

    def id_of(self, path: str) -> str:
        """The id on disk."""
        return metadata.cube_id(self.header(path))

    def settle(self) -> None:
        """Waits until every file is known by its Sig once it is read."""
        time.sleep(0.06)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "store"
    root.mkdir()
    with Store.open(root) as store, Index.open(store.control_dir / "index") as index:
        yield Place(store, index)
