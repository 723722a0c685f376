"""Which files lie in the store under another name than the mount shows, and where.

Two kinds do: one that is being written beside its place (see ``handles.staged``), and one that was
unlinked or replaced while it was open. libfuse must have a path to be asked about those, and makes
one up; it is unique in a mount. Used by ``backing`` and what is built on it. Asked by any thread;
changed under ``backing.moving``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

from memfs.cube import layout

_HIDDEN = re.compile(r"\.fuse_hidden[0-9a-f]{16}")

_File = tuple[int, int]
"""Device and inode."""


def is_hidden(path: str) -> bool:
    """Whether a name is libfuse's for a file that was unlinked while it was open."""
    return _HIDDEN.fullmatch(layout.split(path)[1]) is not None


class Elsewhere:
    """Paths of the mount, and the paths in the store that their files have for now."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}
        self._kept: dict[str, _File] = {}
        """By libfuse's name alone: a directory that is renamed takes it along."""
        self._links: Counter[_File] = Counter()
        """How many of a file's links are such names. Every ``stat`` asks for that."""

    def __contains__(self, path: object) -> bool:
        return path in self._real

    def get(self, path: str, default: str) -> str:
        """Where the file lies that is shown at a path; the default where it is no other place."""
        return self._real.get(path, default)

    def show(self, path: str, real: str) -> None:
        """A file that is being written beside its place is shown there."""
        self._real[path] = real

    def keep(self, hidden: str, real: str, found: os.stat_result) -> None:
        """``real`` is a link of a file, kept for as long as it is open under libfuse's name."""
        self.forget(hidden)
        file = found.st_dev, found.st_ino
        self._real[hidden], self._kept[layout.split(hidden)[1]] = real, file
        self._links[file] += 1

    def forget(self, path: str) -> str | None:
        """The path means itself again; where its file lay."""
        file = self._kept.pop(layout.split(path)[1], None)
        if file is not None:
            self._links[file] -= 1
            if not self._links[file]:
                del self._links[file]
        return self._real.pop(path, None)

    def forget_file(self, real: str) -> None:
        """Nothing is shown by a file of the store any more."""
        for path in [path for path, at in self._real.items() if at == real]:
            self.forget(path)

    def links(self, found: os.stat_result) -> int:
        """How many of a file's links are names that it was unlinked by while it was open."""
        return self._links.get((found.st_dev, found.st_ino), 0) if self._links else 0

    def below(self, parent: str) -> Iterator[tuple[str, str]]:
        """Name, and place in the store, of what is being written beside its place there."""
        for path, real in list(self._real.items()):
            if layout.split(path)[0] == parent and not is_hidden(path):
                yield layout.split(path)[1], real

    def moved(self, old: str, new: str) -> None:
        """A directory was renamed, and with it the paths of what lies elsewhere below it."""
        self._real = {
            _after(shown, old, new): _after(real, old, new) for shown, real in self._real.items()
        }


def _after(path: str, old: str, new: str) -> str:
    """Where ``path`` is once ``old`` has become ``new``."""
    return new + path[len(old) :] if path.startswith(old + "/") else path
