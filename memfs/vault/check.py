"""Checking the files of a store: what a crash left, what no cube can use, headers, digests.

``memfs fsck`` walks the store and gives every directory, and the facts of every cube as just read
from its files, to one ``FileCheck``; the index is checked beside (``memfs.index.problems``). A
problem's repair moves what is of no use aside and never deletes anything. On a store that is at
work a problem may be a change halfway: the caller looks twice. One thread.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, MemfsError, NotAllowed
from memfs.vault.aside import Aside
from memfs.vault.facts import MAX_PAYLOAD, CubeFacts, with_meta
from memfs.vault.identity import adopt, holder, read_meta
from memfs.vault.problem import Problem
from memfs.vault.publish import publish_bytes
from memfs.vault.sig import sig_of
from memfs.vault.store import HIDDEN_DIR, Store
from memfs.vault.versions import records

_ADAPTER = f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}"
_NEEDED = (layout.PAYLOAD, layout.KV, layout.META, _ADAPTER)
"""Files of a cube that have to be regular ones."""

Known = Callable[[str], CubeFacts | None]
"""What an index says of a path."""


class FileCheck:
    """One check of a store's files."""

    def __init__(self, store: Store, known: Known, owner: Callable[[str], str | None]) -> None:
        """Nothing is looked at yet.

        Args:
            owner: the path to which an index gives an id.
        """
        self._store = store
        self._known = known
        self._owner = owner
        self._aside = Aside(store)
        self._ids: dict[str, str] = {}  # by path

    def directory(self, path: str, names: Iterable[str]) -> Iterator[Problem]:
        """Names in a directory that are memfs's own and that nobody is publishing under."""
        for name in sorted(filter(layout.is_temporary, names)):
            found = layout.join(path, name)
            if name.startswith(layout.INCOMING):
                continue  # memfs load may be at it; what it left, the next mount removes
            if not self._is_being_written(found):
                what = "what a crash left of writing a file"
                yield Problem("files", found, what, self._set_aside(found))

    def cube(self, path: str, facts: CubeFacts | None) -> Iterator[Problem]:
        """A cube's files, as ``inspect`` has just read them without looking at what was known.

        None stands for a cube that is gone by now.
        """
        self._ids.pop(path, None)
        if facts is None:
            return
        irregular = list(self._irregular(path))
        yield from irregular
        passed_over = {problem.path for problem in irregular}
        for check in (self._header, self._payload, self._blobs):
            yield from (p for p in check(path, facts) if p.path not in passed_over)

    def sharing(self) -> list[tuple[str, list[str]]]:
        """Ids that several of the cubes have that were looked at, and their paths."""
        by_id: dict[str, list[str]] = {}
        for path, cube_id in self._ids.items():
            by_id.setdefault(cube_id, []).append(path)
        return [(cube_id, paths) for cube_id, paths in by_id.items() if len(paths) > 1]

    def copies(self) -> Iterator[Problem]:
        """Cubes that have the id of another one, from which they were copied."""
        for cube_id, paths in self.sharing():
            original, *copies = sorted(paths, key=lambda path: self._rank(cube_id, path))
            for path in copies:
                what = f"it has the id of {original} ({cube_id})"
                mend = self._tell_apart(path, original)
                yield Problem("metadata", layout.join(path, layout.META), what, mend)

    def unlinked(self) -> Iterator[Problem]:
        """Files that were deleted while they were open, in a mount that did not end cleanly."""
        try:
            directory = self._store.open_dir(HIDDEN_DIR)
        except (FileNotFoundError, PermissionError):
            return
        except OSError as e:
            yield unreadable(HIDDEN_DIR, e)
            return
        try:
            names = sorted(os.listdir(directory))
        finally:
            os.close(directory)
        for name in names:
            path = layout.join(HIDDEN_DIR, name)
            what = "it was deleted while it was open, and the mount was killed"
            yield Problem("files", path, what, self._set_aside(path))

    def _is_being_written(self, path: str) -> bool:
        """Whether a temporary file's writer is alive: it holds a lock. Gone by now is as good."""
        try:
            fd = self._store.open_regular(path)
        except FileNotFoundError:
            return True
        except (OSError, NotAllowed):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def _irregular(self, cube: str) -> Iterator[Problem]:
        for name in _NEEDED:
            path = layout.join(cube, name)
            try:
                found = self._store.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as e:
                if name != _ADAPTER:  # a symlink called adapter is no business of ours
                    yield unreadable(path, e)
                continue
            if not stat.S_ISREG(found.st_mode):
                what = f"it is {_kind(found.st_mode)}, where memfs uses only a regular file"
                yield Problem("files", path, what, self._set_aside(path))

    def _header(self, cube: str, facts: CubeFacts) -> Iterator[Problem]:
        path = layout.join(cube, layout.META)
        try:
            meta = read_meta(self._store, cube)
        except FileNotFoundError:
            if facts.payload_state == "ready":
                mend = self._write_header(cube, facts)
                yield Problem("metadata", path, "the cube has a text and no header", mend)
            return
        except InvalidMetadata as e:
            yield Problem("metadata", path, e.detail, self._replace_header(cube, facts))
            return
        except (OSError, NotAllowed) as e:
            yield unreadable(path, e)
            return
        self._ids[cube] = metadata.cube_id(meta)
        rejected = layout.join(cube, layout.REJECTED)
        try:
            found = self._store.stat(rejected)
            if found.st_mtime_ns > self._store.stat(path).st_mtime_ns:
                what = "a header that was refused, and none was saved since"
                yield Problem("metadata", rejected, what, self._set_aside(rejected))
        except FileNotFoundError:
            return

    def _payload(self, cube: str, facts: CubeFacts) -> Iterator[Problem]:
        path = layout.join(cube, layout.PAYLOAD)
        if facts.payload_state != "ready":
            return
        if facts.payload_sha256 is None:
            if facts.payload_bytes <= MAX_PAYLOAD:
                yield unreadable(path, self._why(path))
            return
        known = self._known(cube)
        if (
            known is not None
            and known.payload_sha256 not in (None, facts.payload_sha256)
            and known.payload_sig == facts.payload_sig
        ):
            what = (
                f"its bytes changed and its times did not: sha256 was {known.payload_sha256},"
                f" is {facts.payload_sha256}; compare it with a backup"
            )
            yield Problem("digests", path, what)

    def _blobs(self, cube: str, facts: CubeFacts) -> Iterator[Problem]:
        for name, state, reason in (
            (layout.KV, facts.kv_state, facts.kv_reason),
            (_ADAPTER, facts.adapter_state, facts.adapter_reason),
        ):
            path = layout.join(cube, name)
            if state == "corrupt":
                yield Problem("digests", path, reason or "it is damaged", self._set_aside(path))
        if facts.kv_state == "unchecked" and facts.kv_model is None:
            path = layout.join(cube, layout.KV)
            yield unreadable(path, self._why(path))

    def _why(self, path: str) -> OSError | NotAllowed:
        """Why a file cannot be read."""
        try:
            fd = self._store.open_regular(path)
            try:
                while os.read(fd, 1 << 20):
                    pass
            finally:
                os.close(fd)
        except (OSError, NotAllowed) as e:
            return e
        return OSError(0, "it could not be read a moment ago")

    def _rank(self, cube_id: str, path: str) -> tuple[bool, int, str]:
        """Sorts an original before its copies, as a rescan does."""
        header = self._store.stat(layout.join(path, layout.META))
        return self._owner(cube_id) != path, header.st_ctime_ns, path

    # Repairs

    def _set_aside(self, path: str) -> Callable[[], str]:
        return lambda: f"set aside as {self._aside.put(path)}"

    def _replace_header(self, cube: str, facts: CubeFacts) -> Callable[[], str]:
        def mend() -> str:
            path = layout.join(cube, layout.META)
            moved = self._aside.put(path)
            try:
                written = self._write_header(cube, facts)()
            except (OSError, MemfsError):
                self._aside.take_back(moved, path)
                raise
            return f"set aside as {moved}; {written}"

        return mend

    def _write_header(self, cube: str, facts: CubeFacts) -> Callable[[], str]:
        def mend() -> str:
            known = self._known(cube) or facts
            cube_id = known.id or self._id_in_versions(cube)
            kept = self._kept_header(cube_id) if cube_id is not None else None
            if kept is not None and self._owner(str(cube_id)) in (None, cube):
                path = layout.join(cube, layout.META)
                like = holder(self._store, cube)
                publish_bytes(self._store, path, kept, like=like, replace=False)
                return f"the header of its last version was written, with its id {cube_id}"
            bare = replace(known, id=cube_id, meta_sig=None, meta_reason=None)
            found = adopt(self._store, cube, bare, self._owner)
            if found.meta_sig is None:
                raise MemfsError(f"{cube}/{layout.META} could not be written")
            said = "its id" if found.id == cube_id else "a new id"
            return f"a header was written, with {said} {found.id}"

        return mend

    def _id_in_versions(self, cube: str) -> str | None:
        """The id of the cube that was last known at a path, by its versions."""
        taken = set(self._ids.values())
        for cube_id in records.cube_ids(self._store):
            newest = None if cube_id in taken else records.newest(self._store, cube_id)
            if newest is not None and newest.path == cube and not newest.deleted:
                return cube_id
        return None

    def _kept_header(self, cube_id: str) -> bytes | None:
        """The header in the newest version that has a valid one."""
        for stamp in reversed(records.stamps(self._store, cube_id)):
            path = layout.join(records.directory(cube_id, stamp), layout.META)
            try:
                data = self._store.read(path, metadata.MAX_BYTES)
                if metadata.cube_id(metadata.parse(data)) == cube_id:
                    return data
            except (OSError, InvalidMetadata, NotAllowed):
                continue
        return None

    def _tell_apart(self, cube: str, original: str) -> Callable[[], str]:
        def mend() -> str:
            meta = read_meta(self._store, cube)
            status = self._store.stat(layout.join(cube, layout.META))
            facts = with_meta(CubeFacts(), meta, sig_of(status))
            found = adopt(self._store, cube, facts, lambda _: original)
            if found.id in (None, facts.id):
                raise MemfsError(f"{cube}/{layout.META} could not be written")
            return f"it is a copy, and has now the id {found.id}"

        return mend


def unreadable(path: str, error: OSError | NotAllowed) -> Problem:
    """That something in the store may not, or cannot, be read."""
    reason = error.strerror if isinstance(error, OSError) else error.detail
    return Problem("files", path, f"it cannot be read: {reason}")


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symlink"
    return "a directory" if stat.S_ISDIR(mode) else "a device, socket or pipe"
