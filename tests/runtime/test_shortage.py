"""Out of memory: refused by name, and the runtime goes on; with a limit on a real daemon."""

from __future__ import annotations

import contextlib
import gc
import mmap
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from memfs.config import Config
from memfs.errors import OutOfMemory
from memfs.runtime.client import RuntimeClient
from memfs.runtime.mounting.residency import Residency
from memfs.runtime.shortage import shortage, telling
from tests import tiny

from .conftest import Shop, ask, daemon, how, prose

LAYERS, KV_HEADS, HEAD_DIM = 2, 4, 256
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4


def raised(function: Callable[[], object]) -> Exception:
    """What a function that asks for too much raises."""
    try:
        function()
    except Exception as e:  # noqa: BLE001  whatever it is
        return e
    raise AssertionError("there was enough")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (raised(lambda: torch.empty(1 << 50, dtype=torch.uint8)), "1125899906842624 bytes could"),
        (raised(lambda: bytearray(1 << 60)), "what was wanted could"),
        (raised(lambda: mmap.mmap(-1, 1 << 60)), "what was wanted could"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB"),
        (RuntimeError("CUDA error: out of memory"), "what was wanted"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "what was wanted"),
        (RuntimeError("std::bad_alloc"), "what was wanted"),
    ],
)
def test_whatever_says_it_is_told_as_one_error(error: Exception, named: str) -> None:
    found = shortage(error)
    assert isinstance(found, OutOfMemory)
    assert named in str(found)
    assert "budget_bytes" in str(found), "it says what to do"


@pytest.mark.parametrize(
    "error",
    [raised(lambda: torch.zeros(2) @ torch.zeros(3)), raised(lambda: Path("/nowhere").stat())],
)
def test_what_is_something_else_stays_what_it_is(error: Exception) -> None:
    assert shortage(error) is None

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        telling(fail)


def test_what_was_allocated_before_is_let_go() -> None:
    held = []

    def fail() -> None:
        before = torch.empty(1000)
        held.append(weakref.ref(before))
        torch.empty(1 << 50)

    gc.disable()  # at once, and not when the collector comes by
    try:
        with pytest.raises(OutOfMemory) as refusal:
            telling(fail)
        assert held[0]() is None
        assert refusal.value.__context__ is None
    finally:
        gc.enable()


class Bytes:
    nbytes = 10


def test_the_coldest_are_shed_and_what_is_in_use_is_not() -> None:
    residency: Residency[Bytes] = Residency(100)
    for name in "abcde":
        residency.add(name, Bytes(), 1)
    for _ in range(2):
        residency.use("a")
    residency.peek("b").users = 1
    residency.peek("c").pinned = True
    assert [entry.key for entry in residency.shed(15)] == ["d", "e"]
    assert [entry.key for entry in residency.shed(100)] == ["a"]
    assert residency.shed(100) == []
    assert {entry.key for entry in residency} == {"b", "c"}


@pytest.fixture(scope="module")
def wide_config(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny model with 16 KiB of KV cache a token: a layer of a long text is an allocation of its
    own, which goes back to the system when it is freed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = tiny.sizes(
        default_model_dir, layers=LAYERS, heads=KV_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    directory = tmp_path_factory.mktemp("wide")
    tiny.saved(LlamaForCausalLM, LlamaConfig(**sizes), default_model_dir, directory)
    return Config(model=str(directory), device="cpu", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def wide(wide_config: Config) -> Iterator[RuntimeClient]:
    with daemon(wide_config) as client:
        yield client


@contextlib.contextmanager
def only(client: RuntimeClient, large: dict[str, str], more: int) -> Iterator[None]:
    """A runtime may have ``more`` bytes of memory than it has, and none beyond.

    Nor has it any ready for the next mount: it gives that back, for good, when it has too little to
    encode ``large``.
    """
    pid = client.call("status")["pid"]
    before = resource.prlimit(pid, resource.RLIMIT_AS)

    def limit(more: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + more
        resource.prlimit(pid, resource.RLIMIT_AS, (wanted, before[1]))

    try:
        limit(8 << 20)
        with pytest.raises(OutOfMemory):
            client.call("encode", **large, force=True)
        limit(more)
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


def test_without_memory_it_says_so_and_serves_the_next(wide: RuntimeClient, shop: Shop) -> None:
    long, small = shop.cube("long", prose(2600)), shop.cube("small", prose(20))
    other = shop.cube("other", prose(2600, 1))
    wide.call("encode", **long)
    rows = wide.call("encode", **small)["tokens"]
    pid = wide.call("status")["pid"]
    nbytes = shop.kv("long").stat().st_size
    assert nbytes > 80 << 20
    assert rows * TOKEN_BYTES < 2 << 20
    wide.call("mount", **small, pin=True)
    expected = ask(wide, [small])["answer"]
    with only(wide, long, nbytes // 2):
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="bytes could not be had"):
                wide.call("mount", **long)
            with pytest.raises(OutOfMemory):
                wide.call("encode", **other)
            with pytest.raises(OutOfMemory):
                ask(wide, [long])
            assert ask(wide, [small])["answer"] == expected
    assert any("memory" in line["reason"] for line in wide.call("status")["refusals"])
    assert not shop.kv("other").exists()
    assert wide.call("status")["pid"] == pid
    wide.call("encode", **other, mount=True)
    assert how(ask(wide, [long, small])) == ["kv", "kv"]
    wide.call("unmount")


def test_something_colder_goes_for_what_is_mounted(wide: RuntimeClient, shop: Shop) -> None:
    text = prose(2600)
    wide.call("encode", **shop.cube("0", text))
    cubes = [shop.cube(str(number), text) for number in range(6)]
    for cube in cubes[1:]:
        shutil.copy(shop.kv("0"), shop.kv(cube["path"]))
    status = wide.call("status")
    with only(wide, cubes[0], shop.kv("0").stat().st_size * 3 // 2):
        for cube in cubes:
            assert wide.call("mount", **cube)["mounted"]["cube"] == cube["path"]
        there = {line["cube"] for line in wide.call("status")["mounted"]}
        assert "5" in there
        assert "0" not in there
        assert status["budget_bytes"] > 6 * shop.kv("0").stat().st_size, "that was not the reason"
        assert how(ask(wide, [cubes[5]], max_tokens=2)) == ["kv"]
    wide.call("unmount")
