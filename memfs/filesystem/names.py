"""Operations that make, remove and rename names. Used by the tree; any thread.

libfuse renames a file that is unlinked, or replaced, while it is open: it must still have a path to
be asked about. Such a file goes to a directory of memfs's own, so the directory that it was in can
be removed, and ``elsewhere`` remembers it until libfuse unlinks it for good.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from memfs.cube import layout, metadata
from memfs.cube.layout import Role
from memfs.errors import InvalidMetadata
from memfs.filesystem.backing import Backing, is_hidden
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, names
from memfs.filesystem.guard import Guard
from memfs.filesystem.handles.staged import Staged
from memfs.filesystem.handles.table import HandleTable
from memfs.filesystem.header import Headers
from memfs.filesystem.link import Link
from memfs.filesystem.opening import Opening, require_free
from memfs.vault.publish import publish_bytes
from memfs.vault.rename import RENAME_EXCHANGE
from memfs.vault.rights import carry_over
from memfs.vault.store import HIDDEN_DIR


class Names:
    """The verbs on names."""

    def __init__(
        self,
        backing: Backing,
        handles: HandleTable,
        catalogue: Catalogue,
        headers: Headers,
        link: Link,
        opening: Opening,
        guard: Guard,
        context: Callable[[], Context],
    ) -> None:
        self._backing = backing
        self._handles = handles
        self._catalogue = catalogue
        self._headers = headers
        self._link = link
        self._opening = opening
        self._guard = guard
        self._context = context
        self._replaced: dict[str, str] = {}
        """Headers that libfuse has just put aside to be replaced, by their path."""

    def is_hidden(self, path: str) -> bool:
        """Whether a path is libfuse's name for a file that has none any more."""
        return path in self._backing.elsewhere and is_hidden(path)

    def looked_at(self, path: str) -> None:
        """A path was asked about: what happened to it before belongs to no rename that comes."""
        self._replaced.pop(path, None)

    def mkdir(self, path: str, mode: int) -> None:
        self._require(path)
        self._backing.mkdir(path, mode, self._context())
        self._touch(path)

    def mknod(self, path: str, mode: int, device: int) -> None:
        self._require(path)
        self._backing.mknod(path, mode, device, self._context())
        self._touch(path, written=True)

    def symlink(self, path: str, target: str) -> None:
        self._require(path)
        self._backing.symlink(path, target, self._context())
        self._touch(path)

    def link(self, old: str, new: str) -> None:
        self._require(old, new)  # by another name it could be written
        self._publish(old)
        if layout.classify(new)[0] is Role.META:
            self._require_readable(old)
        self._backing.link(old, new)
        self._touch(new, written=True)

    def unlink(self, path: str) -> None:
        if self.is_hidden(path):
            with self._backing.moving:
                real = self._backing.elsewhere.pop(path)
            self._backing.unlink(real)
            return
        self._require(path)
        staged = path in self._backing.elsewhere
        self._handles.unlinked(path)
        try:
            self._backing.unlink(path)
        except FileNotFoundError:
            if not staged:
                raise
        self._goes(path)
        self._touch(path)

    def rmdir(self, path: str) -> None:
        self._require(path)
        self._backing.rmdir(path)
        self._touch(path)

    def rename(self, old: str, new: str, flags: int) -> None:
        """Renames; ``flags`` are the kernel's RENAME_*."""
        if is_hidden(new) and not names(self._context().pid, layout.split(new)[1]):
            self._hide(old, new)
            return
        self._require(old, new)
        aside = self._replaced.pop(new, None)
        try:
            for path in (old, new) if flags & RENAME_EXCHANGE else (old,):
                self._publish(path)
            headers = [self._checked_header(old, new)]
            if flags & RENAME_EXCHANGE:
                headers.append(self._checked_header(new, old))
            with self._backing.moving:
                self._backing.rename(old, new, flags)
                self._follow(old, new, flags)
        except BaseException:
            if aside is not None:
                self._take_back(new, aside)
            raise
        for path, data in filter(None, headers):
            status = self._backing.status(path)
            publish_bytes(self._backing.store, path, data, like=path)
            when = divmod(status.st_mtime_ns, 10**9)
            self._backing.utimens(path, divmod(status.st_atime_ns, 10**9), when)
        self._tell(old, new, flags)

    def _hide(self, path: str, hidden: str) -> None:
        """A file that is open loses its name."""
        self._require(path)
        if path in self._backing.elsewhere:  # it is being written beside its place
            self._handles.unlinked(path, hidden)
            try:
                self._backing.unlink(path)
            except FileNotFoundError:
                pass  # there was none before
        else:
            try:
                with self._backing.moving:
                    self._backing.elsewhere[hidden] = self._put_aside(path, layout.split(hidden)[1])
            except FileNotFoundError:
                pass  # it was refused and stands nowhere, but the last close is still on its way
            self._handles.unlinked(path, hidden)
            if layout.classify(path)[0] is Role.META:
                self._replaced[path] = hidden
        self._touch_later(path)

    def _put_aside(self, path: str, name: str) -> str:
        aside = layout.join(HIDDEN_DIR, name)
        try:
            self._backing.rename(path, aside)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            # Another filesystem is mounted within the store.
            aside = layout.join(layout.split(path)[0], layout.TEMPORARY + name)
            self._backing.rename(path, aside)
        return aside

    def _take_back(self, path: str, hidden: str) -> None:
        """What was to replace a header was refused: the old one stands."""
        with self._backing.moving:
            real = self._backing.elsewhere.pop(hidden, None)
            if real is not None:
                self._backing.rename(real, path)
        self._touch(path)

    def _checked_header(self, source: str, target: str) -> tuple[str, bytes] | None:
        """Refuses a file that is to become a header and is none.

        Gives the path and what must be written there, where that differs from the file.
        """
        role, cube = layout.classify(target)
        if role is not Role.META:
            return None
        found = self._backing.status(source)
        if not stat.S_ISREG(found.st_mode):
            return None
        self._require_readable(source)
        text = self._backing.store.read(
            self._backing.elsewhere.get(source, source), metadata.MAX_BYTES
        )
        try:
            base = self._headers.shown(cube)
        except FileNotFoundError:
            base = None
        try:
            data = self._headers.accept(cube, text, base, self._context())
        except (InvalidMetadata, OSError) as e:
            self._headers.reject(cube, text, found, self._context(), e)
            raise
        return None if data == text else (target, data)

    def _follow(self, old: str, new: str, flags: int) -> None:
        """What knows paths learns the new ones. Under ``backing.moving``."""
        steps = [(old, new)]
        if flags & RENAME_EXCHANGE:
            between = f"{layout.CONTROL}/exchanged"
            steps = [(old, between), (new, old), (between, new)]
        for before, after in steps:
            self._backing.moved(before, after)
            self._handles.moved(before, after)

    def _goes(self, path: str) -> None:
        """Where a header goes, its program may be about to write another."""
        role, cube = layout.classify(path)
        if role is Role.META:
            self._headers.taken_away(cube, self._context())

    def _tell(self, old: str, new: str, flags: int) -> None:
        if layout.is_temporary(old):  # what was put together aside has its place
            if stat.S_ISDIR(self._backing.status(new).st_mode):
                self._catalogue.touch(new, by=self._context())
            else:
                self._touch(new, written=True)
            return
        if flags & RENAME_EXCHANGE:
            for path in (old, new):
                self._touch(path, written=True)
                self._catalogue.keeper.later_below(path)
            return
        if stat.S_ISDIR(self._backing.status(new).st_mode):
            self._catalogue.moved(old, new, self._context())
            self._link.moved(old, new)
        self._goes(old)
        self._touch(old)
        self._touch(new, written=True)

    def _require(self, *paths: str) -> None:
        """Raises where a name is memfs's own, or a cube is frozen."""
        for path in paths:
            require_free(path)
            self._guard.require_writable(path)

    def _require_readable(self, path: str) -> None:
        """Raises where a file is to become a header that its mover may not read.

        memfs reads it, tells of it and keeps it where it is refused: for who could do so himself.
        """
        if not self._guard.may_read(self._backing.elsewhere.get(path, path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def _publish(self, path: str) -> None:
        """What is still being written beside its place is put there before it gets another."""
        for handle in self._handles.on(path):
            if isinstance(handle, Staged):
                handle.settle()

    def _touch(self, path: str, *, written: bool = False) -> None:
        cube = cube_of(path)
        if cube:
            role = layout.classify(path)[0] if written else Role.OTHER
            text, header = role is Role.PAYLOAD, role is Role.META
            by = self._context()
            if role is not Role.OTHER:
                carry_over(self._backing.store, cube, by.uid)
            self._catalogue.touch(cube, adopting=text or header, header=header, by=by)

    def _touch_later(self, path: str) -> None:
        cube = cube_of(path)
        if cube:
            self._catalogue.keeper.later_below(cube)


def cube_of(path: str) -> str:
    """The cube that changes where ``path`` comes, goes or is renamed; "" for none."""
    _, cube = layout.classify(path)
    parent, name = layout.split(path)
    return cube or (parent if name == layout.ADAPTER else "")
