"""``memfs index``: compares a store's index with its files, makes it again, searches it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from memfs.cli import filters, output
from memfs.cube import layout, metadata
from memfs.errors import IndexDamaged, MemfsError, NotAllowed, NotFound
from memfs.filesystem import registry
from memfs.index.check import sound
from memfs.index.compare import SETTLE_S, Difference, compare
from memfs.index.lmdb_index import Index
from memfs.index.rebuild import MODEL, REBUILT, index_directory, open_or_rebuild, rebuild
from memfs.vault.lock import lock
from memfs.vault.store import Store

HELP = "check or rebuild the index of a store, or search it"
EPILOG = """\
examples:
  memfs index check ~/mem                      is it sound, and does it say what the files say?
  memfs index rebuild ~/store                  make it again from the files alone
  memfs index find ~/mem --tag law             cubes with a tag
  memfs index find ~/mem --kv stale --since 7d whose text changed in the last week after encoding

The store may be given by its own path or by that of its mount, mounted or not. The index is never
needed to get at a memory: a mount makes it again where it is missing or damaged.

exit status: 1 where check finds a difference or damage.
"""

KV_STATES = ("none", "ready", "stale", "foreign", "corrupt", "unchecked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("check", "compare it with the files, all of them read again"),
        ("rebuild", "make it again from the files"),
        ("find", "list the cubes for which all that is asked is true"),
    ):
        action = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        action.add_argument("store", metavar="STORE", help="a store, or a mount")
        action.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "find":
            action.add_argument("--kv", choices=KV_STATES, help="state of the KV cache")
            action.add_argument("--tag", metavar="TAG")
            action.add_argument("--owner", metavar="USER", help="name or number")
            action.add_argument(
                "--since", metavar="TIME", help="changed since: 2026-02-28, or 7d, 12h, 30m ago"
            )
            action.add_argument("--until", metavar="TIME", help="changed before, likewise")


def run(args: argparse.Namespace) -> int:
    found = registry.find(args.store)
    mountpoint = found[0].mountpoint if found else None
    root = Path(found[0].store if found else args.store)
    with Store.open(root, create_control=args.action == "rebuild") as store:
        if args.action == "check":
            return _check(store, mountpoint, as_json=args.json)
        if args.action == "find":
            return _find(store, mountpoint, args)
        return _rebuild(store, mountpoint, as_json=args.json)


def _check(store: Store, mountpoint: str | None, *, as_json: bool) -> int:
    with _opened(store, mountpoint) as index:
        settle_s = SETTLE_S if mountpoint else 0.0
        differences = compare(store, index, index.get_info(MODEL), settle_s=settle_s)
        cubes = len(index)
    if as_json:
        output.print_json(
            {
                "store": str(store.root),
                "cubes": cubes,
                "differences": [difference._asdict() for difference in differences],
            }
        )
    elif differences:
        print(output.beginning(map(_row, differences), ("CUBE", "WHAT", "INDEX", "FILES")))
        print(f"memfs index rebuild {mountpoint or store.root} mends it")
    else:
        print(f"{output.number(cubes)} cubes: the index says what the files say")
    return 1 if differences else 0


def _rebuild(store: Store, mountpoint: str | None, *, as_json: bool) -> int:
    if mountpoint is not None:
        report = _ask_mount(store, mountpoint)
    else:
        if not store.writable:
            raise NotAllowed(f"{store.root} cannot be written, so it has no index of its own")
        with lock(store, "is having its index rebuilt"), output.Progress() as progress:
            made = rebuild(
                store,
                index_directory(store),
                progress=lambda count: progress.update(f"{output.number(count)} cubes"),
            )
        report = dataclasses.asdict(made)
    if as_json:
        output.print_json({"store": str(store.root), **report})
        return 0
    print(f"{output.number(report['cubes'])} cubes indexed in {output.seconds(report['seconds'])}")
    if report["copies"]:
        print(f"copies that got an id of their own: {output.number(report['copies'])}")
    return 0


def _ask_mount(store: Store, mountpoint: str) -> dict[str, Any]:
    """Has the mount do it, which alone writes its index; what it did."""
    control = os.path.join(mountpoint, layout.CONTROL, "control")
    try:
        fd = os.open(control, os.O_WRONLY)
        try:
            os.write(fd, b"rebuild\n")
        finally:
            os.close(fd)
    except OSError as e:
        raise MemfsError(f"the mount at {mountpoint} did not rebuild it: {e.strerror}") from e
    with _opened(store, mountpoint) as index:
        report: dict[str, Any] = index.get_info(REBUILT)
    return report


def _find(store: Store, mountpoint: str | None, args: argparse.Namespace) -> int:
    # What cannot be written has no index that could be trusted: a temporary one is made.
    opened = open_or_rebuild(store)[0] if store.read_only else _opened(store, mountpoint)
    with opened as index:
        found = list(
            index.find(
                kv_state=args.kv,
                tag=args.tag,
                owner=None if args.owner is None else filters.uid(args.owner),
                since=None if args.since is None else filters.moment(args.since),
                until=None if args.until is None else filters.moment(args.until),
            )
        )
    found.sort(key=lambda item: item[0])
    if args.json:
        output.print_json([{"path": path, **facts.to_json()} for path, facts in found])
    elif found:
        rows = [
            (
                path,
                facts.kv_state,
                "-" if facts.kv_tokens is None else str(facts.kv_tokens),
                metadata.rfc3339(facts.changed),
                ", ".join(facts.tags),
            )
            for path, facts in found
        ]
        print(output.table(rows, ("CUBE", "KV", "TOKENS", "CHANGED", "TAGS")))
    return 0


def _opened(store: Store, mountpoint: str | None) -> Index:
    """The store's index, read-only, once a process of its own has read it through.

    Raises:
        NotFound: there is none.
        IndexDamaged: it is not sound.
    """
    directory = index_directory(store)
    if not os.path.lexists(directory):
        raise NotFound(f"{store.root} has no index; memfs index rebuild {store.root} makes it")
    reason = sound(directory, live=mountpoint is not None)
    if reason is not None:
        raise IndexDamaged(f"{reason}; memfs index rebuild {store.root} makes it again")
    return Index.open(directory, read_only=True)


def _row(difference: Difference) -> tuple[str, str, str, str]:
    path, what, index, files = difference
    return path or "-", what, _short(index), _short(files)


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
