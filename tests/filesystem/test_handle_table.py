"""The open files of a mount by node, and how the kernel may read them where nothing is passed."""

from __future__ import annotations

import os
import time

import pytest

from memfs.filesystem.handles.handle import Handle

from .conftest import Forest

SETTLED = 0.06
"""Longer ago than this, a change cannot share its time with the next one."""


def opened(forest: Forest, path: str, flags: int = os.O_RDONLY) -> tuple[int, Handle]:
    return forest.opened(path, flags)


def write(forest: Forest, path: str, data: bytes) -> None:
    (forest.root / path).write_bytes(data)
    time.sleep(SETTLED)


def test_pages_are_kept_while_the_file_is_the_same(forest: Forest) -> None:
    write(forest, "file", b"one")
    kept = []
    for content in (None, None, b"two", None):
        if content is not None:
            write(forest, "file", content)
        number, handle = opened(forest, "file")
        kept.append(handle.keep_cache)
        assert not handle.direct_io
        forest.closed(number)
    assert kept == [False, True, False, True]


def test_pages_of_a_file_that_was_just_changed_are_not_kept(
    forest: Forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfs.vault.sig._TICK_NS", 3600 * 10**9)  # so that it is just now
    (forest.root / "file").write_bytes(b"one")
    for _ in range(2):
        number, handle = opened(forest, "file")
        assert not handle.keep_cache
        forest.closed(number)


def test_another_file_at_the_same_path_is_read_past_the_cache(forest: Forest) -> None:
    write(forest, "file", b"old")
    first, before = opened(forest, "file")
    write(forest, "new", b"new")
    os.rename(forest.root / "new", forest.root / "file")
    second, after = opened(forest, "file")
    assert (before.direct_io, after.direct_io) == (False, True)
    forest.closed(first)
    forest.closed(second)
    third, alone = opened(forest, "file")
    assert not alone.direct_io
    assert not alone.keep_cache
    forest.closed(third)


def test_a_node_goes_where_its_path_goes(forest: Forest) -> None:
    write(forest, "a", b"old")
    number, handle = opened(forest, "a")
    forest.tree.names.rename("a", "b", 0)
    assert handle.path == "b"
    assert forest.tree.handles.on("b") == [handle]
    hidden = forest.hide("b", 1)
    assert handle.path is None
    assert forest.tree.handles.on("b") == []
    write(forest, "b", b"new")
    second, other = opened(forest, "b")
    assert not other.direct_io, "it is another node"
    again, same = opened(forest, hidden)
    assert same.file == handle.file
    for open_number in (number, second, again):
        forest.closed(open_number)


def test_ordinary_files_need_not_tell_of_a_close_but_texts_do(forest: Forest) -> None:
    (forest.root / "law").mkdir()
    write(forest, "law/payload.md", b"text")
    write(forest, "law/notes", b"notes")
    wanted = {("law/notes", os.O_RDWR): True, ("law/payload.md", os.O_RDWR): False}
    for (path, flags), quiet in wanted.items():
        number, handle = opened(forest, path, flags)
        assert handle.noflush is quiet
        forest.closed(number)
