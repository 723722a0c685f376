"""The index of a store: one record a cube, secondary keys and usage counters.

It answers at once what the files could answer only one by one, and it is disposable: ``rebuild``
makes it again from them. The mount process is its only writer; another process may open it
read-only. Any thread (see ``environment``). IndexDamaged may come out of any method: ``rebuild``
then mends the same object in place. No iterator holds a transaction while its caller works.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from memfs.errors import IndexDamaged
from memfs.index.cubes import CubeTable
from memfs.index.environment import INITIAL_MAP, Environment
from memfs.index.records import DATABASES, FORMAT, Usage, dump, load, seal, unseal
from memfs.index.usage import UsageTable

__all__ = ["Index", "Usage"]


class Index(CubeTable, UsageTable):
    """An open index."""

    _temporary = False

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        read_only: bool = False,
        map_size: int = INITIAL_MAP,
        temporary: bool = False,
    ) -> Index:
        """The index in ``directory``, made where there is none and it may be written.

        Args:
            temporary: whether ``close`` removes the directory.

        Raises:
            IndexDamaged: it cannot be used. ``check.sound`` finds what would kill the process here.
            OSError: the directory cannot be used; FileNotFoundError where there is none to read.
        """
        index = cls(Environment(directory, DATABASES, read_only=read_only, map_size=map_size))
        index._temporary = temporary
        try:
            index._require_format()
        except BaseException:
            index.close()
            raise
        return index

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self._env.directory

    def close(self) -> None:
        """Flushes and closes; twice is allowed. Any other call is then EBADF."""
        self._env.close()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self) -> None:
        """Flushes to the disk what was committed."""
        self._env.sync()

    def exchanged(self) -> AbstractContextManager[None]:
        """While the block runs the index is closed and other threads wait; then it is reopened."""
        return self._env.exchanged()

    def get_info(self, key: str) -> Any:
        """What ``set_info`` kept under a name, or None."""
        name = key.encode()
        value = self._env.read(lambda txn: txn.get(name, db=self._env.db["info"]))
        return None if value is None else load(unseal(name, value))

    def set_info(self, key: str, value: Any) -> None:
        """Keeps something that JSON can say under a name."""
        name = key.encode()
        sealed = seal(name, dump(value))
        self._env.write(lambda txn: txn.put(name, sealed, db=self._env.db["info"]))

    def _require_format(self) -> None:
        found = self.get_info("format")
        if found is None and not len(self) and not self._env.read_only:
            self.set_info("format", FORMAT)
        elif found != FORMAT:
            raise IndexDamaged(f"its format is {found}, not {FORMAT}")
