"""``memfs log``: the audit trail of a store, searched and verified."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pwd
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from memfs.cli import filters, output
from memfs.cube import layout
from memfs.errors import InvalidRequest, NotAllowed, NotFound
from memfs.filesystem import registry
from memfs.vault.store import Store
from memfs.vault.trail import records

HELP = "show who mounted, changed or was denied what"
EPILOG = """\
examples:
  memfs log ~/mem                             the whole audit trail, oldest first
  memfs log ~/mem/law -n 20                   the last 20 events of a cube
  memfs log ~/mem --user ben --since 7d       what Ben did in the last week
  memfs log ~/mem --op denied --op refused    what was not to be had
  memfs log ~/store --verify                  is every line as it was written, and none missing?

The place is a store, a mount, or a cube or collection in one, which may be gone; without one, the
only mount there is. The trail's files are the store owner's: others see, through the mount, what
they did themselves.

--verify prints the last line's hash. Kept elsewhere, it proves later that the trail up to that line
is still the same: look for it in memfs log --json.

exit status: 1 where --verify finds something.
"""

_SHOWN = 50
_OWN = {"seq", "time", "event", "path", "uid", "gid", "pid", "program", "prev", "hash", "kind"}
_DIGESTS = 12

Event = dict[str, Any]


class Place(NamedTuple):
    """What was named."""

    root: str
    """Of the store."""
    mountpoint: str | None
    path: str
    """Of a cube or collection in it; "" for all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", nargs="?", metavar="PLACE", help="a store, a mount, or a cube")
    parser.add_argument(
        "--since", metavar="TIME", help="from then on: 2026-02-28, or 7d, 12h, 30m ago"
    )
    parser.add_argument("--until", metavar="TIME", help="before then, likewise")
    parser.add_argument("--user", metavar="USER", help="who asked, by name or number")
    parser.add_argument(
        "--cube", metavar="PATH", help="a cube or collection, by its path in the store"
    )
    parser.add_argument(
        "--op",
        metavar="EVENT",
        action="append",
        help="mounted, changed, denied, …; may be repeated",
    )
    parser.add_argument("-n", type=int, metavar="N", help="the last N of them")
    parser.add_argument("--verify", action="store_true", help="check the chain of hashes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    place = _place(args.place)
    if args.verify:
        return _verify(place.root, as_json=args.json)
    found: Iterable[Event] = _chosen(_events(place), args, place.path)
    if args.n is not None:
        found = deque(found, maxlen=max(args.n, 0))
    if args.json:
        output.print_json({"store": place.root, "events": list(found)})
        return 0
    _print(found)
    return 0


def _place(given: str | None) -> Place:
    if given is None:
        running = registry.running()
        if len(running) != 1:
            raise InvalidRequest("which store or mount? memfs status shows those that are mounted")
        return Place(running[0].store, running[0].mountpoint, "")
    found = registry.find(given)
    if found is not None:
        record, path = found
        return Place(record.store, record.mountpoint, path)
    real = os.path.realpath(given)
    for above in (Path(real), *Path(real).parents):
        if (above / layout.CONTROL).is_dir():
            inside = os.path.relpath(real, above)
            return Place(str(above), None, "" if inside == "." else inside)
    raise NotFound(f"{given} is in no mount and no store; see memfs status")


def _events(place: Place) -> Iterator[Event]:
    """From the files, for who may read them; else from the mount, which says what it may."""
    try:
        with Store.open(Path(place.root), create_control=False) as store:
            yield from records.events(store)
        return
    except PermissionError:
        if place.mountpoint is None:
            raise NotAllowed(f"the trail of {place.root} is its owner's") from None
    with open(os.path.join(place.mountpoint, layout.CONTROL, "events"), encoding="ascii") as file:
        for line in file:
            event = json.loads(line)
            yield event | {"time": datetime.fromisoformat(event["time"]).timestamp()}


def _chosen(events: Iterable[Event], args: argparse.Namespace, path: str) -> Iterator[Event]:
    since = filters.moment(args.since) if args.since is not None else None
    until = filters.moment(args.until) if args.until is not None else None
    user = filters.uid(args.user) if args.user is not None else None
    paths = [wanted.strip("/") for wanted in (path, args.cube) if wanted]
    for event in events:
        if since is not None and event["time"] < since:
            continue
        if until is not None and event["time"] >= until:
            continue
        if user is not None and event.get("uid") != user:
            continue
        if args.op and event.get("event") not in args.op:
            continue
        if all(_concerns(event, wanted) for wanted in paths):
            yield event


def _concerns(event: Event, path: str) -> bool:
    """Whether an event is of a cube, of one below it, or of a collection that it was in."""
    named = [event[name] for name in ("path", "from") if isinstance(event.get(name), str)]
    return any(
        path == other or path.startswith(other + "/") or other.startswith(path + "/")
        for other in named
    )


def _print(events: Iterable[Event]) -> None:
    header: tuple[str, ...] = ("TIME", "USER", "PROGRAM", "EVENT", "CUBE", "")
    rows = (_row(event) for event in events)
    while page := list(itertools.islice(rows, _SHOWN)):
        print(output.table(page, header))
        header = ()


def _row(event: Event) -> tuple[str, ...]:
    when = datetime.fromtimestamp(event["time"]).astimezone()
    return (
        when.isoformat(" ", "seconds"),
        _name(event.get("uid")),
        str(event.get("program", "-")),
        str(event.get("event")),
        str(event.get("path", "-")),
        ", ".join(f"{name} {_value(value)}" for name, value in event.items() if name not in _OWN),
    )


def _name(number: object) -> str:
    if not isinstance(number, int):
        return "-"
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return str(number)


def _value(value: object) -> str:
    """Of a digest, enough to tell it from others."""
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "nothing"
    text = "nothing" if value is None else str(value)
    return text[:_DIGESTS] + "…" if len(text) == 64 else text


def _verify(root: str, *, as_json: bool) -> int:
    try:
        with Store.open(Path(root), create_control=False) as store:
            problems = list(records.problems(store))
            lines, last = 0, records.START
            for event in records.events(store):
                lines, last = lines + 1, records.Link(event["seq"], event["hash"])
    except PermissionError:
        raise NotAllowed(f"the trail of {root} is its owner's, who verifies it") from None
    if as_json:
        output.print_json(
            {
                "store": root,
                "lines": lines,
                "last": last._asdict(),
                "problems": [{"path": p.path, "what": p.what} for p in problems],
            }
        )
    elif problems:
        print(output.beginning(((p.path, p.what) for p in problems), ("FILE", "WHAT")))
    elif lines:
        print(f"{output.number(lines)} lines, each as it was written; line {last.seq} is")
        print(last.hash)
    else:
        print("there is no trail yet")
    return 1 if problems else 0
