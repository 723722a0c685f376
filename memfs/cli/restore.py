"""``memfs restore``: a cube is again what one of its versions was."""

from __future__ import annotations

import argparse
import contextlib
import os
import time

from memfs.cli import histories, output
from memfs.cli.histories import History
from memfs.config import Config
from memfs.errors import InvalidRequest, MemfsError, NotAllowed
from memfs.vault.frozen import Frozen
from memfs.vault.lock import lock
from memfs.vault.versions import making, records, restore
from memfs.vault.versions.look import look
from memfs.vault.versions.records import Version

HELP = "bring back a version of a cube, or a deleted cube"
EPILOG = """\
examples:
  memfs restore ~/mem/handbook                         undo the last change
  memfs restore ~/mem/handbook 2026-11-22T10:42        as it was then
  memfs restore ~/mem/gone                             a deleted cube, by the path it had
  cp -a ~/mem/handbook/.versions/2026-…Z ~/mem/old     a version beside it, as a cube of its own

Nothing is lost by it: what is replaced is a version itself, and restoring is a change like any
other. Where no version holds it (it is too large, or none are made) nothing is replaced. Text,
metadata and adapter come back; owner, group, mode and access list stay as they are, and a frozen
cube has to be thawed first. A deleted cube comes back as it was, with its id. What a VERSION may
be, memfs versions --help says.
"""

KEPT_SECONDS = 5.0
"""How long it is waited for the mount to take notice of what was changed beside it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cube", metavar="CUBE", help="a path to a cube, or that of one that is gone"
    )
    parser.add_argument(
        "version",
        nargs="?",
        metavar="VERSION",
        help="which one (the newest that is not what the cube is now)",
    )
    parser.add_argument("--at", metavar="TIME", help="the one that was there at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.version and args.at:
        raise InvalidRequest("a VERSION and --at are two ways to say the same: give one")
    wanted = args.version or args.at
    with histories.opened(args.cube) as history, contextlib.ExitStack() as stack:
        version = history.version(wanted) if wanted else history.before_now()
        store = history.store
        if not history.mounted:
            stack.enter_context(lock(store, f"is restored into by process {os.getpid()}"))
        if Frozen(store).over(history.path) is not None:
            raise NotAllowed(f"{history.path} is frozen")
        if not history.mounted:
            _record(history)
        if history.lives:
            _require_kept(args.cube, version)
        names = restore.restore(history.store, history.place(version), version, history.path)
        if not history.mounted:
            _record(history)
    if args.json:
        output.print_json({"cube": history.path, "version": version.stamp, "changed": names})
    else:
        print(_said(history, version, names))
    return 0


def _require_kept(cube: str, version: Version) -> None:
    """What a version will take the place of is a version itself, so that it can be come back to.

    A change beside the mount may not be one yet; that is waited for.
    """
    deadline = time.monotonic() + KEPT_SECONDS
    while True:
        with histories.opened(cube) as history:
            lost = history.unkept(version)
        if not lost:
            return
        if not history.mounted or time.monotonic() > deadline:
            raise MemfsError(
                f"{cube}: {', '.join(lost)} as it is now is in no version and would be lost:"
                " copy it away first"
            )
        time.sleep(0.2)


def _said(history: History, version: Version, names: list[str]) -> str:
    path = output.plain(history.path)
    if not names:
        return f"{path} is as it was at {version.stamp} already"
    if not history.lives:
        return f"{path} is back, as it was at {version.stamp}"
    return f"{path} is as it was at {version.stamp}: {', '.join(map(output.plain, names))}"


def _record(history: History) -> None:
    """Makes the version that a mount would make."""
    budget = Config.load().versions_budget_bytes
    previous = records.newest(history.store, history.cube_id)
    present = look(history.store, history.path, previous)
    if present is not None and budget:
        making.make(history.store, history.cube_id, present, previous, budget=budget, patient=True)
