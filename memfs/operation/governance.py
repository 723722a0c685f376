"""Who may do what with a cube: the decisions, from what others found out. Pure but for names; any
thread.

1. ``read`` and ``write`` are the kernel's answer: owner, group, mode, access list.
2. ``mount`` (into a model, and asking it), ``promote`` (having a KV cache made) and ``share``
   (putting it into an archive) each need ``read``.
3. Where no entry of the access list names the right, whoever may read has it.
4. Where one does, only those have it whom the entries with it name, by user, group or calling
   context; a name that this machine does not know is nobody.
5. The owner and root have all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memfs.cube.access import Caller
from memfs.cube.acl import Who, who_of

GRANTED = ("mount", "promote", "share")
"""The rights that memfs decides."""


class Context(NamedTuple):
    """Whoever runs in a calling context."""

    name: str


Grantees = frozenset[Who | Context | None]
"""Those whom entries name; None stands for somebody unknown here."""


@dataclass(frozen=True)
class Governed:
    """A cube, as far as rights are concerned."""

    owner: int
    readable: bool
    """Whether the kernel lets the caller read its text, every directory on the way included."""
    granted: Mapping[str, Grantees] | None = field(default_factory=dict)
    """Whom the access list names for each right that it names; None where the header that says so
    cannot be read."""


def granted_by(access: Iterable[Mapping[str, Any]]) -> dict[str, Grantees]:
    """Whom the access list of a checked header names for each right that it names."""
    granted: dict[str, set[Who | Context | None]] = {}
    for entry in access:
        kind, _, name = entry["who"].partition(":")
        who = Context(name) if kind == "context" else who_of(entry["who"])
        for right in entry["rights"]:
            granted.setdefault(right, set()).add(who)
    return {right: frozenset(who) for right, who in granted.items()}


def denial(caller: Caller, right: str, cube: Governed) -> str | None:
    """Why a caller may not ``mount``, ``promote`` or ``share`` a cube; None where he may."""
    if not cube.readable:
        return "you may not read it"
    if caller.uid in (0, cube.owner):
        return None
    if cube.granted is None:
        return "its meta.json, which says who may, cannot be read"
    named = cube.granted.get(right)
    if named is None or any(_is(caller, who) for who in named):
        return None
    return f"its access list gives {right} to others"


def _is(caller: Caller, who: Who | Context | None) -> bool:
    if isinstance(who, Context):
        return caller.context == who.name
    if isinstance(who, Who):
        return caller.uid == who.number if who.kind == "user" else who.number in caller.gids
    return False
