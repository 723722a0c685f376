"""Bringing the index up to date with the files: one cube, or a whole store.

``refresh`` is for a path that was touched, by the filesystem's own closes or beside the mount;
``rescan`` is for everything that may have changed unseen: at mount, where events were lost, at a
rebuild. Both read only files whose status changed. Any thread, many at once.
"""

from __future__ import annotations

import contextlib
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from memfs.cube import layout
from memfs.index.history import take_history
from memfs.index.lmdb_index import Index
from memfs.vault.facts import CubeFacts, inspect
from memfs.vault.identity import adopt
from memfs.vault.publish import remove_leftover
from memfs.vault.sig import Sig
from memfs.vault.store import Store

Model = Mapping[str, str] | None
"""The resident model's part of the fingerprint, or None where no model is known."""

COMPLETE = "complete"
"""Name in the index's info that is set once it knows the whole store."""

_BUSY: set[tuple[int, str]] = set()
_FREE = threading.Condition()

_NO_SIGS: dict[str, Any] = {
    field.name: None for field in fields(CubeFacts) if field.name.endswith("_sig")
}


class Change(NamedTuple):
    """What the index said of a path, and says now; None stands for no cube."""

    path: str
    before: CubeFacts | None
    after: CubeFacts | None

    @property
    def matters(self) -> bool:
        """Whether more changed than by which status a file is known."""
        if self.before is None or self.after is None:
            return self.before is not self.after
        if self.before == self.after:
            return False
        return replace(self.before, **_NO_SIGS) != replace(self.after, **_NO_SIGS)

    @property
    def wrote(self) -> bool:
        """Whether that is so, or a file was written without changing what is known of it."""
        if self.matters or self.before is None or self.after is None:
            return self.matters
        return any(
            _content(getattr(self.before, n)) != _content(getattr(self.after, n)) for n in _NO_SIGS
        )


OnChange = Callable[[Change], None]
"""Is told of changes. As ``tell``: before the index takes one in, so that a process that is killed
between tells of it again, rather than never; as ``on_change``: after it, and where a file was
written that says the same as before, too.
"""


@dataclass
class Scan:
    """What a rescan found."""

    cubes: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    copies: int = 0
    """Copies that got an id of their own."""
    complete: bool = True
    """Whether it came to its end."""


def refresh(
    store: Store,
    index: Index,
    path: str,
    model: Model,
    *,
    adopting: bool = False,
    check_kv: bool = True,
    tell: OnChange | None = None,
) -> Change:
    """Looks at the cube at ``path`` and sets what the index says of it.

    A cube that is new, or whose payload.md changed, gets a meta.json where it has none. One that
    has merely lost it keeps its id without: it may be halfway through ``rm -r``.

    Args:
        adopting: whether a cube that lost its meta.json gets one again, too.
        check_kv: as for ``inspect``.
        tell: see ``OnChange``.

    Raises:
        OSError: the store cannot be read, or the index not written.
        IndexDamaged: see ``rebuild``.
    """
    change, owns = _look(store, index, path, model, adopting=adopting, check_kv=check_kv, tell=tell)
    if owns or change.after is None or change.after.id is None:
        return change
    owner = index.by_id(change.after.id)
    if owner is None or owner[0] == path:
        return change
    return change._replace(after=_tell_apart(store, index, path, owner[0], tell).after)


def refresh_all(
    store: Store,
    index: Index,
    paths: Iterable[str],
    model: Model,
    on_change: OnChange | None = None,
    tell: OnChange | None = None,
) -> None:
    """``refresh`` for all that a watcher's event touched: cubes, collections, gone directories."""
    gone: set[str] = set()
    there: set[str] = set()
    for path in paths:
        if _is_directory(store, path):
            there.add(path)
        else:
            gone.update(found for found, _ in index.under(path))
    # What is gone first: a cube that was moved is then known at its new path alone.
    for path in [*sorted(gone), *sorted(there)]:
        change = refresh(store, index, path, model, tell=tell)
        if on_change and change.wrote:
            on_change(change)


def rescan(
    store: Store,
    index: Index,
    model: Model,
    *,
    adopting: bool = False,
    known: Mapping[str, str] | None = None,
    leftovers_before: float | None = None,
    on_change: OnChange | None = None,
    tell: OnChange | None = None,
    is_busy: Callable[[str], bool] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scan:
    """Looks at every cube of the store; those that are gone are forgotten.

    Which of several cubes with one id is the original: the path that the index knew under it, else
    the one whose meta.json is oldest.

    Args:
        adopting: as for ``refresh``.
        known: ids by path as an older index had them, for a new one.
        leftovers_before: where given, what a crash left of publishing before that time is removed.
        is_busy: whether a cube is left as the index knows it, for this time.
        stop: asked now and then; the scan ends early where it says True.
        progress: told how many cubes were looked at.
    """
    scan, seen, new, known = Scan(), set(), set(), known or {}
    for path, names in store.walk():
        if stop and stop():
            scan.complete = False
            return scan
        if leftovers_before is not None:
            for name in filter(layout.is_temporary, names):
                remove_leftover(store, layout.join(path, name), leftovers_before)
        if not path or not layout.is_cube(names):
            continue
        seen.add(path)
        if is_busy and is_busy(path):
            continue
        change, _ = _look(
            store, index, path, model, adopting=adopting, known_id=known.get(path), tell=tell
        )
        if change.before is None or (change.after and change.before.id != change.after.id):
            new.add(path)
        _count(scan, change, on_change)
        if progress:
            progress(scan.cubes)
    for path in [path for path in index.paths() if path not in seen]:
        if stop and stop():
            scan.complete = False
            return scan
        _count(scan, refresh(store, index, path, model, tell=tell), on_change)
    for change in _tell_all_apart(store, index, new, known, tell):
        scan.copies += 1
        if on_change:
            on_change(change)
    index.set_info(COMPLETE, True)
    return scan


def _look(
    store: Store,
    index: Index,
    path: str,
    model: Model,
    *,
    adopting: bool,
    check_kv: bool = True,
    known_id: str | None = None,
    tell: OnChange | None = None,
) -> tuple[Change, bool]:
    """``refresh`` but for telling copies apart; and whether the path owns its id."""
    with _alone(index, path):
        before = index.get(path)
        after = inspect(store, path, before, model, check_kv=check_kv)
        if after is None:
            if before is not None:
                _told(Change(path, before, None), tell)
                index.remove(path)
            return Change(path, before, None), True
        if after.meta_sig is None:
            if after.id is None:
                after = replace(after, id=known_id)
            # Without an id it never had one: where that failed, the disk was full.
            if adopting or after.id is None or _is_written(before, after):
                after = adopt(store, path, after, lambda cube_id: _owner(index, cube_id))
        _told(Change(path, before, after), tell)
        owns = after == before or index.put(path, after)
        if after.id is not None and (before is None or before.id != after.id):
            take_history(store, index, path, after.id)
        return Change(path, before, after), owns


def _tell_all_apart(
    store: Store,
    index: Index,
    new: set[str],
    known: Mapping[str, str],
    tell: OnChange | None,
) -> Iterator[Change]:
    """Gives every copy an id of its own; ``new`` and ``known`` are as in ``rescan``."""
    for cube_id in index.shared_ids():
        # False stands before True: known under this id, not new, the oldest header, by name.
        original, *copies = sorted(
            index.paths_of(cube_id),
            key=lambda path: (
                bool(known) and known.get(path) != cube_id,
                path in new,
                _header_time(store, path),
                path,
            ),
        )
        for path in copies:
            change = _tell_apart(store, index, path, original, tell)
            if change.matters:
                yield change


def _tell_apart(
    store: Store, index: Index, path: str, original: str, tell: OnChange | None
) -> Change:
    """Gives the copy at ``path`` an id of its own, where ``original`` still has the same."""
    with _alone(index, path):
        before = index.get(path)
        if before is None:
            return Change(path, None, None)
        after = adopt(store, path, before, lambda _: original)
        if after != before:
            _told(Change(path, before, after), tell)
            index.put(path, after)
        return Change(path, before, after)


def _told(change: Change, tell: OnChange | None) -> None:
    if tell and change.matters:
        tell(change)


def _header_time(store: Store, path: str) -> int:
    try:
        return store.stat(layout.join(path, layout.META)).st_ctime_ns
    except OSError:
        return 0


def _content(sig: Sig | None) -> Sig | None:
    """What of a Sig a change of owner or mode leaves as it is."""
    return sig.unsettled() if sig else None


def _is_written(before: CubeFacts | None, after: CubeFacts) -> bool:
    """Whether the cube is new or its text was written, by the file's times rather than its Sig."""
    if before is None or before.payload_sig is None or after.payload_sig is None:
        return before is None or before.payload_sig is not after.payload_sig
    return before.payload_sig[:3] != after.payload_sig[:3]


def _owner(index: Index, cube_id: str) -> str | None:
    found = index.by_id(cube_id)
    return found[0] if found else None


def _count(scan: Scan, change: Change, on_change: OnChange | None) -> None:
    before, after = change.before, change.after
    scan.cubes += after is not None
    scan.added += before is None and after is not None
    scan.removed += before is not None and after is None
    scan.changed += before is not None and after is not None and change.matters
    if on_change and change.wrote:
        on_change(change)


def _is_directory(store: Store, path: str) -> bool:
    try:
        return stat.S_ISDIR(store.stat(path).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _alone(index: Index, path: str) -> Iterator[None]:
    """One thread at a time looks at a path, or an older look could overwrite a younger one."""
    key = (id(index), path)
    with _FREE:
        _FREE.wait_for(lambda: key not in _BUSY)
        _BUSY.add(key)
    try:
        yield
    finally:
        with _FREE:
            _BUSY.discard(key)
            _FREE.notify_all()
