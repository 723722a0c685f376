"""How the commands print."""

from __future__ import annotations

import contextlib
import io
import os
import pty
from collections.abc import Iterator
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.cli import output


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    """A real terminal's end to write to."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        yield stream
    os.close(master)


def test_colour_only_on_a_terminal_that_wants_it(
    terminal: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.styled("x", "red", terminal) == "\033[31mx\033[0m"
    assert output.styled("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.styled("x", "red", terminal) == "x"
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert output.styled("x", "red", terminal) == "x"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 ms"), (0.0874, "87 ms"), (0.9996, "1.00 s"), (2.314, "2.31 s"), (184, "3 min 4 s")],
)
def test_durations(value: float, text: str) -> None:
    assert output.seconds(value) == text


def test_a_table_is_aligned_and_numbers_stand_to_the_right() -> None:
    lines = output.table([("a", "1"), ("日本", "2,041")], ("cube", "tokens")).splitlines()
    assert lines == ["cube  tokens", "a          1", "日本   2,041"]
    assert output.table([]) == ""
    assert output.table([], ("cube", "tokens")) == "cube  tokens"


@given(st.text())
def test_nothing_printed_drives_the_terminal(text: str) -> None:
    assert output.plain(text).isprintable()


def test_names_that_are_not_utf8_are_shown() -> None:
    name = os.fsdecode(b"caf\xe9\x1b[2J")
    assert output.plain(name) == "caf\\udce9\\x1b[2J"


def test_progress_prints_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with output.Progress(stream) as progress:
        progress.step("fetching")
        progress.update("12%")
        progress.step("converting")
    assert stream.getvalue() == "fetching\nconverting\n"


def test_progress_leaves_no_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream, output.Progress(stream) as progress:
        progress.step("fetching")
        progress.update("12%")
    written = b""
    with os.fdopen(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while chunk := terminal.read(1000):  # EIO once all that the closed end wrote is read
            written += chunk
    assert written.decode() == "\r\033[Kfetching\r\033[K12%\r\033[K"


def test_the_beginning_of_a_long_table() -> None:
    rows = [(str(number), "x") for number in range(1051)]
    lines = output.beginning(rows, ("A", "B")).splitlines()
    assert (len(lines), lines[-2:]) == (52, ["49  x", "and 1,001 more (--json lists all)"])
    assert output.beginning(rows[:50], ("A", "B")) == output.table(rows[:50], ("A", "B"))
