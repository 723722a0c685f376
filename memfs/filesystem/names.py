"""Operations that make, remove and rename names. Used by the tree; any thread.

libfuse renames a file that is unlinked, or is to be replaced, while it is open: it must still have
a path to be asked about. Such a file goes to a directory of memfs's own, so the directory that it
was in can be removed, and ``elsewhere`` remembers it until libfuse unlinks it for good.

One that is to be replaced must have its name until the very moment, whatever happens meanwhile. So
where the caller is known to rename, the file gets another link there and keeps its name. Where that
is not known, or not to be had, it is moved there as if it were unlinked, and back should the rename
fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from memfs.cube import layout, metadata
from memfs.cube.layout import Role
from memfs.errors import InvalidMetadata
from memfs.filesystem.backing import Backing
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, names, renames
from memfs.filesystem.elsewhere import is_hidden
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

_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""A disk without hard links, no right to make one, or no more of them for this file."""

_KEPT = 256
"""Files put aside that are remembered: more than can be about to be replaced at once."""


class _Aside(NamedTuple):
    """A file that libfuse has had put aside."""

    hidden: str
    """Its name of libfuse's."""
    certain: bool
    """Whether it is known that it is about to be replaced."""
    moved: bool
    """Whether it has lost its own name."""
    staged: bool = False
    """Whether it was being written beside its place."""
    standing: str | None = None
    """Where the file was moved to that stood in that place; None where none did."""


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
        self._aside: dict[str, _Aside] = {}
        """What was just put aside, by its path: to be replaced, as far as we know."""

    def is_hidden(self, path: str) -> bool:
        """Whether a path is libfuse's name for a file that has none any more."""
        return path in self._backing.elsewhere and is_hidden(path)

    def looked_at(self, path: str) -> None:
        """A path was asked about: what happened to it before belongs to no rename that comes."""
        aside = self._aside.get(path)
        if aside is not None and not aside.certain:
            self._let_go(self._aside.pop(path, None))

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
                real = self._backing.elsewhere.forget(path)
            if real is not None:
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
        aside = self._aside.pop(new, None)
        try:
            self._require(old, new)
            for path in (old, new) if flags & RENAME_EXCHANGE else (old,):
                self._publish(path)
            headers = [self._checked_header(old, new)]
            if flags & RENAME_EXCHANGE:
                headers.append(self._checked_header(new, old))
            with self._backing.moving:
                stays = aside is not None and self._is_one_file(old, aside)
                self._backing.rename(old, new, flags)
                if not flags & RENAME_EXCHANGE and not stays:
                    self._handles.unlinked(new, aside.hidden if aside else None)
                self._follow(old, new, flags)
        except BaseException:
            if aside is not None:
                self._take_back(new, aside)
            raise
        self._let_go(aside)
        for path, data in filter(None, headers):
            status = self._backing.status(path)
            publish_bytes(self._backing.store, path, data, like=path)
            when = divmod(status.st_mtime_ns, 10**9)
            self._backing.utimens(path, divmod(status.st_atime_ns, 10**9), when)
        self._tell(old, new, flags)

    def _hide(self, path: str, hidden: str) -> None:
        """A file that is open is about to be replaced, or it loses its name now."""
        self._require(path)
        renaming = renames(self._context().pid)
        with self._backing.moving:
            if renaming and self._link_aside(path, hidden):
                self._handles.known_as(path, hidden)
                self._aside[path] = _Aside(hidden, certain=True, moved=False)
                return
            aside = self._move_aside(path, hidden, certain=bool(renaming))
            self._handles.unlinked(path, hidden)
        if renaming is False or aside is None:
            self._let_go(aside)
        else:
            if len(self._aside) >= _KEPT:
                self._let_go(self._aside.pop(next(iter(self._aside))))
            self._aside[path] = aside
        self._touch_later(path)

    def _link_aside(self, path: str, hidden: str) -> bool:
        """Gives a file another name for libfuse to know it by; False where that cannot be."""
        name, parent = layout.split(hidden)[1], layout.split(path)[0]
        try:
            found = self._backing.status(path)
            real = self._within(parent, name, lambda aside: self._backing.link(path, aside))
        except FileNotFoundError:
            return False  # see _move_aside
        except OSError as e:
            if e.errno in _NO_LINKS:
                return False
            raise
        self._backing.elsewhere.keep(hidden, real, found)
        return True

    def _move_aside(self, path: str, hidden: str, *, certain: bool) -> _Aside | None:
        """Takes the name from a file that is open, and from the one whose place it is to have."""
        name, parent = layout.split(hidden)[1], layout.split(path)[0]
        real, standing = self._backing.elsewhere.get(path, path), None
        staged = real != path
        if staged:
            with contextlib.suppress(FileNotFoundError):  # there was none before
                standing = self._move(path, parent, f"{name}-standing")
        try:
            found = self._backing.store.stat(real)
            self._backing.elsewhere.keep(hidden, self._move(real, parent, name), found)
        except FileNotFoundError:
            return None  # it was refused and stands nowhere, but the last close is still to come
        return _Aside(hidden, certain, moved=True, staged=staged, standing=standing)

    def _move(self, real: str, parent: str, name: str) -> str:
        return self._within(parent, name, lambda aside: self._backing.move(real, aside))

    def _within(self, parent: str, name: str, put: Callable[[str], None]) -> str:
        """Puts a file where unlinked ones are; beside it where that is on another filesystem."""
        aside = layout.join(HIDDEN_DIR, name)
        try:
            put(aside)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            aside = layout.join(parent, layout.TEMPORARY + name)
            put(aside)
        return aside

    def _take_back(self, path: str, aside: _Aside) -> None:
        """What was to replace a file was refused: the old one stands."""
        if not aside.moved:
            return
        with self._backing.moving:
            if not aside.staged:
                real = self._backing.elsewhere.forget(aside.hidden)
                if real is not None:
                    self._backing.move(real, path)
            elif aside.standing is not None:
                self._backing.move(aside.standing, path)
            self._handles.named(path, aside.hidden)
        self._touch(path)

    def _let_go(self, aside: _Aside | None) -> None:
        """It is neither to be replaced any more nor to come back."""
        if aside is not None and aside.standing is not None:
            with contextlib.suppress(FileNotFoundError):
                self._backing.unlink(aside.standing)

    def _is_one_file(self, old: str, aside: _Aside) -> bool:
        """Whether a file is to be replaced by another name of its own: then both names stay."""
        if aside.moved:
            return False
        before, after = self._backing.status(old), self._backing.status(aside.hidden)
        return os.path.samestat(before, after)

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
            self._backing.elsewhere.moved(before, after)
            self._handles.moved(before, after)

    def _goes(self, path: str) -> None:
        """Where a header goes, its program may be about to write another."""
        role, cube = layout.classify(path)
        if role is Role.META:
            self._headers.taken_away(cube, self._context())

    def _tell(self, old: str, new: str, flags: int) -> None:
        if layout.is_temporary(old):  # what was put together aside has its place
            if stat.S_ISDIR(self._backing.status(new).st_mode):
                self._headers.came_whole(new, self._context())
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
