"""Waiting for a KV cache: who waits, for how long, and who must not wait because of it."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from memfs.cube.access import Caller
from memfs.filesystem.context import Context
from memfs.filesystem.handles.making import Makers
from memfs.filesystem.link import Making

from .conftest import Forest, until


def context(pid: int, *, interrupted: bool = False) -> Context:
    return Context(0, 0, pid, lambda: interrupted)


class Waiting(threading.Thread):
    """An ``open`` in a thread of its own; ``found`` is how it ended."""

    def __init__(self, makers: Makers, path: str, making: Making, pid: int) -> None:
        super().__init__()
        self.found: Any = None
        self._wait = lambda: makers.wait_open(path, making, context(pid))
        self.start()

    def run(self) -> None:
        try:
            self.found = self._wait()
        except OSError as e:
            self.found = e.errno

    def ended(self) -> Any:
        self.join(10)
        assert not self.is_alive()
        return self.found


@pytest.fixture
def makers(forest: Forest) -> Makers:
    return Makers(forest.link, 3)


def waiters(makers: Makers) -> int:
    return len(makers._opens)


def test_an_open_waits_until_it_is_made(makers: Makers) -> None:
    making = Making("work/law")
    first = Waiting(makers, "work/law/kv.safetensors", making, 1)
    until(lambda: waiters(makers) == 1)
    making.finish(None)
    assert first.ended() is True
    assert waiters(makers) == 0


@pytest.mark.parametrize("path", ["work", "work/law", "work/law/kv.safetensors"])
def test_an_open_gives_way_to_whoever_comes_near(makers: Makers, path: str) -> None:
    waiting = Waiting(makers, "work/law/kv.safetensors", Making("work/law"), 1)
    until(lambda: waiters(makers) == 1)
    makers.looked_at(path, lambda: context(1))
    makers.looked_at("", lambda: context(2))
    makers.looked_at("work/lawyer", lambda: context(2))
    makers.looked_at("work/law/payload.md", lambda: context(2))
    waiting.join(0.2)
    assert waiting.is_alive()
    makers.looked_at(path, lambda: context(2))
    assert waiting.ended() is False


def test_a_signal_ends_the_wait(makers: Makers) -> None:
    with pytest.raises(InterruptedError):
        makers.wait_read(Making("law"), context(1, interrupted=True))


def test_no_more_than_some_wait(makers: Makers) -> None:
    making = Making("law")
    waiting = [Waiting(makers, "law/kv.safetensors", making, n) for n in range(5)]
    until(lambda: [w.found for w in waiting].count(errno.EBUSY) == 2)
    making.finish(None)
    assert sorted(map(str, [w.ended() for w in waiting])) == ["16", "16", "True", "True", "True"]


def test_those_who_want_the_same_share_it(forest: Forest) -> None:
    first = forest.link.make("law", Caller(0, frozenset()))
    second = forest.link.make("law", Caller(0, frozenset()))
    assert first is second or first.done
    for making in (first, second):
        assert making.wait(10)
        assert "no runtime" in str(making.error)
        forest.link.leave(making)
