"""What counts as reading a memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.filesystem.handles.reading import counts

HEADER, SIZE = 5000, 40_000_000
SMALL = 40_208


@pytest.mark.parametrize(
    ("what", "offset", "length", "size", "yes"),
    [
        ("the length of the header", 0, 8, SIZE, False),
        ("the header", 8, HEADER - 8, SIZE, False),
        ("the header through a buffer", 0, 131_072, SIZE, False),
        ("a mapped page of the header", 0, 131_072, SIZE, False),
        ("the first piece of cat", 0, 131_072, SIZE, False),
        ("the second piece of cat", 131_072, 131_072, SIZE, True),
        ("one byte of a tensor", HEADER, 1, SIZE, True),
        ("a mapped page of a tensor", 8192, 131_072, SIZE, True),
        ("all of it", 0, SIZE, SIZE, True),
        ("cat of a small one", 0, 131_072, SMALL, True),
        ("cp of a small one", 0, SMALL, SMALL, True),
        ("the rest of a small one", 8, SMALL, SMALL, True),
        ("the end of a small one", SMALL, 131_072, SMALL, True),
        ("a small one that is mapped", 0, 40_960, SMALL, False),
        ("the header of a small one", 0, 8192, SMALL, False),
    ],
)
def test_what_programs_do(what: str, offset: int, length: int, size: int, yes: bool) -> None:
    assert counts(offset, length, HEADER, size) is yes, what


@given(st.integers(0, HEADER - 1), st.integers(1, SIZE), st.integers(HEADER + 1, SIZE))
def test_a_look_at_the_beginning_that_leaves_some_is_none(at: int, length: int, size: int) -> None:
    if at + length < size:
        assert not counts(at, length, HEADER, size)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.integers(4097, 1 << 20))
def test_whoever_reads_to_the_end_in_pieces_is_seen(piece: int, header: int, size: int) -> None:
    """However a program cuts its reads: up to the one that finds nothing more."""
    header = min(header, size - 1)
    assert any(counts(at, piece, header, size) for at in range(0, size + piece, piece))
