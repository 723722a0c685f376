"""How the kernel may answer the reads of an open file: from the store itself, from pages that it
has cached, or from us alone.

For all who have one node of the mount open (a path, until it is renamed or unlinked) the kernel
wants one and the same file of the store to be passed through, or none; an open that does not keep
to that fails with EIO. But a reader may be given the file that the others have and be marked
``direct_io`` all the same: then its reads come to us. That is how a file is opened that has been
replaced while others read the old one, and how a writer, or a reader whose reads count, opens what
is passed through to others. Its mappings alone are of what the others have.

Without passthrough, pages are cached by node as well, so who opens another file than the others
reads past them; and what is cached is good for a later open if the file is the same, unchanged.

Used by the table of handles, under its lock.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from memfs.filesystem.handles.handle import Handle, OpenFile
from memfs.filesystem.handles.passthrough import Passed, Passthrough
from memfs.vault.sig import Sig, settled_sig, sig_of

_KEPT = 4096


class Modes:
    """The modes of all open files of a mount."""

    def __init__(self, passthrough: Passthrough) -> None:
        self._passthrough = passthrough
        self._cached: dict[str, Sig] = {}
        """The file that the kernel's pages of a node are from, as it was when it was opened."""

    def admit(
        self, handle: Handle, node: str, others: Collection[Handle], held: Passed | None
    ) -> Passed | None:
        """Settles how a file is read that is being opened; what is passed through for it, if any.

        Args:
            others: who has the node open.
            held: what is passed through to them.
        """
        fd = handle.fd if isinstance(handle, OpenFile) else -1
        found = os.fstat(fd) if fd >= 0 else None
        file = (found.st_dev, found.st_ino) if found is not None else None
        handle.file = file
        if held is not None:
            held.users += 1
            handle.direct_io = handle.direct_io or not handle.passes or file != held.file
            return held
        if found is None or file is None or handle.direct_io:
            return None
        if any(other.file not in (None, file) for other in others):
            handle.direct_io = True
            return None
        passed = self._passthrough.begin(fd, file) if handle.passes and not others else None
        if any(other.refused for other in others):
            self._cached.pop(node, None)
        elif passed is None:
            self._cache(handle, node, found)
        return passed

    def dismiss(self, handle: Handle, node: str | None, passed: Passed | None) -> None:
        """A file was closed for good."""
        if handle.refused and node is not None:
            self._cached.pop(node, None)
        if passed is not None:
            passed.users -= 1
            if not passed.users:
                self._passthrough.end(passed)

    def _cache(self, handle: Handle, node: str, found: os.stat_result) -> None:
        handle.keep_cache = self._cached.pop(node, None) == sig_of(found)
        if len(self._cached) >= _KEPT:
            self._cached.pop(next(iter(self._cached)))
        self._cached[node] = settled_sig(found)
