"""Reads that are uses of a memory, and those that are a scan's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from memfs.cube.access import Caller
from memfs.filesystem import renewal
from memfs.filesystem.renewal import Read, Renewal, Ticket

from .conftest import until

ANN, BEN = (Caller(uid, frozenset({uid})) for uid in (1000, 1001))


class Reads:
    """Reads of files that do not fit, and those of them that were found to be uses."""

    def __init__(self) -> None:
        self.used: list[Read] = []
        self.renewal = Renewal(self.used.append)

    def began(self, path: str, caller: Caller, ticket: Ticket | None = None) -> Read:
        read = Read(path, caller, ticket or Ticket())
        self.renewal.began(read)
        return read

    def closed(self, read: Read) -> None:
        read.ticket.misfit = True
        read.ticket.finish()
        self.renewal.closed(read)


@pytest.fixture
def reads() -> Iterator[Reads]:
    reads = Reads()
    thread = threading.Thread(target=reads.renewal.run)
    thread.start()
    yield reads
    reads.renewal.stop()
    thread.join()


def within(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(renewal, "SCAN_SECONDS", seconds)


def test_users_are_not_taken_for_each_other(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    within(monkeypatch, 0.05)
    both = [reads.began("law", ANN), reads.began("notes", BEN)]
    for read in both:
        reads.closed(read)
    until(lambda: reads.used == both)


def test_a_cube_is_used_however_often_it_is_read(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for all who wait for the same mount."""
    within(monkeypatch, 0.05)
    first = reads.began("law", ANN)
    second, other = reads.began("law", ANN, first.ticket), reads.began("notes", BEN)
    for read in (second, first, other):
        reads.closed(read)
    until(lambda: reads.used == [second, other])


@pytest.mark.parametrize("overlap", [False, True])
def test_one_cube_after_another_is_a_scan(
    reads: Reads, monkeypatch: pytest.MonkeyPatch, *, overlap: bool
) -> None:
    """The first is told by what comes behind it, the others by what was before them."""
    within(monkeypatch, 2.0)
    first = reads.began("one", ANN)
    if not overlap:
        reads.closed(first)
    second = reads.began("two", ANN)
    assert second.passing
    if overlap:
        reads.closed(first)
    reads.closed(second)
    alone = reads.began("three", BEN)
    reads.closed(alone)
    until(lambda: reads.used == [alone])


def test_what_turns_out_to_fit_is_told_by_its_ticket(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    within(monkeypatch, 0.05)
    late, fits = reads.began("law", ANN), reads.began("notes", BEN)
    fits.ticket.finish()
    for read in (fits, late):
        reads.renewal.closed(read)
    until(lambda: reads.used == [late])
