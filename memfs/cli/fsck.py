"""``memfs fsck``: checks all that a store holds, and repairs it.

Every part that keeps something on disk has its own check; here they are gathered, and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memfs.cli import output
from memfs.cube import layout
from memfs.errors import MemfsError, MountFailed, NotAllowed
from memfs.filesystem import registry
from memfs.index.compare import SETTLE_S
from memfs.index.problems import IndexCheck
from memfs.vault.check import FileCheck, unreadable
from memfs.vault.facts import inspect
from memfs.vault.lock import lock
from memfs.vault.problem import Problem
from memfs.vault.store import Store
from memfs.vault.trail import records as trail
from memfs.vault.versions import check
from memfs.vault.versions import records as versions

HELP = "check everything a store holds, and repair it"
EPILOG = """\
examples:
  memfs fsck ~/store             check files, headers, digests, versions, trail, index
  memfs fsck --repair ~/store    and mend what is wrong
  memfs fsck --json ~/mem        of a mounted store, for a script

Every file of every cube is read. A store that is not mounted is locked meanwhile; one that is
mounted can be checked, where changes under way are looked at twice, and not repaired; so can
one that you may only read.

--repair deletes nothing: what is of no use where it lies is moved to STORE/.memfs/aside/TIME/,
under the path that it had. A header that is missing or broken is written anew from the last
version that had one, or from what the index remembers, with the same id; the index is made
again from the files. A broken chain of the audit trail stays as it is: what was lost of it
cannot come back.

exit status: 0 nothing is wrong, or all was mended; 1 problems remain; 9 the store is in use.
"""

_ORDER = ("files", "metadata", "digests", "versions", "trail", "index")
"""In which areas are mended: the index last, from files that are right by then."""


@dataclass
class Line:
    """A problem, and what became of it."""

    problem: Problem
    mended: str | None = None
    failed: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a store, or a mount")
    parser.add_argument(
        "--repair", action="store_true", help="mend what can be, set aside the rest"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    record, _ = registry.find(args.store) or (registry.at(args.store), "")
    mountpoint = record.mountpoint if record is not None and record.alive is not False else None
    if args.repair and mountpoint is not None:
        raise MountFailed(
            f"{args.store} is mounted at {mountpoint}, and only checked;"
            f" to repair it: memfs umount {mountpoint}"
        )
    root = Path(record.store if record is not None else args.store)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(root, create_control=args.repair))
        if args.repair and not store.writable:
            raise NotAllowed(f"{store.root} cannot be written, and only checked")
        if mountpoint is None:
            stack.enter_context(lock(store, "is being checked by memfs fsck"))
        progress = stack.enter_context(output.Progress())
        index = stack.enter_context(IndexCheck(store, live=mountpoint is not None))
        check = _Check(store, index, live=mountpoint is not None, progress=progress)
        lines = [Line(problem) for problem in check.problems()]
        if args.repair:
            _repair(lines, index, progress)
    left = sum(line.mended is None for line in lines)
    if args.json:
        output.print_json(
            {
                "store": str(store.root),
                "mountpoint": mountpoint,
                "cubes": check.cubes,
                "problems": [_as_json(line) for line in lines],
                "left": left,
            }
        )
    else:
        _print(lines, check.cubes, left, repaired=args.repair)
    return 1 if left else 0


class _Check:
    """One walk over a store, in which every part looks at what is its own."""

    def __init__(
        self, store: Store, index: IndexCheck, *, live: bool, progress: output.Progress
    ) -> None:
        self.cubes = 0
        self._store = store
        self._index = index
        self._files = FileCheck(store, index.known, index.owner)
        self._live = live
        self._progress = progress

    def problems(self) -> list[Problem]:
        """Everything that is wrong."""
        found: list[Problem] = []
        by_cube: dict[str, list[Problem]] = {}

        def failed(path: str, error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                found.append(unreadable(path or ".", error))

        for path, names in self._store.walk(failed=failed):
            if not self._live:  # what a crash left, a mount has cleared or is about to
                found += self._files.directory(path, names)
            if path and layout.is_cube(names):
                by_cube[path] = self._look(path)
                self._progress.update(f"{output.number(len(by_cube))} cubes")
        self.cubes = len(by_cube)
        by_cube |= {path: self._look(path) for path in self._index.missing(by_cube)}
        if self._live:
            self._look_again(by_cube)
        else:
            found += self._files.unlinked()
        found += [problem for path in sorted(by_cube) for problem in by_cube[path]]
        found += self._files.copies()
        found += self._rest(trail.TRAIL, trail.problems(self._store))
        found += self._rest(versions.ROOT, self._versions())
        found += self._index.whole()
        return sorted(found, key=lambda problem: _ORDER.index(problem.area))

    def _rest(self, path: str, problems: Iterator[Problem]) -> list[Problem]:
        """What is wrong with something that lies in a directory of its own."""
        try:
            return list(problems)
        except (OSError, NotAllowed) as e:
            if self._store.read_only and isinstance(e, PermissionError):
                self._progress.step(f"{path} is its owner's alone: it was not checked")
                return []
            return [unreadable(path, e)]

    def _versions(self) -> Iterator[Problem]:
        def progress(count: int) -> None:
            self._progress.update(f"{output.number(count)} versions")

        return check.problems(self._store, live=self._live, progress=progress)

    def _look(self, path: str) -> list[Problem]:
        """What is wrong with one cube."""
        try:
            facts = inspect(self._store, path, None, self._index.model)
        except OSError as e:
            return [unreadable(path, e)]
        return [*self._files.cube(path, facts), *self._index.cube(path, facts)]

    def _look_again(self, by_cube: dict[str, list[Problem]]) -> None:
        """Looks once more at what may have been a change halfway, when that must have ended."""
        doubtful = {path for path, found in by_cube.items() if found}
        doubtful.update(path for _, paths in self._files.sharing() for path in paths)
        if doubtful:
            time.sleep(SETTLE_S)
            by_cube |= {path: self._look(path) for path in sorted(doubtful)}


def _repair(lines: list[Line], index: IndexCheck, progress: output.Progress) -> None:
    for number, line in enumerate(lines, 1):
        progress.update(f"mending {output.number(number)} of {output.number(len(lines))}")
        if line.problem.mend is not None:
            try:
                line.mended = line.problem.mend()
            except MemfsError as e:
                line.failed = str(e)
            except OSError as e:
                line.failed = e.strerror
    if any(line.mended for line in lines) and not any(
        line.problem.mend is index.mend for line in lines
    ):
        index.bring_up_to_date()


def _as_json(line: Line) -> dict[str, str | bool | None]:
    problem = line.problem
    return {
        "area": problem.area,
        "path": problem.path,
        "what": problem.what,
        "mendable": problem.mend is not None,
        "mended": line.mended,
        "failed": line.failed,
    }


def _print(lines: list[Line], cubes: int, left: int, *, repaired: bool) -> None:
    for line in lines:
        problem = line.problem
        print(f"{output.plain(problem.path)}: {output.plain(problem.what)} [{problem.area}]")
        if line.mended is not None:
            print(f"  {output.styled('mended', 'green')}: {output.plain(line.mended)}")
        elif line.failed is not None:
            print(f"  {output.styled('not mended', 'red')}: {output.plain(line.failed)}")
    counted = f"{output.number(cubes)} {'cube' if cubes == 1 else 'cubes'}"
    if not lines:
        print(f"{counted}: nothing is wrong")
        return
    said = f"{counted}: {_count(len(lines))}"
    if repaired:
        said += ", all mended" if not left else f", {output.number(left)} not mended"
    else:
        mendable = sum(line.problem.mend is not None for line in lines)
        said += f"; memfs fsck --repair mends {output.number(mendable)}" if mendable else ""
    print(said)


def _count(problems: int) -> str:
    return f"{output.number(problems)} {'problem' if problems == 1 else 'problems'}"
