"""Cubes that were composed become exact while nobody asks, and nothing else waits for that."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from memfs.config import Config
from memfs.runtime.asking.joint import joint
from memfs.runtime.client import RuntimeClient
from memfs.runtime.kv.encoding import prefill
from memfs.runtime.model.resident import Resident
from memfs.runtime.worker import Priority, Worker

from .conftest import Shop, ask, how, prose, run_all


def cubes_of(runtime: RuntimeClient, shop: Shop, *texts: str) -> list[dict[str, str]]:
    cubes = [shop.cube(hashlib.sha256(text.encode()).hexdigest()[:8], text) for text in texts]
    for cube in cubes:
        runtime.call("encode", **cube)
    return cubes


def states(runtime: RuntimeClient, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said of the cubes of a report placed together; no others are as long."""
    tokens = sum(cube["tokens"] for cube in report["cubes"])
    lines = [line for line in runtime.call("status")["mounted"] if line["kind"] == "placed"]
    return [line for line in lines if line["tokens"] == tokens]


def until_exact(runtime: RuntimeClient, cubes: list[dict[str, str]]) -> dict[str, Any]:
    """The report of the first question that is answered from exact rows."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        report = ask(runtime, cubes, max_tokens=64)
        if report["composed"] == "exact":
            return report
        time.sleep(1)
    raise AssertionError("still composed after 30 seconds")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny_model_dir", "tiny_qwen_dir"])
def test_the_rows_are_those_of_the_text_path(
    request: pytest.FixtureRequest, load_model: Callable[..., Resident], model: str, dtype: str
) -> None:
    directory: Path = request.getfixturevalue(model)
    resident = load_model(directory, dtype)
    first, second = (run_all(prefill(resident, prose(150, seed), None)) for seed in (1, 2))
    expected = first.cache.resized(first.cache.length + len(second.ids))
    run_all(resident.engine.prefill(expected, second.ids))
    ids = [first.ids, second.ids]
    made = run_all(joint(resident, ids, resident.base + sum(map(len, ids)) + 100))
    assert made.length == expected.length
    for mine, theirs in zip(made.layers, expected.layers, strict=True):
        assert torch.equal(mine[:, :, : made.length], theirs[:, :, : made.length])


def test_the_next_question_is_answered_exactly(runtime: RuntimeClient, shop: Shop) -> None:
    cubes = cubes_of(runtime, shop, prose(150, 1), prose(90, 2), prose(200, 3))
    first = ask(runtime, cubes, max_tokens=64)
    assert first["composed"] == Config.compose
    assert 0 < first["recomputed_tokens"] < first["cached_tokens"]
    exact = until_exact(runtime, cubes)
    assert (how(exact), exact["recomputed_tokens"]) == (["kv", "kv", "kv"], 0)
    text = ask(runtime, cubes, kv=False, max_tokens=64)
    assert (how(text), text["composed"]) == (["text", "text", "text"], None)
    assert exact["answer"] == text["answer"]
    assert exact["prompt_tokens"] == text["prompt_tokens"]
    (line,) = states(runtime, exact)
    assert (line["composed"], line["joint"]) == ("exact", None)
    assert ask(runtime, cubes[::-1])["composed"] == Config.compose, "another order is another text"
    assert ask(runtime, cubes[:1])["composed"] is None


def test_a_cube_that_goes_ends_it(runtime: RuntimeClient, shop: Shop) -> None:
    changing, going, staying = (
        cubes_of(runtime, shop, prose(150, seed), prose(140 + seed, seed)) for seed in (4, 6, 8)
    )
    changed = ask(runtime, changing)
    shop.cube(changing[1]["path"], prose(150, 5))
    runtime.call("changed", **changing[1])
    gone = ask(runtime, going)
    runtime.call("unmount", **going[0])
    until_exact(runtime, staying)  # which began last
    for report in (changed, gone):
        assert report["composed"] == Config.compose
        assert states(runtime, report) == [], "it went with the cube"
    again = ask(runtime, changing)
    assert (how(again), again["composed"]) == (["kv", "kv"], Config.compose)


def test_a_question_does_not_wait_for_it(
    tiny_model_dir: Path, load_model: Callable[..., Resident]
) -> None:
    resident = load_model(tiny_model_dir)
    ids = [resident.prompt.memory(prose(600, seed)) for seed in (1, 2)]
    done: list[float] = []
    asked = threading.Event()
    answered_at: list[int] = []

    def watched() -> Generator[float | None, None, None]:
        for share in joint(resident, ids, resident.base + sum(map(len, ids))):
            if share is not None:
                done.append(share)
            yield share
            asked.wait(30)

    def answer() -> Generator[None, None, None]:
        answered_at.append(len(done))
        yield

    async def run() -> None:
        worker = Worker()
        job = worker.submit(watched(), Priority.JOINT)
        async for _ in job:
            if not asked.is_set():
                question = worker.submit(answer(), Priority.ANSWER)
                asked.set()
        await question.done()
        worker.close()

    asyncio.run(run())
    assert answered_at[0] <= 2, "after the chunk that was being computed"
    assert len(done) == 10
    assert done[-1] == 1
