"""The whole meaning of the mount: one method a file operation, and no FUSE.

Paths are as in ``memfs.cube.layout``. Operations raise OSError or MemfsError, which has an errno
too. Files go through to the store (``backing``); those that mean something are handed to who knows
them: headers, blobs, the control tree. What changes a cube tells the catalogue before it returns.
Names are made and removed by ``names``, files opened by ``opening``.

**Threads.** FUSE calls from many at once. libfuse itself keeps a rename or removal apart from
whatever uses the same path. No operation waits for the model, but an ``open`` or ``read`` of a KV
cache that is being made (see ``making``).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from memfs.cube import layout
from memfs.cube.acl import XATTR, Acl
from memfs.cube.layout import Role
from memfs.filesystem.attributes import Status, altered, shown_as
from memfs.filesystem.backing import Backing, is_reserved
from memfs.filesystem.blobs import Blobs
from memfs.filesystem.catalogue import Catalogue
from memfs.filesystem.context import Context, creates, likely_creates
from memfs.filesystem.control import Control, ControlDirectory, MountFacts
from memfs.filesystem.guard import Guard
from memfs.filesystem.handles.handle import Handle, OpenDirectory, OpenFile
from memfs.filesystem.handles.making import Makers
from memfs.filesystem.handles.passthrough import Passed
from memfs.filesystem.handles.reading import Reading
from memfs.filesystem.header import Headers
from memfs.filesystem.link import Link
from memfs.filesystem.names import Names
from memfs.filesystem.opening import STAGED, Opening
from memfs.filesystem.past.tree import Past, PastDirectory, read_only
from memfs.filesystem.syscalls import Time
from memfs.filesystem.xattrs import CubeAttributes
from memfs.vault.rights import acl_of, carry_over
from memfs.vault.sig import sig_of

WAITERS = 32
"""Who may wait for a KV cache at once; a mount has twice as many threads."""


class Tree:
    """A mounted store."""

    def __init__(
        self,
        mount: MountFacts,
        backing: Backing,
        catalogue: Catalogue,
        link: Link,
        context: Callable[[], Context],
    ) -> None:
        """``context`` says who asks for the operation that the calling thread is in."""
        self.handles = catalogue.handles
        self.passthrough = self.handles.passthrough
        self._backing = backing
        self._catalogue = catalogue
        self._context = context
        self._guard = Guard(catalogue, context)
        self._headers = Headers(backing, catalogue, self._guard)
        self._makers = Makers(link, WAITERS)
        reading = Reading(link, catalogue, mount_on_read=mount.mount_on_read)
        self._blobs = Blobs(backing, catalogue, reading, self._makers, self._guard, context)
        self._past = Past(catalogue, context)
        self._control = Control(mount, catalogue, link, self.passthrough, self._past, context)
        self._attributes = CubeAttributes(backing, catalogue, link, self._guard, context)
        self.opening = Opening(
            backing,
            self.handles,
            catalogue,
            self._headers,
            self._blobs,
            self._control,
            self._past,
            self._guard,
            context,
        )
        self.names = Names(
            backing,
            self.handles,
            catalogue,
            self._headers,
            link,
            self.opening,
            self._guard,
            context,
        )

    def status(self, path: str) -> Status:
        """What ``stat`` answers."""
        self._makers.looked_at(path, self._context)
        self.names.looked_at(path)
        role, cube = layout.classify(path)
        if role is Role.CONTROL:
            return self._control.status(path)
        if role is Role.PAST:
            return self._past.status(path)
        found = self._status(path, role, cube)
        if cube:
            self._guard.looked_at(path, cube, found)
        elif stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o004:
            self._guard.looked_at(path, path, found)
        return found

    def _status(self, path: str, role: Role, cube: str) -> Status:
        """Of a file of the store, or one that it is shown to have."""
        if role is Role.META:
            return self._header_status(path, cube)
        if role in STAGED:
            return self._links_counted(self._blobs.status(path, role, cube))
        self._require_shown(path)
        return self._links_counted(self._backing.status(path), self.names.is_hidden(path))

    def open_status(self, number: int) -> Status | None:
        """What ``fstat`` answers, where the open file says it; else its path is to be asked."""
        found = self.handles.get(number).status()
        return None if found is None else self._links_counted(found, self.handles.is_hidden(number))

    def opened(self, handle: Handle) -> tuple[int, Passed | None]:
        """The number of a newly opened file, and what the kernel is to read instead of asking."""
        added = self.handles.add(handle)
        # A freeze tells the files that are open; one that came before this line did not tell it.
        writes = isinstance(handle, OpenFile) and not handle.passes
        if writes and handle.path is not None and self._guard.is_frozen(handle.path):
            handle.frozen = True
        return added

    def release(self, number: int) -> None:
        """Closes an open file or directory for good."""
        handle = self.handles.remove(number)
        if handle is None:
            return
        try:
            handle.release()
        finally:
            if handle.writes:
                self._catalogue.keeper.closed()

    def entries(self, handle: Handle) -> Iterator[tuple[str, int, int]]:
        """Name, kind and inode of what is in an open directory, ``.`` and ``..`` included."""
        if isinstance(handle, ControlDirectory | PastDirectory):
            yield from handle.entries()
        elif isinstance(handle, OpenDirectory):
            for name, kind, ino in handle.entries():
                yield name, kind, self._blobs.inode(ino) if name == layout.KV else ino
        else:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def readlink(self, path: str) -> str:
        if layout.classify(path)[0] is Role.CONTROL:
            return self._control.readlink(path)
        self._require_ours(path, errno.EINVAL)  # the past has no symlinks
        return self._backing.readlink(path)

    def chmod(self, path: str, mode: int) -> None:
        self._require_writable(path)
        self._backing.chmod(path, mode)
        self._governed(path)

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Changes owner and group; -1 leaves one as it is."""
        self._require_writable(path)
        was = self._backing.status(path).st_uid
        self._backing.chown(path, uid, gid)
        self._governed(path, was=was)

    def utimens(self, path: str, accessed: Time, modified: Time) -> None:
        self._require_writable(path)
        self._backing.utimens(path, accessed, modified)

    def truncate(self, path: str, length: int) -> None:
        """Sets the length of a file by its path."""
        self._require_writable(path)
        role, _ = layout.classify(path)
        if role in STAGED:
            self._backing.status(path)  # one that could only be made cannot be cut
            handle = self.opening.open_staged(path, role)
            try:
                handle.truncate(length)
                handle.flush()
            finally:
                handle.release()
            return
        self._backing.truncate(path, length)
        if role in (Role.PAYLOAD, Role.ADAPTER_CONFIG):
            self.opening.written(path)

    def statfs(self) -> os.statvfs_result:
        return self._backing.statfs()

    def getxattr(self, path: str, name: str) -> bytes:
        if layout.classify(path)[0] is Role.PAST:
            return self._past.getxattr(path, name)
        self._require_ours(path, errno.ENODATA)
        return self._attributes.get(path, name)

    def listxattr(self, path: str) -> list[str]:
        if layout.classify(path)[0] in (Role.CONTROL, Role.PAST):
            return []
        self._require_shown(path)
        return self._attributes.names(path)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        self._require_writable(path)
        before = self._acl_before(path, name)
        self._attributes.set(path, name, value, flags)
        if name == XATTR:
            self._drop_setgid(path)
        if before is not None:
            self._governed(path, before=before)

    def removexattr(self, path: str, name: str) -> None:
        self._require_writable(path)
        before = self._acl_before(path, name)
        self._attributes.remove(path, name)
        if before is not None:
            self._governed(path, before=before)

    def _drop_setgid(self, path: str) -> None:
        """Who gives an access list to a file of a group that is not his takes its setgid bit.

        The kernel leaves that to the disk, which does not do it to root's mount.
        """
        found, caller = self._backing.status(path), self._context().caller()
        if found.st_mode & stat.S_ISGID and caller.uid != 0 and found.st_gid not in caller.gids:
            self._backing.chmod(path, found.st_mode & ~stat.S_ISGID)

    def _header_status(self, path: str, cube: str) -> Status:
        found = self._backing.status(path)
        if path in self._backing.elsewhere or not stat.S_ISREG(found.st_mode):
            return found
        if self._catalogue.is_fresh(cube, sig_of(found)):
            pid = self._context().pid
            creating = creates(pid)
            if likely_creates(pid) if creating is None else creating:
                # memfs made it a moment ago, and whoever copies a cube here brings the real one.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return shown_as(self._links_counted(found), len(self._headers.shown(cube)))

    def _links_counted(self, found: Status, hidden: bool = False) -> Status:
        """``found`` without the links by which files are kept that were unlinked while open.

        libfuse takes one off by itself for a file that it knows as ``hidden``, where one is left.
        """
        kept = self._backing.elsewhere.links(found) if isinstance(found, os.stat_result) else 0
        if not kept:
            return found
        links = found.st_nlink - kept
        return altered(found, st_nlink=links + 1 if links and hidden else links)

    def _acl_before(self, path: str, name: str) -> Acl | None:
        """The access list of a text that is about to get another one; else None."""
        if name != XATTR or layout.classify(path)[0] is not Role.PAYLOAD:
            return None
        return acl_of(self._backing.store, self._backing.elsewhere.get(path, path))

    def _governed(self, path: str, *, was: int | None = None, before: Acl | None = None) -> None:
        """Owner, group, mode and access list of the text are the cube's."""
        role, cube = layout.classify(path)
        if role is Role.PAYLOAD:
            by = self._context()
            carry_over(self._backing.store, cube, by.uid, was=was, before=before)
            self._catalogue.touch(cube, by=by)

    def _require_shown(self, path: str) -> None:
        if is_reserved(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _require_writable(self, path: str) -> None:
        """Raises where nothing can be set: also in a frozen cube."""
        self._require_ours(path)
        self._guard.require_writable(path)

    def _require_ours(self, path: str, number: int = errno.EPERM) -> None:
        """Raises for the control tree, where nothing can be set, and for memfs's own files."""
        role, _ = layout.classify(path)
        if role is Role.PAST and number == errno.EPERM:
            raise read_only(path)
        if role in (Role.CONTROL, Role.PAST):
            raise OSError(number, os.strerror(number), path)
        self._require_shown(path)
