"""What must be on the disk after a crash, from what a load reported. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Content = bytes | None
"""A file's bytes; None where there is no such file."""


@dataclass(frozen=True)
class Change:
    """A change that was asked for; whether it was made is not known."""

    kind: str
    """``atomic``, ``title`` and ``unlink`` are made whole or not at all; ``append`` and ``rewrite``
    may be made in part; ``rename`` gives the file another path."""
    path: str
    data: bytes = b""
    to: str | None = None

    def made(self, before: Content) -> Content:
        """What the path holds once it is made."""
        if self.kind in ("unlink", "rename"):
            return None
        return (before or b"") + self.data if self.kind == "append" else self.data

    def allows(self, before: Content, found: Content) -> bool:
        """Whether a path may hold this when it was cut short."""
        if found == before or found == self.made(before):
            return True
        if self.kind == "title" and before is None:
            return found is not None  # a new cube has the title that memfs gave it
        if found is None or self.kind not in ("append", "rewrite"):
            return False
        whole = self.made(before) or b""
        return whole.startswith(found) and (
            self.kind == "rewrite" or len(found) >= len(before or b"")
        )


class Expected:
    """The files of a store by what was promised of them."""

    def __init__(self) -> None:
        self.files: dict[str, Content] = {}
        self._open: dict[str, Change] = {}

    def begin(self, change: Change) -> None:
        """A change is about to be asked for."""
        self._open[change.path] = change

    def done(self, path: str) -> None:
        """It was made: the call that ends it has returned."""
        change = self._open.pop(path)
        before = self.files.get(path)
        if change.to is not None:
            self.files[change.to] = before
        self.files[path] = change.made(before)

    def violations(self, read: Callable[[str], Content]) -> list[str]:
        """Every promise that was not kept; what is there now is what counts from here on."""
        found: list[str] = []
        for path, change in self._open.items():
            before, now = self.files.get(path), read(path)
            if not change.allows(before, now):
                found.append(f"{path}: {_said(now)} is neither before nor after {_told(change)}")
            if change.to is not None:
                expected = self.files.get(change.to) if now is not None else before
                if read(change.to) != expected:
                    found.append(f"{change.to}: it was lost in {_told(change)}")
                self.files[change.to] = read(change.to)
            self.files[path] = now
        self._open.clear()
        for path, content in self.files.items():
            now = read(path)
            if now != content:
                found.append(f"{path}: {_said(now)}, and {_said(content)} was promised")
                self.files[path] = now
        return found


def _told(change: Change) -> str:
    return f"{change.kind} of {_said(change.data)}"


def _said(content: Content) -> str:
    if content is None:
        return "nothing"
    return f"{len(content)} bytes {content[:16]!r}…{content[-16:]!r}"
