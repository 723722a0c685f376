"""Opening the index whatever state it is in, and making it again from the files.

A new index is made beside the old one and put in its place by a rename, so at any instant there
is a whole one or none; none is made again at the next mount. What no file says, counts that are
not in a meta.json yet, is taken from the old one as far as a child process can read it. Used by the
mount and ``memfs index``, under the store's lock; any thread, one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memfs.errors import IndexDamaged
from memfs.index.check import salvage, sound
from memfs.index.environment import sync_directory
from memfs.index.lmdb_index import Index, Usage
from memfs.index.refresh import COMPLETE, Model, rescan
from memfs.vault.store import Store, give_to_owner

MODEL = "model"
"""Name in the index's info of the last known model's part of the fingerprint."""
REBUILT = "rebuilt"
"""Name of the last rebuild's report."""

_NAME = "index"
_OWN_INFO = frozenset({"format", COMPLETE, REBUILT})


@dataclass(frozen=True)
class Report:
    """What a rebuild did."""

    cubes: int
    copies: int
    """Copies that got an id of their own."""
    usage: int
    """Counters that came from the old index; the others came from meta.json."""
    seconds: float


def index_directory(store: Store) -> Path:
    """Where the index of a store is kept, where the store can be written."""
    return store.control_dir / _NAME


def leftovers(directory: Path) -> list[Path]:
    """What a crash left beside an index of making it again; removed when it is next opened."""
    return _beside(directory, "new") + _beside(directory, "old")


def open_or_empty(store: Store) -> tuple[Index, str | None]:
    """The store's index, at once, and why it does not know the store yet (None where it does).

    One that is missing or not to be trusted is replaced by an empty one, with the old one's
    usage. ``rescan``, which a mount owes it in any case, fills it. That of a read-only
    store is a temporary one.
    """
    if not store.writable:
        scratch = Path(tempfile.mkdtemp(prefix="memfs-index-"))
        return Index.open(scratch, temporary=True), "the store is read-only"
    directory = index_directory(store)
    _restore(directory)
    for stale in leftovers(directory):
        _discard(stale)
    reason = sound(directory)
    if reason is None:
        try:
            index = Index.open(directory)
            return index, None if index.get_info(COMPLETE) else "the last scan did not end"
        except IndexDamaged as e:
            reason = e.detail
    fresh = _fresh(directory)
    with contextlib.closing(Index.open(fresh)) as index:
        _carry_over(directory, index)
    _swap(store, directory, fresh)
    return Index.open(directory), reason


def open_or_rebuild(
    store: Store, model: Model = None, progress: Callable[[int], None] | None = None
) -> tuple[Index, str | None]:
    """The store's index, filled, and why it had to be (None where it had not)."""
    index, reason = open_or_empty(store)
    if reason is not None:
        try:
            rescan(store, index, model or index.get_info(MODEL), progress=progress)
        except BaseException:
            index.close()
            raise
    return index, reason


def rebuild(
    store: Store,
    directory: Path,
    model: Model = None,
    progress: Callable[[int], None] | None = None,
    *,
    index: Index | None = None,
) -> Report:
    """Makes the index in ``directory`` again from the files alone, and puts it in place.

    Args:
        model: where None, the model that the old index knew.
        progress: told how many cubes are done.
        index: the open index of that directory, where there is one. It goes on answering meanwhile,
            if it can; it is mended in place: its holders need do nothing.
    """
    started = time.monotonic()
    _restore(directory)
    fresh = _fresh(directory)
    model = model or dict(salvage(directory, "info")).get(MODEL)
    known = {path: cube_id for path, cube_id in salvage(directory, "cubes") if cube_id}
    new = Index.open(fresh)
    try:
        scan = rescan(store, new, model, known=known, progress=progress)
        with contextlib.nullcontext() if index is None else index.exchanged():
            usage = _carry_over(directory, new)
            seconds = round(time.monotonic() - started, 3)
            report = Report(scan.cubes, scan.copies, usage, seconds)
            new.set_info(REBUILT, dataclasses.asdict(report))
            if model is not None:
                new.set_info(MODEL, dict(model))
            new.close()
            _swap(store, directory, fresh)
    except BaseException:
        new.close()
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if index is not None:
        rescan(store, index, model)  # what changed while the new one was made
    return report


def _carry_over(old: Path, new: Index) -> int:
    """Takes from the old index what no file says; how many counters that was."""
    usage = new.merge_usage(
        (cube_id, Usage(reads, questions, last), unwritten)
        for cube_id, reads, questions, last, unwritten in salvage(old, "usage")
    )
    for name, value in salvage(old, "info"):
        if name not in _OWN_INFO:
            new.set_info(name, value)
    return usage


def _fresh(directory: Path) -> Path:
    """A name beside the index for one to be made; what a crash left of such is removed."""
    for stale in _beside(directory, "new"):
        _discard(stale)
    return directory.with_name(f"{directory.name}.new-{secrets.token_hex(4)}")


def _swap(store: Store, directory: Path, fresh: Path) -> None:
    """Puts the closed index at ``fresh`` in the place of the one at ``directory``."""
    for path in (fresh, *fresh.iterdir()) if store.writable else ():
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            give_to_owner(store, fd)
        finally:
            os.close(fd)
    if os.path.lexists(directory):
        directory.rename(directory.with_name(f"{directory.name}.old-{secrets.token_hex(4)}"))
    fresh.rename(directory)
    sync_directory(directory.parent)
    for old in _beside(directory, "old"):
        _discard(old)


def _restore(directory: Path) -> None:
    """Takes back the old index where a crash fell between the two renames of ``_swap``."""
    if not os.path.lexists(directory):
        for old in _beside(directory, "old")[:1]:
            old.rename(directory)


def _beside(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.parent.glob(f"{directory.name}.{kind}-*"))


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
