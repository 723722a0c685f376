"""Where memories are: on the device, in host memory, in the page cache, on the disk; and pins."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memfs.config import Config
from memfs.cube import metadata
from memfs.errors import NotFound, OverBudget
from memfs.runtime.client import RuntimeClient
from memfs.runtime.mounting.page_cache import cached_bytes, drop, read_ahead
from tests.waiting import until

from .conftest import Shop, ask, daemon, how, prose, run_all

if TYPE_CHECKING:
    from memfs.runtime.model.resident import Resident
    from memfs.runtime.mounting.mounted import Mounted

ROW = 2 * 2 * 2 * 16 * 2
"""Bytes of a row of the tiny model in bfloat16: layers, keys and values, KV heads, head_dim."""


@pytest.fixture(scope="module")
def little(tiny_config: Config) -> Iterator[RuntimeClient]:
    """A runtime whose budget holds three short memories."""
    with daemon(replace(tiny_config, dtype="bfloat16", budget_bytes=2300 * ROW)) as client:
        yield client


@pytest.fixture
def small(little: RuntimeClient) -> Iterator[RuntimeClient]:
    """The same, with nothing in the model before and after."""
    yield little
    for line in little.call("status")["mounted"]:
        if line["kind"] == "kv":
            little.call("pin", store=line["store"], path=line["cube"], on=False)
            little.call("unmount", store=line["store"], path=line["cube"])


def header(shop: Shop, path: str, **state: object) -> None:
    """Gives a cube a meta.json of this state."""
    meta = metadata.new(title=path)
    meta["state"] |= state
    (shop.root / path / "meta.json").write_bytes(metadata.render(meta))


def tiers_of(client: RuntimeClient, shop: Shop) -> dict[str, str]:
    """The tier of each cube of a store that the runtime knows."""
    status = client.call("status")
    lines = [*status["mounted"], *status["nearby"]]
    return {line["cube"]: line["tier"] for line in lines if line["store"] == str(shop.root)}


def test_the_page_cache_is_seen_read_ahead_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_001)
    with path.open("r+b") as file:
        fd = file.fileno()
        assert cached_bytes(fd) == 3_000_001
        drop(fd)
        assert cached_bytes(fd) == 0
        os.pread(fd, 1, 0)
        assert 0 < cached_bytes(fd) < 3_000_001
        read_ahead(fd)
        for _ in range(200):
            if cached_bytes(fd) == 3_000_001:
                break
            os.pread(fd, 1, 2_999_999)
        assert cached_bytes(fd) == 3_000_001
        file.truncate(0)
        assert cached_bytes(fd) == 0


def test_what_was_evicted_is_shown_where_it_is_now(small: RuntimeClient, shop: Shop) -> None:
    for name in "abcd":
        small.call("encode", **shop.cube(name, prose(60, ord(name))))
        small.call("mount", **shop.named(name))
    found = tiers_of(small, shop)
    assert found["d"] == "device" and found["a"] == "page cache"
    with shop.kv("a").open("rb") as file:
        drop(file.fileno())
    assert tiers_of(small, shop)["a"] == "disk"
    status = small.call("status")
    tiers = {tier["tier"]: tier for tier in status["tiers"]}
    assert tiers["device"]["bytes"] == status["used_bytes"] <= tiers["device"]["budget_bytes"]
    assert "the host's" in tiers["host"]["off"]
    assert tiers["disk"]["bytes"] == shop.kv("a").stat().st_size
    assert how(ask(small, [shop.named("a")])) == ["kv"]
    assert tiers_of(small, shop)["a"] == "device"


def test_a_pin_loads_at_once_and_stays_until_it_is_taken_off(
    small: RuntimeClient, shop: Shop
) -> None:
    for name in "abcdef":
        small.call("encode", **shop.cube(name, prose(60, ord(name))))
    assert small.call("pin", **shop.named("a"))["pinned"]["tokens"] > 0
    assert small.call("status")["mounted"][0]["sessions"] == [], "it is in nobody's session"
    for name in "bcdef":
        small.call("mount", **shop.named(name))
    assert tiers_of(small, shop)["a"] == "device"
    assert small.call("pin", **shop.named("a"), on=False) == {"pinned": None}
    for name in "bcdef":
        small.call("mount", **shop.named(name))
    assert tiers_of(small, shop)["a"] == "page cache"


def test_a_pinned_cube_leaves_a_session_and_not_the_model(small: RuntimeClient, shop: Shop) -> None:
    small.call("encode", **shop.cube("a", prose(60)))
    small.call("pin", **shop.named("a"))
    small.call("mount", **shop.named("a"))
    assert small.call("unmount", **shop.named("a")) == {"unmounted": ["a"]}, "from the session"
    with pytest.raises(NotFound, match="memfs pin --off"):
        small.call("unmount", **shop.named("a"))
    assert tiers_of(small, shop)["a"] == "device"


def test_pins_never_take_the_whole_budget(small: RuntimeClient, shop: Shop) -> None:
    for name in "abc":
        small.call("encode", **shop.cube(name, prose(60, ord(name))))
    small.call("pin", **shop.named("a"))
    small.call("pin", **shop.named("b"))
    with pytest.raises(OverBudget, match="memfs pin --off"):
        small.call("pin", **shop.named("c"))
    small.call("unmount", **shop.named("c"))
    header(shop, "c", pinned=True)
    small.call("mount", **shop.named("c"))
    line = next(line for line in small.call("status")["mounted"] if line["cube"] == "c")
    assert not line["pinned"], "mounted all the same"
    assert "cannot be pinned" in small.call("status")["refusals"][-1]["reason"]


def test_the_header_pins_while_it_says_so(small: RuntimeClient, shop: Shop) -> None:
    small.call("encode", **shop.cube("a", prose(60)))
    small.call("mount", **shop.named("a"))

    def is_pinned() -> bool:
        small.call("changed", **shop.named("a"))
        return bool(small.call("status")["mounted"][0]["pinned"])

    assert not is_pinned()
    header(shop, "a", pinned=True)
    assert is_pinned()
    header(shop, "a", pinned=False)
    assert not is_pinned()


@pytest.fixture
def with_host(
    load_model: Callable[..., Resident], tiny_model_dir: Path, shop: Shop
) -> Callable[[Callable[[Mounted, list[dict[str, Any]]], Awaitable[None]]], None]:
    """Runs a test over a mounted set of two memories' room, with a host tier, and cubes a to e."""
    import torch

    from memfs.cube.access import Caller
    from memfs.runtime.cubes import Stores
    from memfs.runtime.kv import cube_kv
    from memfs.runtime.kv.encoding import prefill
    from memfs.runtime.mounting.host import Host
    from memfs.runtime.mounting.mounted import Mounted

    resident = load_model(tiny_model_dir)
    stores, me = Stores(), Caller.of(os.getuid(), os.getgid())
    for name in "abcde":
        shop.cube(name, prose(60, ord(name)))
        cube = stores.cube(str(shop.root), name, me, by_mount=False)
        with cube.open(me) as files:
            text = files.text()
        cube_kv.publish(cube, resident, run_all(prefill(resident, text.text, None)), text, "exact")

    def run(body: Callable[[Mounted, list[dict[str, Any]]], Awaitable[None]]) -> None:
        async def whole() -> None:
            with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as io:
                events: list[dict[str, Any]] = []
                host = Host(600 * resident.shape.token_bytes, io, pinned=False)
                room = 2000 * resident.shape.token_bytes
                await body(Mounted(resident, room, io, events.append, host), events)

        asyncio.run(whole())

    return run


async def load(mounted: Mounted, shop: Shop, path: str) -> Any:
    """Loads a cube as a question does."""
    from memfs.cube.access import Caller
    from memfs.runtime.cubes import Stores

    me = Caller.of(os.getuid(), os.getgid())
    cube = Stores().cube(str(shop.root), path, me, by_mount=False)
    with await mounted.open(me, cube, "mount") as files:
        return await mounted.load(files, me.uid)


def test_what_leaves_the_device_comes_back_from_host_memory_unread(
    with_host: Callable[..., None], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from memfs.runtime.kv import kv_store

    reads: list[int] = []
    read = kv_store.read
    monkeypatch.setattr(kv_store, "read", lambda *a, **k: reads.append(1) or read(*a, **k))

    async def body(mounted: Mounted, _: list[dict[str, Any]]) -> None:
        host = mounted.host
        assert host
        first = (await load(mounted, shop, "a")).value.cache
        rows = [layer[:, :, : first.length].clone() for layer in first.layers]
        for name in "bcde":
            await load(mounted, shop, name)
        assert len(reads) == 5
        assert mounted.residency.used_bytes <= mounted.residency.budget_bytes
        assert host.residency.used_bytes <= host.residency.budget_bytes
        assert "a" in [entry.key.rpartition("\0")[2] for entry in host.residency]
        back = (await load(mounted, shop, "a")).value.cache
        assert len(reads) == 5, "no file was read for it"
        assert back is not first and back.room == kv_store.ROOM
        assert all(
            torch.equal(mine[:, :, : back.length], theirs)
            for mine, theirs in zip(back.layers, rows, strict=True)
        )

    with_host(body)


def test_host_memory_is_used_only_while_the_files_stand(
    with_host: Callable[..., None], shop: Shop
) -> None:
    from memfs.errors import KVStale

    async def body(mounted: Mounted, _: list[dict[str, Any]]) -> None:
        assert mounted.host
        for name in "abcd":
            await load(mounted, shop, name)
        kept = next(iter(mounted.host.residency)).key.rpartition("\0")[2]
        shop.cube(kept, prose(60) + " edited")
        with pytest.raises(KVStale):
            await load(mounted, shop, kept)
        assert kept not in [entry.key.rpartition("\0")[2] for entry in mounted.host.residency]

    with_host(body)


def test_what_is_unmounted_is_not_kept(with_host: Callable[..., None], shop: Shop) -> None:
    async def body(mounted: Mounted, _: list[dict[str, Any]]) -> None:
        assert mounted.host
        for name in "abcd":
            await load(mounted, shop, name)
        for entry in [*mounted.residency, *mounted.host.residency]:
            assert entry.value.cube
            mounted.unmount(entry.value.cube, 0)
        assert not list(mounted.host.residency) and not list(mounted.residency)

    with_host(body)


def test_what_was_asked_together_is_read_ahead(small: RuntimeClient, shop: Shop) -> None:
    a, b = (shop.cube(name, prose(60, ord(name))) for name in "ab")
    for cube in (a, b):
        small.call("encode", **cube)
    before = small.call("status")["ahead"]

    def again() -> None:
        for cube in (a, b):
            if tiers_of(small, shop).get(cube["path"]) == "device":
                small.call("unmount", **cube)

    ask(small, [a, b])
    again()
    small.call("mount", **a)
    assert small.call("status")["ahead"] == before, "once may be chance"
    ask(small, [a, b])
    again()
    small.call("mount", **a)
    until(lambda: tiers_of(small, shop).get("b") == "device")
    line = next(line for line in small.call("status")["mounted"] if line["cube"] == "b")
    assert line["hits"] == 0 and not line["protected"] and line["sessions"] == []
    assert small.call("status")["ahead"]["prefetched"] == before["prefetched"] + 1
    small.call("mount", **b)
    assert small.call("status")["ahead"]["used"] == before["used"] + 1


def test_reading_ahead_evicts_nothing(small: RuntimeClient, shop: Shop) -> None:
    cubes = [shop.cube(name, prose(60, ord(name))) for name in "abcde"]
    for cube in cubes:
        small.call("encode", **cube)
    a, b, *others = cubes
    for _ in range(2):
        ask(small, [a, b])
    for line in small.call("status")["mounted"]:  # also what was placed
        if line["kind"] == "kv":
            small.call("unmount", store=line["store"], path=line["cube"])
    for cube in others:
        small.call("mount", **cube)
    with shop.kv("b").open("rb") as file:
        drop(file.fileno())
        before = small.call("status")["ahead"]["prefetched"]
        small.call("mount", **a)
        until(lambda: small.call("status")["ahead"]["prefetched"] > before)
        until(lambda: cached_bytes(file.fileno()))
    found = tiers_of(small, shop)
    assert found["a"] == "device" and found["b"] == "page cache"
