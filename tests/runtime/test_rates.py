"""Load or prefill: the arithmetic, what a file's pages say, and that no answer depends on it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfs.cube.access import Caller
from memfs.runtime.asking.asks import Asking
from memfs.runtime.asking.policy import Policy
from memfs.runtime.client import RuntimeClient
from memfs.runtime.cubes import Cube
from memfs.runtime.model.resident import Resident
from memfs.runtime.mounting.gauge import gauge
from memfs.runtime.mounting.making import Making
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.rates import DOUBT, MARGIN, Loading, Prefilling, Rates, Stored
from memfs.runtime.worker import Worker
from memfs.vault.store import Store
from tests.waiting import until

from .conftest import Shop, ask, how, prose, run_all

PREFILLING = Prefilling(chunk_rows=256, chunk=0.03, row=0.0004, pair=1e-7)
LOADING = Loading(file=0.001, byte=1e-10)
FILE = Stored(100 << 20, 0.0, device=1)
COLD = replace(FILE, on_disk=1.0)

seconds = st.floats(1e-6, 100)


def rates_of(prefilling: Prefilling = PREFILLING, loading: Loading = LOADING) -> Rates:
    rates = Rates()
    rates.prefilling, rates.loading = prefilling, loading
    return rates


def test_before_anything_is_measured_it_is_loaded() -> None:
    rates = Rates()
    rates.prefilled(0, 100, 5.0)
    rates.loaded(FILE, 5.0)
    assert rates.choose(FILE, 10, 100, exact=True).load
    assert rates.facts() is None


@given(chunk=seconds, file=seconds)
def test_the_cheaper_one_is_taken(chunk: float, file: float) -> None:
    rates = rates_of(Prefilling(256, chunk, 0, 0), Loading(file, 0))
    assert rates.choose(FILE, 10, 100, exact=False).load, (
        "what is in int8 is never computed instead"
    )
    choice = rates.choose(FILE, 10, 100, exact=True)
    assert choice.load_s == file
    assert choice.prefill_s == chunk
    assert choice.load == (chunk >= MARGIN * file)


@given(st.integers(0, 8000), st.integers(1, 8000))
def test_a_prefill_costs_more_the_more_there_is(before: int, rows: int) -> None:
    took = PREFILLING.seconds(before, rows)
    assert took < PREFILLING.seconds(before, rows + 1)
    assert took < PREFILLING.seconds(before + 1, rows)
    assert took == pytest.approx(
        PREFILLING.seconds(before, rows // 256 * 256)
        + PREFILLING.seconds(before + rows // 256 * 256, rows % 256)
    )


@given(slower=st.floats(0.05, 50))
def test_estimates_follow_what_really_happens(slower: float) -> None:
    rates = rates_of()
    for _ in range(40):
        rates.prefilled(30, 900, slower * PREFILLING.seconds(30, 900))
        rates.loaded(FILE, slower * LOADING.seconds(FILE.nbytes))
    assert rates.prefill_seconds(0, 10) == pytest.approx(slower * PREFILLING.seconds(0, 10), 0.01)
    assert rates.load_seconds(FILE) == pytest.approx(slower * LOADING.seconds(FILE.nbytes), 0.01)


def test_a_slow_disk_is_learned_and_doubted() -> None:
    rates = rates_of()
    assert rates.choose(COLD, 10, 300, exact=True).load, "of a disk nothing is known at first"
    rates.loaded(COLD, 60.0)
    assert rates.load_seconds(COLD) == pytest.approx(60.0)
    assert rates.load_seconds(FILE) < 1, "what is in the page cache needs no disk"
    assert rates.load_seconds(replace(COLD, device=2)) < 1
    assert rates.facts()["disks"][0]["bytes_per_s"] == pytest.approx(FILE.nbytes / 60, 0.01)
    times = 0
    while not rates.choose(COLD, 10, 300, exact=True).load:
        times += 1
    assert 10 < times < 200, "some day it is tried again"
    assert DOUBT < 1


def test_pages_that_are_not_there_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        assert Stored.of(file.fileno()).on_disk == 0
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = Stored.of(file.fileno())
        if found.on_disk == 0:
            pytest.skip("this filesystem keeps its pages, or does not tell")
        assert found.on_disk > 0.5
        assert (found.nbytes, found.device) == (8 << 20, path.stat().st_dev)
        while file.read(1 << 20):
            pass
        assert Stored.of(file.fileno()).on_disk == 0


@pytest.fixture(scope="module")
def resident(tiny_model_dir: Path, load_model: Callable[[Path], Resident]) -> Resident:
    return load_model(tiny_model_dir)


def test_the_gauge_measures_this_machine(resident: Resident) -> None:
    prefilling, loading = run_all(gauge(resident))
    assert 0 < prefilling.seconds(0, 256) < prefilling.seconds(4096, 256) < 60
    assert 0 < loading.seconds(1 << 20) < 10


async def asked(
    resident: Resident, rates: Rates, question: Callable[[Asking, Mounted], Awaitable[Any]]
) -> Any:
    """Runs something over a mounted set of its own."""
    worker, io = Worker(), ThreadPoolExecutor(2)
    try:
        mounted = Mounted(resident, 1 << 30, io, lambda event: None)
        making = Making(mounted, worker, rates)
        asking = Asking(mounted, worker, making, rates, Policy())
        return await question(asking, mounted)
    finally:
        worker.close()
        io.shutdown()


async def report(asking: Asking, cubes: list[Cube]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async for event in asking.ask(0.0, Caller.of(0, 0), cubes, "Why?", kv=True, limit=16):
        last = event
    return dict(last["ok"])


def test_prefilled_or_loaded_is_the_same(
    resident: Resident, runtime: RuntimeClient, shop: Shop
) -> None:
    names = [shop.cube("a", prose(300, 1)), shop.cube("b", prose(40, 2))]
    for name in names:
        runtime.call("encode", **name)
    digests = [shop.digest(path) for path in "ab"]
    cubes = [Cube(Store.open(shop.root, create_control=False), path) for path in "ab"]
    slow = Loading(file=1000.0, byte=0.0)

    async def ask_twice(asking: Asking, mounted: Mounted) -> tuple[list[Any], list[torch.Tensor]]:
        reports = [await report(asking, cubes), await report(asking, cubes[:1])]
        caches = [mounted.residency.peek(cube.key).value.cache for cube in cubes]  # type: ignore[union-attr]
        return reports, [layer[:, :, : c.length].clone() for c in caches for layer in c.layers]

    loaded, loaded_rows = asyncio.run(asked(resident, rates_of(), ask_twice))
    made, made_rows = asyncio.run(asked(resident, rates_of(loading=slow), ask_twice))
    assert [[c["chose"]["way"] for c in r["cubes"]] for r in loaded] == [["file"] * 2, ["resident"]]
    assert [[c["chose"]["way"] for c in r["cubes"]] for r in made] == [
        ["prefill"] * 2,
        ["resident"],
    ]
    assert all(how(r) == ["kv"] * len(r["cubes"]) for r in made)
    assert all(map(torch.equal, loaded_rows, made_rows))
    assert [r["answer"] for r in loaded] == [r["answer"] for r in made]
    assert loaded[0]["cached_tokens"] - made[0]["cached_tokens"] == sum(
        cube["tokens"] for cube in made[0]["cubes"]
    ), "what is computed for a question is not counted as had"
    assert made[0]["cubes"][0]["chose"]["load_s"] == 1000.0
    assert made[0]["cubes"][0]["chose"]["why"] == "prefilling is faster"
    assert [shop.digest(path) for path in "ab"] == digests


def test_the_daemon_tells_its_rates_and_its_choice(runtime: RuntimeClient, shop: Shop) -> None:
    rates = until(lambda: runtime.call("status")["rates"])
    assert rates["prefill_s_for_256_rows"] < rates["prefill_s_for_256_rows_behind_4096"]
    assert rates["load_bytes_per_s"] > 1e6
    cube = shop.cube("a", prose(300))
    runtime.call("encode", **cube)
    (line,) = ask(runtime, [cube])["cubes"]
    assert line["chose"]["way"] == "file", "a load of some kilobytes is never the slower here"
    assert line["chose"]["load_s"] < line["chose"]["prefill_s"]
    (line,) = ask(runtime, [cube])["cubes"]
    assert line["chose"]["way"] == "resident"
    assert ask(runtime, [cube], kv=False)["cubes"][0]["chose"] is None
