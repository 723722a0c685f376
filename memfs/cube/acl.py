"""POSIX access lists: the kernel's bytes, and the entries of ``meta.json`` that say the same.

An entry of the access list for a user or a group *is* an entry of the files' POSIX access list as
far as it says read or write; the kernel holds it. Pure, but for looking up names; any thread.
"""

from __future__ import annotations

import grp
import pwd
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

XATTR = "system.posix_acl_access"

READ, WRITE, SEARCH = 4, 2, 1

_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF


class Who(NamedTuple):
    """A user or a group, by number."""

    kind: str
    """user or group."""
    number: int


@dataclass(frozen=True)
class Acl:
    """A POSIX access list; permissions are sums of READ, WRITE, SEARCH."""

    owner: int
    group: int
    other: int
    mask: int | None = None
    """None where there is no named entry: then it is nothing but the mode."""
    named: Mapping[Who, int] = field(default_factory=dict)

    @classmethod
    def of_mode(cls, mode: int) -> Acl:
        """The list that says what a mode says."""
        return cls(mode >> 6 & 7, mode >> 3 & 7, mode & 7)

    @classmethod
    def parse(cls, raw: bytes) -> Acl:
        """The list in the bytes of its attribute. Raises ValueError."""
        if len(raw) < _HEADER.size or (len(raw) - _HEADER.size) % _ENTRY.size:
            raise ValueError("not a POSIX access list")
        if _HEADER.unpack_from(raw)[0] != _VERSION:
            raise ValueError("a POSIX access list of another version")
        plain: dict[int, int] = {}
        named: dict[Who, int] = {}
        for tag, bits, number in _ENTRY.iter_unpack(raw[_HEADER.size :]):
            if tag == _USER:
                named[Who("user", number)] = bits
            elif tag == _GROUP:
                named[Who("group", number)] = bits
            else:
                plain[tag] = bits
        return cls(
            plain.get(_USER_OBJ, 0),
            plain.get(_GROUP_OBJ, 0),
            plain.get(_OTHER, 0),
            plain.get(_MASK),
            named,
        )

    def render(self) -> bytes:
        """The bytes of its attribute, in the order that the kernel wants."""
        users = sorted((w, bits) for w, bits in self.named.items() if w.kind == "user")
        groups = sorted((w, bits) for w, bits in self.named.items() if w.kind == "group")
        entries = [(_USER_OBJ, self.owner, _NOBODY)]
        entries += [(_USER, bits, who.number) for who, bits in users]
        entries += [(_GROUP_OBJ, self.group, _NOBODY)]
        entries += [(_GROUP, bits, who.number) for who, bits in groups]
        if self.mask is not None:
            entries += [(_MASK, self.mask, _NOBODY)]
        entries += [(_OTHER, self.other, _NOBODY)]
        return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)

    @property
    def effective(self) -> dict[Who, int]:
        """What the named entries really give: no more than the mask."""
        mask = 7 if self.mask is None else self.mask
        return {who: bits & mask for who, bits in self.named.items()}

    def with_entries(self, changes: Mapping[Who, int]) -> Acl:
        """The list with entries set, or removed where nothing is given.

        What the mask held back is given up first, so that the new mask, which has to hold back
        none of the entries, lets nobody else do more than before.
        """
        group = self.group if self.mask is None else self.group & self.mask
        named = {w: bits for w, bits in self.effective.items() if w not in changes}
        named |= {w: bits for w, bits in changes.items() if bits}
        mask = None
        if named:
            mask = group
            for bits in named.values():
                mask |= bits
        return Acl(self.owner, group, self.other, mask, named)

    def meet(self, other: Acl, *, same_group: bool, owners: tuple[int, int] | None = None) -> Acl:
        """What both lists give, and where that cannot be told, less.

        Args:
            same_group: whether both are of files of one group: another one was everybody else.
            owners: of the two files, where that is not one user. Then the file is to be another's,
                and each of them has what the other list gives him by name; where it does not name
                him, what both give his groups, or everybody, and no owner lacks.
        """
        lists = (self, other)
        groups = [acl.group & (7 if acl.mask is None else acl.mask) for acl in lists]
        least = [group & acl.other for group, acl in zip(groups, lists, strict=True)]
        given = [acl.effective for acl in lists]
        named = {
            who: given[0].get(who, least[0]) & given[1].get(who, least[1])
            for who in given[0].keys() | given[1].keys()
        }
        plain = (groups[0] & groups[1], self.other & other.other)
        group, rest = plain if same_group else (least[0] & least[1], least[0] & least[1])
        if owners is not None:
            both = self.owner & other.owner
            group, rest = group & both, rest & both
            named = {w: b & both if w.kind == "group" else b for w, b in named.items()}
            for uid, mine, theirs in zip(owners, lists, reversed(given), strict=True):
                owner = Who("user", uid)
                named.pop(owner, None)
                if owner in theirs:
                    named[owner] = mine.owner & theirs[owner]
        mask = None
        if named:
            mask = group
            for bits in named.values():
                mask |= bits
        return Acl(self.owner & other.owner, group, rest, mask, named)

    @property
    def mode(self) -> int:
        """The permission bits of a file with this list."""
        return self.owner << 6 | (self.group if self.mask is None else self.mask) << 3 | self.other

    def allows(self, uid: int, gids: Iterable[int], owner: int, group: int, rights: int) -> bool:
        """Whether it gives a user all ``rights``, as the kernel would answer; root aside.

        Args:
            owner, group: of the file.
        """
        if uid == owner:
            return self.owner & rights == rights
        mask = 7 if self.mask is None else self.mask
        if Who("user", uid) in self.named:
            return self.named[Who("user", uid)] & mask & rights == rights
        numbers = set(gids)
        matching = [
            bits for w, bits in self.named.items() if w.kind == "group" and w.number in numbers
        ]
        if group in numbers:
            matching.append(self.group)
        if matching:
            return any(bits & mask & rights == rights for bits in matching)
        return self.other & rights == rights


def who_of(text: str) -> Who | None:
    """The user or group that ``user:NAME`` or ``group:NAME`` names, by name or by number.

    None for one that this machine does not know, and for a context.
    """
    kind, _, name = text.partition(":")
    try:
        if kind == "user":
            return Who(kind, pwd.getpwnam(name).pw_uid)
        if kind == "group":
            return Who(kind, grp.getgrnam(name).gr_gid)
    except KeyError:
        if name.isascii() and name.isdigit() and int(name) < _NOBODY:
            return Who(kind, int(name))
    return None


def text_of(who: Who) -> str:
    """``user:NAME`` or ``group:NAME``; the number where there is no name."""
    try:
        if who.kind == "user":
            return f"user:{pwd.getpwuid(who.number).pw_name}"
        return f"group:{grp.getgrgid(who.number).gr_name}"
    except KeyError:
        return f"{who.kind}:{who.number}"
