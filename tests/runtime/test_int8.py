"""KV caches in int8: near to what the model made, the cube's choice, never rounded twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memfs.cube import metadata
from memfs.cube.kvfile import KEY_GROUP, read_header
from memfs.errors import MemfsError
from memfs.runtime.client import RuntimeClient
from memfs.runtime.kv import kv_store
from memfs.runtime.kv.encoding import prefill
from memfs.runtime.kv.int8 import Packed, pack, unpack
from memfs.runtime.model.resident import Resident

from .conftest import Shop, ask, how, prose, run_all

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float32).max


def tiled(entries: list[float], tokens: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of two heads, of these entries as far as the dtype has them."""
    shape = (2, 2, tokens, 6)
    places = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(entries), shape, generator=places)
    limits = torch.finfo(dtype)
    return torch.tensor(entries)[chosen].clamp(limits.min, limits.max).to(dtype)


def steps(packed: Packed, rows: torch.Tensor) -> torch.Tensor:
    """The scale of each entry."""
    keys = packed.key_scales.repeat_interleave(KEY_GROUP, 1)[:, : rows.shape[2]]
    return torch.stack([keys, packed.value_scales[..., None].expand(rows.shape[1:])])


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30
    ),
    tokens=st.sampled_from((1, 2, KEY_GROUP - 1, KEY_GROUP, KEY_GROUP + 1, 2 * KEY_GROUP + 3)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@example([LARGEST, -LARGEST], KEY_GROUP, torch.float32, 0)
@example([LARGEST, -LARGEST], KEY_GROUP, torch.bfloat16, 0)
@example([LARGEST, -LARGEST], KEY_GROUP, torch.float16, 0)
@example([0.0, -0.0], 3, torch.float32, 0)
@example([1e-45, -1e-45, 0.0], 70, torch.float32, 0)
def test_every_entry_comes_back_within_half_a_step(
    entries: list[float], tokens: int, dtype: torch.dtype, seed: int
) -> None:
    rows = tiled(entries, tokens, dtype, seed)
    packed = pack(rows)
    found = torch.full_like(rows, torch.nan)
    unpack(packed, found, torch.empty(tokens, rows.shape[3]))

    assert bool(found.isfinite().all())
    step, exact = steps(packed, rows).double(), rows.double()
    # And what the dtype itself rounds: float32 once more in the division and the product.
    rounding = exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert bool(((found.double() - exact).abs() <= step * (0.5 + 1e-4) + rounding).all())
    again = pack(rows)
    assert torch.equal(again.integers, packed.integers)
    assert torch.equal(again.key_scales, packed.key_scales)
    assert torch.equal(again.value_scales, packed.value_scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_not_stored(bad: float) -> None:
    rows = torch.ones(2, 2, 5, 4)
    rows[1, 0, 3, 2] = bad
    with pytest.raises(MemfsError, match="not finite"):
        pack(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("words", [20, 300])
def test_through_a_file(
    tiny_qwen_dir: Path, load_model: Callable[..., Resident], tmp_path: Path, dtype: str, words: int
) -> None:
    resident = load_model(tiny_qwen_dir, dtype)
    made = run_all(prefill(resident, prose(words), None))
    contents = set()
    for name in "ab":
        with open(tmp_path / name, "w+b") as file:
            kv_store.write(file.fileno(), made.cache, resident, made.ids, "0" * 64, "int8")
            cache, ids = kv_store.read(file.fileno(), resident, "0" * 64)
            contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1
    assert ids == made.ids
    assert cache.length == made.cache.length
    rows = slice(resident.base, cache.length)
    for stored, exact in zip(cache.layers, made.cache.layers, strict=True):
        assert torch.equal(stored[:, :, : resident.base], exact[:, :, : resident.base])
        expected = torch.empty_like(exact[:, :, rows])
        packed = pack(exact[:, :, rows].contiguous())
        unpack(packed, expected, torch.empty(len(ids), resident.shape.head_dim))
        assert torch.equal(stored[:, :, rows], expected)


# Through the daemon: the header chooses.


def choose(shop: Shop, path: str, storage: str) -> None:
    meta = metadata.new()
    meta["state"]["storage"] = storage
    (shop.root / path / "meta.json").write_bytes(metadata.render(meta))


def stored(shop: Shop, path: str) -> str:
    fd = os.open(shop.kv(path), os.O_RDONLY)
    try:
        return read_header(fd).storage
    finally:
        os.close(fd)


def test_the_header_chooses_and_the_next_encode_follows(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(300))
    assert runtime.call("encode", **cube)["storage"] == stored(shop, "a") == "exact"
    exact = shop.digest("a")
    choose(shop, "a", "int8")
    report = ask(runtime, [cube])
    assert (how(report), report["cubes"][0]["storage"]) == (["kv"], "exact"), "it fits as it is"
    made = runtime.call("encode", **cube)
    assert made["made"]
    assert made["storage"] == stored(shop, "a") == "int8"
    int8 = shop.digest("a")
    assert not runtime.call("encode", **cube)["made"]
    report = ask(runtime, [cube])
    assert (how(report), report["cubes"][0]["storage"]) == (["kv"], "int8")
    [line] = [m for m in runtime.call("status")["mounted"] if m["cube"] == "a"]
    assert line["storage"] == "int8"

    choose(shop, "a", "exact")
    assert runtime.call("encode", **cube)["kept_tokens"] == 0
    assert shop.digest("a") == exact
    shop.kv("a").unlink()
    choose(shop, "a", "int8")
    runtime.call("encode", **cube)
    assert shop.digest("a") == int8, "it is the same file, made from the exact one or from nothing"


def test_an_edit_of_an_int8_cube_is_never_rounded_twice(runtime: RuntimeClient, shop: Shop) -> None:
    text = prose(600)
    cube, fresh = shop.cube("a", text), shop.cube("b", text + " and more")
    for path in "ab":
        choose(shop, path, "int8")
    runtime.call("encode", **cube)
    shop.cube("a", text + " and more")
    assert runtime.call("encode", **cube)["kept_tokens"] == 0
    runtime.call("encode", **fresh)
    assert shop.digest("a") == shop.digest("b")


def test_it_is_half_as_large_as_half_precision(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(800))
    exact = runtime.call("encode", **cube)["bytes"]
    choose(shop, "a", "int8")
    assert runtime.call("encode", **cube)["bytes"] < 0.33 * exact  # of float32, 16 to a head


def test_several_cubes_stored_in_both_ways(runtime: RuntimeClient, shop: Shop) -> None:
    cubes = [shop.cube("a", prose(60, 1)), shop.cube("b", prose(70, 2))]
    choose(shop, "b", "int8")
    for cube in cubes:
        runtime.call("encode", **cube)
    report = ask(runtime, cubes)
    assert how(report) == ["kv", "kv"]
    assert [cube["storage"] for cube in report["cubes"]] == ["exact", "int8"]
    assert ask(runtime, cubes)["answer"] == report["answer"]
    as_text = ask(runtime, cubes, kv=False)
    assert [cube["storage"] for cube in as_text["cubes"]] == [None, None]


def test_a_copy_in_another_store_is_as_it_was(
    runtime: RuntimeClient, shop: Shop, tmp_path: Path
) -> None:
    cube = shop.cube("a", prose(90))
    choose(shop, "a", "int8")
    runtime.call("encode", **cube)
    (tmp_path / "other").mkdir()
    other = Shop(tmp_path / "other")
    copied = other.cube("c", prose(90))
    other.kv("c").write_bytes(shop.kv("a").read_bytes())
    report = ask(runtime, [copied])
    assert (how(report), report["cubes"][0]["storage"]) == (["kv"], "int8")
    assert report["answer"] == ask(runtime, [cube])["answer"]


def test_a_header_that_says_something_else_is_not_followed(
    runtime: RuntimeClient, shop: Shop
) -> None:
    cube = shop.cube("a", prose(30))
    (shop.root / "a/meta.json").write_text(json.dumps({"state": {"storage": "int8"}}))
    assert runtime.call("encode", **cube)["storage"] == "exact", "it breaks the schema"
