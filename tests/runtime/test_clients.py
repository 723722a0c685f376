"""Many clients at once, silent ones and rude ones: the others are served, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memfs.config import Config
from memfs.errors import MemfsError
from memfs.runtime.client import RuntimeClient, connect
from memfs.runtime.protocol import MAX_REQUEST, encode, socket_path
from memfs.runtime.subscribers import MAX_WAITING, Subscribers

from .conftest import Shop, ask, prose

MANY, SILENT = 1000, 200
IO_THREADS = 4
HZ = os.sysconf("SC_CLK_TCK")


class Holds(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    rss: int

    @classmethod
    def of(cls, pid: int) -> Holds:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(descriptors, int(status["Threads"]), int(status["VmRSS"].split()[0]) << 10)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HZ


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def pid(runtime: RuntimeClient) -> int:
    found: int = runtime.call("status")["pid"]
    return found


@pytest.fixture
def raw(tiny_config: Config) -> Iterator[Callable[[bytes], socket.socket]]:
    """Connections that say what they are given, as it is."""
    with contextlib.ExitStack() as opened:

        def connected(data: bytes = b"") -> socket.socket:
            one = opened.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(60)
            one.connect(str(socket_path(tiny_config)))
            one.sendall(data)
            return one

        yield connected


def lines_of(one: socket.socket, count: int) -> list[dict[str, Any]]:
    """The next ``count`` final answers."""
    found: list[dict[str, Any]] = []
    with one.makefile("rb") as file:
        while len(found) < count:
            line = json.loads(file.readline())
            if "event" not in line:
                found.append(line)
    return found


async def storm(path: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everybody connects at once, asks, and is answered; with those around who say nothing."""
    silent = [await asyncio.open_unix_connection(path) for _ in range(SILENT)]
    for _, writer in silent[: SILENT // 2]:
        writer.write(b'{"op": "hel')  # half a line, and then nothing

    async def one(request: dict[str, Any]) -> dict[str, Any]:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(encode(request))
            while "event" in (line := json.loads(await reader.readline())):
                pass
            return dict(line)
        finally:
            writer.close()

    try:
        return await asyncio.gather(*map(one, requests))
    finally:
        for _, writer in silent:
            writer.close()


def test_a_thousand_at_once_and_two_hundred_silent_ones(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop, pid: int
) -> None:
    cube = shop.cube("a", prose(50))
    runtime.call("encode", **cube)
    question = {"op": "ask", "cubes": [cube], "question": "Who?", "max_tokens": 2}
    requests = [question if i % 50 == 0 else {"op": "hello"} for i in range(MANY)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        holds = []
        for _ in range(3):  # the first makes threads and buffers that stay
            answers = asyncio.run(storm(str(socket_path(tiny_config)), requests))
            assert len(answers) == MANY
            assert all("ok" in answer for answer in answers)
            assert len({a["ok"]["answer"] for a in answers if "answer" in a["ok"]}) == 1
            first = holds[0].descriptors if holds else 0
            eventually(lambda first=first: Holds.of(pid).descriptors <= first, 5 if first else 2)
            holds.append(Holds.of(pid))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    before, _, after = holds
    assert after.descriptors <= before.descriptors
    assert after.threads <= before.threads + IO_THREADS, "they come as they are needed"
    assert after.rss - before.rss < 16 << 20
    assert ask(runtime, [cube])["answer"]


def test_without_descriptors_it_waits_and_serves_on(
    runtime: RuntimeClient, raw: Callable[[bytes], socket.socket], pid: int
) -> None:
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert limits[0] == limits[1], "it has taken all that it may have"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (Holds.of(pid).descriptors + 5, limits[1]))
    try:
        waiting = [raw(encode({"op": "hello"})) for _ in range(20)]
        assert eventually(lambda: Holds.of(pid).descriptors == _soft(pid))
        began = cpu_seconds(pid)
        time.sleep(1)
        assert cpu_seconds(pid) - began < 0.3, "it does not spin"
        assert runtime.call("hello")["state"] == "ready"
        for one in waiting[:-1]:
            one.close()
        assert "ok" in lines_of(waiting[-1], 1)[0]
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def _soft(pid: int) -> int:
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]


def test_megabytes_without_an_end_are_refused(
    runtime: RuntimeClient, raw: Callable[[bytes], socket.socket], pid: int
) -> None:
    before = Holds.of(pid)
    for _ in range(5):
        one = raw(b"x" * (MAX_REQUEST - 1))
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            one.sendall(b"x" * 8 * MAX_REQUEST)
        with contextlib.suppress(ConnectionError):
            assert b"at most 1048576 bytes" in one.recv(4096)
    assert eventually(lambda: Holds.of(pid).descriptors <= before.descriptors)
    assert Holds.of(pid).rss - before.rss < 32 << 20
    assert runtime.call("hello")["state"] == "ready"


def test_requests_may_follow_each_other_at_once(
    runtime: RuntimeClient, raw: Callable[[bytes], socket.socket], shop: Shop
) -> None:
    cube = shop.cube("a", prose(30))
    question = {"op": "ask", "cubes": [cube], "question": "Who?", "max_tokens": 4}
    one = raw(encode({"op": "hello"}) + encode(question) + b"junk\n" + encode({"op": "status"}))
    hello, answer, junk, status = lines_of(one, 4)
    assert hello["ok"]["state"] == "ready"
    assert answer["ok"]["tokens"] == 4
    assert junk["error"]["type"] == "InvalidRequest"
    assert status["ok"]["pid"]


@pytest.mark.parametrize(
    "more", [b"", encode({"op": "hello"})], ids=["closed", "with more waiting"]
)
def test_who_goes_in_the_middle_of_an_answer_frees_the_model(
    runtime: RuntimeClient, raw: Callable[[bytes], socket.socket], shop: Shop, pid: int, more: bytes
) -> None:
    cube = shop.cube("a", prose(2000))
    question = {"op": "ask", "cubes": [cube], "question": "Who?", "max_tokens": 4096}
    one = raw(encode(question) + more)
    assert b'"first"' in one.recv(4096)
    one.close()

    def idle() -> bool:
        began = cpu_seconds(pid)
        time.sleep(0.3)
        return cpu_seconds(pid) - began < 0.1

    assert eventually(idle, 3), "4,096 tokens would take far longer"
    began = time.monotonic()
    assert runtime.call("hello")["state"] == "ready"
    assert ask(runtime, [shop.cube("b", "short")], max_tokens=2)["tokens"] == 2
    assert time.monotonic() - began < 3


def test_who_never_reads_stops_nobody(
    runtime: RuntimeClient, raw: Callable[[bytes], socket.socket], shop: Shop, pid: int
) -> None:
    cube = shop.cube("a", prose(30))
    ask(runtime, [cube])  # a store that was named is kept open
    before = Holds.of(pid)
    unread = [raw(encode({"op": "status"}) * 2000) for _ in range(3)]
    unread += [raw(encode({"op": "subscribe", "store": str(shop.root)})) for _ in range(3)]
    for _ in range(3):
        assert ask(runtime, [cube])["answer"]
    assert Holds.of(pid).rss - before.rss < 32 << 20
    for one in unread:
        one.close()
    assert eventually(lambda: Holds.of(pid).descriptors <= before.descriptors)


def test_one_of_two_may_leave_an_encode(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    cube = shop.cube("a", prose(3000))
    with connect(tiny_config, start=False) as leaving:
        one, other = leaving.stream("encode", **cube), runtime.stream("encode", **cube)
        next(one)
        next(other)
    *_, done = other
    assert done["made"]
    assert shop.kv("a").exists()


def test_a_subscriber_who_does_not_listen_is_told_no_more() -> None:
    async def run() -> None:
        subscribers = Subscribers()
        with subscribers.listening() as slow, subscribers.listening() as quick:
            for number in range(MAX_WAITING + 10):
                subscribers.publish({"event": number})
                assert (await anext(quick))["event"] == number
            with pytest.raises(MemfsError, match="subscribe again"):
                await anext(slow)

    asyncio.run(run())
