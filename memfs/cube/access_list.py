"""The access list of ``meta.json`` beside the files' POSIX access list: what shows, what changes.

Entries for users and groups say ``read`` and ``write`` as the kernel's list has it, and nothing
else does. ``mount``, ``promote`` and ``share`` are memfs's own and stand in the header alone, as
does everything of a user or group that this machine does not know. Pure but for names; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memfs.cube.acl import READ, WRITE, Acl, Who, text_of, who_of
from memfs.errors import InvalidMetadata

Entry = dict[str, Any]

BITS = {"read": READ, "write": WRITE}
"""Rights that the kernel holds."""


def shown(stored: Iterable[Entry], acl: Acl | None) -> list[Entry]:
    """The list as it reads: stored entries in their order, then those that only the kernel has."""
    live = {who: bits & (READ | WRITE) for who, bits in (acl.effective if acl else {}).items()}
    entries = []
    for entry in stored:
        who = who_of(entry["who"])
        if who is None:
            entries.append(dict(entry))
            continue
        rights = _rights(live.pop(who, 0)) + [r for r in entry["rights"] if r not in BITS]
        if rights:
            entries.append({**entry, "who": text_of(who), "rights": rights})
    return entries + [
        {"who": text_of(who), "rights": _rights(bits)} for who, bits in live.items() if bits
    ]


def changed(wanted: list[Entry], seen: list[Entry]) -> dict[Who, int]:
    """What the kernel's list must be changed to for a list that was ``seen`` to read as ``wanted``.

    Raises InvalidMetadata for an entry that is new and cannot take effect here.
    """
    for entry in wanted:
        if entry not in seen:
            _require_known(entry)
    before, after = _bits(seen), _bits(wanted)
    return {
        who: after.get(who, 0)
        for who in before.keys() | after.keys()
        if before.get(who, 0) != after.get(who, 0)
    }


def _require_known(entry: Entry) -> None:
    kind, _, name = entry["who"].partition(":")
    if kind == "context":
        if not BITS.keys().isdisjoint(entry["rights"]):
            raise InvalidMetadata(
                f"governance.access: {entry['who']} can have mount, promote and share;"
                " read and write are the kernel's, which knows users and groups alone"
            )
    elif who_of(entry["who"]) is None:
        raise InvalidMetadata(f"governance.access: there is no {kind} {name!r} here")


def _bits(entries: list[Entry]) -> dict[Who, int]:
    found: dict[Who, int] = {}
    for entry in entries:
        who = who_of(entry["who"])
        if who is not None:
            given = sum(BITS[right] for right in set(entry["rights"]) & BITS.keys())
            found[who] = found.get(who, 0) | given
    return found


def _rights(bits: int) -> list[str]:
    return [right for right, bit in BITS.items() if bits & bit]
