"""``memfs versions``: the versions of a cube, or the deleted cubes of a store."""

from __future__ import annotations

import argparse
from typing import Any

from memfs.cli import histories, output, targets
from memfs.cli.histories import History
from memfs.cube import layout
from memfs.vault.versions.records import Version

HELP = "list the versions of a cube, or the deleted cubes of a store"
EPILOG = """\
examples:
  memfs versions ~/mem/handbook         when it was changed, and what
  ls ~/mem/handbook/.versions/          the same versions, as directories
  memfs versions --deleted ~/mem        what can be brought back with memfs restore
  ls ~/mem/.memfs/at/2026-11-22T10:42/  the whole store at a moment

A version's name is its time, in UTC. Commands that take a VERSION take any time as well: of a day,
2026-11-22, or of a minute, 2026-11-22T10:42 (local time; with a Z, UTC); it means the version that
was there when that ended.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="CUBE", help="a path to a cube; a store, with --deleted")
    parser.add_argument(
        "--deleted", action="store_true", help="list the deleted cubes of a store instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if args.deleted:
        return _deleted(args.place, as_json=args.json)
    with histories.opened(args.place) as history:
        lines = _lines(history)
        path = history.path
    if args.json:
        output.print_json({"cube": path, "id": history.cube_id, "versions": lines})
    elif lines:
        rows = [_row(line) for line in lines]
        print(output.table(rows, ("VERSION", "EVENT", "SIZE", "CHANGED")))
    else:
        print(f"{output.plain(path)} has no versions yet")
    return 0


def changed(before: Version | None, version: Version) -> list[str]:
    """The files in which a version is not the one before it."""
    then = before.files if before else {}
    names = then.keys() | version.files.keys()
    return sorted(n for n in names if _content(before, n) != _content(version, n))


def _content(version: Version | None, name: str) -> str | None:
    if version is None or name not in version.files:
        return None
    return version.meaning if name == layout.META else version.files[name].content


def _lines(history: History) -> list[dict[str, Any]]:
    lines = []
    before: Version | None = None
    for version in history.versions:
        lines.append(
            {
                "version": version.stamp,
                "event": version.event,
                "path": version.path,
                "from": before.path if before and before.path != version.path else None,
                "origin": version.origin,
                "size": sum(entry.size for entry in version.files.values()),
                "changed": changed(before, version),
                "not_kept": sorted(n for n, entry in version.files.items() if not entry.kept),
                "sha256": {name: entry.sha256 for name, entry in version.files.items()},
            }
        )
        before = version
    return lines


def _row(line: dict[str, Any]) -> tuple[str, str, str, str]:
    said = ", ".join(line["changed"]) if line["event"] != "deleted" else ""
    if line["from"]:
        said = f"from {line['from']} to {line['path']}" + (f"; {said}" if said else "")
    if line["event"] == "restored":
        said += f", as of {line['origin']}" if said else f"as of {line['origin']}"
    if line["not_kept"]:
        said += f" ({', '.join(line['not_kept'])} not kept)"
    return line["version"], line["event"], output.size(line["size"]), said


def _deleted(given: str, *, as_json: bool) -> int:
    where = targets.collection(given)
    with targets.open_store(where.store) as store:
        found = histories.deleted(store, mounted=where.mountpoint is not None)
    below = where.path + "/" if where.path else ""
    lines = [line for line in found if line["path"].startswith(below) and line["versions"]]
    if as_json:
        output.print_json(lines)
    elif lines:
        rows = [(line["path"], line["deleted"], line["versions"][-1][0]) for line in lines]
        print(output.table(rows, ("CUBE", "DELETED", "LAST VERSION")))
    return 0
