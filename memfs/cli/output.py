"""How the commands print: colour, numbers, tables, JSON, one line of progress.

Results go to stdout, everything about how they came to be to stderr. Used by every command module,
in the main thread.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TextIO

_SHOWN = 50
"""Rows of a table that only has to show what kind of thing there is."""
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def use_color(stream: TextIO) -> bool:
    """Whether to colour: a terminal that can, and no ``NO_COLOR`` (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """``text`` in a style (bold, dim, red, green, yellow) where ``stream``, or stdout, takes it."""
    if not use_color(stream or sys.stdout):
        return text
    return f"\033[{_STYLES[style]}m{text}\033[0m"


def plain(text: str) -> str:
    """``text`` with control characters escaped: a file's name must not drive the terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def size(count: float) -> str:
    """A number of bytes for people: ``512 B``, ``1.5 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1023.95:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def seconds(value: float) -> str:
    """A duration for people: ``87 ms``, ``2.31 s``, ``3 min 4 s``."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.995:
        return f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def number(value: int) -> str:
    """A count for people: ``2,041``."""
    return f"{value:,}"


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Rows as aligned columns, two spaces apart; a column of numbers is set to the right."""
    body = [[plain(cell) for cell in row] for row in rows]
    whole = [list(header), *body] if header else body
    if not whole:
        return ""
    widths = [max(map(_width, column)) for column in zip(*whole, strict=True)]
    right = [
        bool(body) and all(c[:1].isdigit() or c in ("", "-") for c in column)
        for column in zip(*body, strict=True)
    ] or [False] * len(widths)
    lines = []
    for row in whole:
        cells = [
            " " * (w - _width(c)) + c if r else c + " " * (w - _width(c))
            for c, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines[0] = styled(lines[0], "bold")
    return "\n".join(lines)


def beginning(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """The first rows as a table, and how many there are more, where the command has ``--json``."""
    whole = list(rows)
    shown = table(whole[:_SHOWN], header)
    more = len(whole) - _SHOWN
    return f"{shown}\nand {number(more)} more (--json lists all)" if more > 0 else shown


def _width(text: str) -> int:
    """Columns that ``text`` takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def print_json(data: object) -> None:
    """One JSON document on stdout. ASCII, so that names which are not UTF-8 survive."""
    print(json.dumps(data, indent=2))


class Progress:
    """A line on stderr that says what goes on: rewritten in place on a terminal.

    Elsewhere only what ``step`` says is printed, a line each, and ``update`` is silent.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False

    def step(self, text: str) -> None:
        """Says that something new begins."""
        if self._live:
            self.update(text)
        else:
            print(plain(text), file=self._stream, flush=True)

    def update(self, text: str) -> None:
        """Says how far it is."""
        if self._live:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write("\r\033[K" + plain(text)[: columns - 1])
            self._stream.flush()
            self._shown = True

    def clear(self) -> None:
        """Takes the line away, before something else is printed."""
        if self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
