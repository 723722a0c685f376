"""Answers in the model's thread take their steps together, and turns with what else wants it."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memfs.config import Config
from memfs.errors import MemfsError
from memfs.runtime import worker as worker_module
from memfs.runtime.asking.answering import Part, Question, answer
from memfs.runtime.client import RuntimeClient, connect
from memfs.runtime.kv.encoding import Encoded, prefill
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.steps import Step
from memfs.runtime.worker import Job, Priority, Worker

from ..waiting import until
from .conftest import Shop, prose, run_all

MODELS = ["tiny_model_dir", "tiny_qwen_dir"]


@pytest.fixture(params=MODELS)
def resident(request: pytest.FixtureRequest, load_model: Callable[[Path], Resident]) -> Resident:
    return without_end(load_model(request.getfixturevalue(request.param)))


@pytest.fixture
def tiny(tiny_model_dir: Path, load_model: Callable[[Path], Resident]) -> Resident:
    return without_end(load_model(tiny_model_dir))


def without_end(resident: Resident) -> Resident:
    """Its answers are as long as they may be."""
    return replace(resident, stop=frozenset())


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were taken together, each time."""
    sizes: list[int] = []
    take = worker_module.take

    def counting(steps: list[Step]) -> list[Any]:
        if steps:
            sizes.append(len(steps))
        return take(steps)

    monkeypatch.setattr(worker_module, "take", counting)
    return sizes


def asked(words: int, limit: int) -> Question:
    parts = [Part(f"of {words} words", "/s", prose(words, words), None)] if words else []
    return Question(f"What of {words}?", parts, limit, 0.0)


def at_once(worker: Worker, what: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs in an event loop; what is submitted before the first await begins together."""

    async def main() -> Any:
        gate = threading.Event()
        worker.call(gate.wait, Priority.ANSWER)
        running = asyncio.ensure_future(what())
        asyncio.get_running_loop().call_soon(gate.set)
        return await asyncio.wait_for(running, 60)

    return asyncio.run(main())


async def answers(worker: Worker, resident: Resident, questions: list[Question]) -> list[str]:
    jobs = [worker.submit(answer(resident, q), Priority.ANSWER) for q in questions]
    return [(await job.done()).report["answer"] for job in jobs]


QUESTIONS = [(0, 30), (5, 12), (40, 25), (300, 1), (90, 18), (600, 20)]
"""Words of the memory, and tokens of the answer."""


def alone(resident: Resident) -> list[str]:
    return [run_all(answer(resident, asked(*q))).report["answer"] for q in QUESTIONS]


def test_many_at_once_get_what_each_gets_alone(
    worker: Worker, resident: Resident, rounds: list[int]
) -> None:
    questions = [asked(*q) for q in QUESTIONS]
    assert at_once(worker, lambda: answers(worker, resident, questions)) == alone(resident)
    assert max(rounds) > 2, "together"
    assert sum(rounds) == sum(limit - 1 for _, limit in QUESTIONS), "a token each, and no other"
    assert len(rounds) < sum(rounds) / 2


def test_a_model_that_takes_one_sequence_serves_many(
    worker: Worker, tiny: Resident, rounds: list[int]
) -> None:
    one = replace(tiny, packs=False)
    questions = [asked(*q) for q in QUESTIONS]
    assert at_once(worker, lambda: answers(worker, one, questions)) == alone(one)


def test_more_than_a_forward_takes_have_turns(
    worker: Worker, tiny: Resident, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MOST", 2)
    questions = [asked(*q) for q in QUESTIONS]
    assert at_once(worker, lambda: answers(worker, tiny, questions)) == alone(tiny)
    assert set(rounds) == {1, 2}


def test_one_that_is_cancelled_leaves_the_others(worker: Worker, tiny: Resident) -> None:
    async def main() -> tuple[list[str], int]:
        leaving = worker.submit(answer(tiny, asked(0, 4000)), Priority.ANSWER)
        staying = asyncio.ensure_future(answers(worker, tiny, [asked(*q) for q in QUESTIONS]))
        count = 0
        async for _ in leaving:
            count += 1
            if count == 6:
                leaving.cancel()
        return await staying, count

    found, count = at_once(worker, main)
    assert found == alone(tiny)
    assert count < 4000
    assert not worker._decoding


def test_the_error_of_one_is_its_own(worker: Worker, tiny: Resident) -> None:
    def beyond_its_cache() -> Generator[Step, Any, None]:
        cache = tiny.engine.new_cache(4)
        run_all(tiny.engine.prefill(cache, [5, 6]))
        while True:
            yield Step(tiny, cache, 7)

    async def main() -> list[str]:
        full = worker.submit(beyond_its_cache(), Priority.ANSWER)
        found = await answers(worker, tiny, [asked(*q) for q in QUESTIONS])
        with pytest.raises(MemfsError, match="do not fit"):
            await full.done()
        return found

    assert at_once(worker, main) == alone(tiny)


def test_an_encode_waits_for_answers_and_goes_on(worker: Worker, tiny: Resident) -> None:
    text = prose(900)
    order: list[str] = []

    async def follow(name: str, job: Job[Any, Any]) -> Any:
        async for _ in job:
            order.append(name)
        return job.result

    async def main() -> list[Any]:
        encode = follow("encode", worker.submit(prefill(tiny, text, None), Priority.ENCODE))
        jobs = [worker.submit(answer(tiny, asked(*q)), Priority.ANSWER) for q in QUESTIONS]
        return await asyncio.gather(encode, *(follow("answer", job) for job in jobs))

    made: Encoded = at_once(worker, main)[0]
    assert made.ids == run_all(prefill(tiny, text, None)).ids
    last = max(i for i, name in enumerate(order) if name == "answer")
    assert order.index("encode") > last, "its chunks come when nobody is answered"
    assert order.count("encode") == -(-len(made.ids) // PREFILL_CHUNK)


def test_who_begins_and_who_goes_on_take_turns(
    worker: Worker, tiny: Resident, rounds: list[int]
) -> None:
    """Three are being answered; one with a long text joins them."""
    long = asked(900, 3)
    chunks = -(-len(tiny.prompt.memory(prose(900, 900), 8192)) // PREFILL_CHUNK)
    seen: list[int] = []

    def watched() -> Generator[Any, Any, Any]:
        """The newcomer; how many rounds the others had at each of its turns, and its first word."""
        steps, given = answer(tiny, long), None
        while True:
            try:
                item = steps.send(given)
            except StopIteration:
                return
            if item is None or (isinstance(item, dict) and item["event"] == "first"):
                seen.append(len(rounds))
            given = yield item

    async def main() -> None:
        jobs = [worker.submit(answer(tiny, asked(0, 400)), Priority.ANSWER) for _ in range(3)]
        async for event in jobs[0]:
            if event["event"] == "text" and len(rounds) > 5:
                break
        begun = len(rounds)
        await worker.submit(watched(), Priority.ANSWER).done()
        for job in jobs:
            job.cancel()
        assert seen[0] - begun <= 5, "it begins at once"

    at_once(worker, main)
    between = [after - before for before, after in itertools.pairwise(seen)]
    assert between == [1] * chunks, "a chunk, a token of each other, a chunk, …, its first token"


# Through the daemon.


def busy(pid: int, seconds: float = 0.3) -> bool:
    """Whether a process computes."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(seconds)
    return ticks() - before > seconds * os.sysconf("SC_CLK_TCK") / 4


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_who_leaves_ends_their_answer(
    tiny_config: Config, runtime: RuntimeClient, shop: Shop, when: str
) -> None:
    cube = shop.cube("a", prose(3000 if when == "prefill" else 30))
    kv = when == "decode"
    if kv:
        runtime.call("encode", **cube)
    pid = runtime.call("status")["pid"]
    for _ in range(2):  # the second writes into the room that the first had
        with connect(tiny_config, start=False) as leaving:
            events = leaving.stream("ask", question="Why?", cubes=[cube], kv=kv, max_tokens=4096)
            if kv:
                next(events)
            else:
                threading.Timer(0.2, leaving.close).start()
                with pytest.raises((MemfsError, OSError, ValueError)):
                    next(events)
        until(lambda: not busy(pid), seconds=3)  # the whole of it would take longer
