"""Several cubes in one cache: rotation is what the model would have computed, or it is not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memfs.runtime.asking.composition import place, rotated
from memfs.runtime.client import RuntimeClient
from memfs.runtime.kv.encoding import prefill
from memfs.runtime.model.kv_cache import KVCache, Slot, for_model
from memfs.runtime.model.resident import Resident

from .conftest import Shop, ask, how, prose, run_all


@pytest.fixture(params=["tiny_model_dir", "tiny_qwen_dir"])
def resident(request: pytest.FixtureRequest, load_model: Callable[[Path], Resident]) -> Resident:
    return load_model(request.getfixturevalue(request.param))


def memory(resident: Resident, seed: int) -> KVCache:
    return run_all(prefill(resident, prose(40, seed), None)).cache


def test_both_architectures_can_be_placed(resident: Resident) -> None:
    assert resident.unplaceable is None


@pytest.mark.parametrize("distance", [1, 17, 1000, 7000])
def test_a_rotated_key_is_the_key_made_there(resident: Resident, distance: int) -> None:
    def key_at(position: int) -> torch.Tensor:
        cache = resident.engine.new_cache(1)
        with torch.inference_mode():
            resident.engine.model.base_model(
                input_ids=torch.tensor([[42]]),
                position_ids=torch.tensor([[position]]),
                past_key_values=for_model([Slot(cache, 1)]),
                use_cache=True,
            )
        return cache.layers[0][0]

    assert resident.inv_freq is not None
    moved = rotated(key_at(5), distance, resident.inv_freq)
    # transformers takes the angle of position 7,005 in float32, which is what is left of the error
    assert torch.allclose(moved, key_at(5 + distance), atol=2e-3)


def test_rotation_there_and_back_is_the_same(resident: Resident) -> None:
    assert resident.inv_freq is not None
    keys = torch.randn(3, 50, resident.shape.head_dim)
    back = rotated(rotated(keys, 4000, resident.inv_freq), -4000, resident.inv_freq)
    assert torch.allclose(back, keys, atol=1e-5)


def test_the_first_cube_stays_and_values_stay(resident: Resident) -> None:
    first, second = memory(resident, 1), memory(resident, 2)
    before = [layer.clone() for layer in second.layers]
    base = resident.base
    cache = resident.engine.new_cache(first.length + second.length)
    cache.append(resident.preamble)
    assert resident.inv_freq is not None
    place(cache, first, base, resident.inv_freq)
    place(cache, second, base, resident.inv_freq)
    for layer, one, two in zip(cache.layers, first.layers, second.layers, strict=True):
        assert torch.equal(layer[:, :, : first.length], one[:, :, : first.length])
        rest = slice(first.length, cache.length)
        assert torch.equal(layer[1, :, rest], two[1, :, base : second.length])
        assert not torch.equal(layer[0, :, rest], two[0, :, base : second.length])
    rows = slice(0, second.length)
    for was, layer in zip(before, second.layers, strict=True):
        assert torch.equal(was[:, :, rows], layer[:, :, rows])


# Through the daemon.


def test_two_cubes_are_answered_from_both(runtime: RuntimeClient, shop: Shop) -> None:
    cubes = [shop.cube("a", prose(60, 1)), shop.cube("b", prose(60, 2))]
    for cube in cubes:
        runtime.call("encode", **cube)
    first = ask(runtime, cubes)
    assert how(first) == ["kv", "kv"]
    assert first["cached_tokens"] > sum(cube["tokens"] for cube in first["cubes"])
    assert ask(runtime, cubes)["answer"] == first["answer"], "as they were placed before"
    assert [c["path"] for c in ask(runtime, cubes[::-1])["cubes"]] == ["b", "a"]


def test_a_cube_without_kv_is_read_between_those_with(runtime: RuntimeClient, shop: Shop) -> None:
    cubes = [shop.cube(name, prose(60, seed)) for seed, name in enumerate("abc")]
    runtime.call("encode", **cubes[0])
    runtime.call("encode", **cubes[2])
    report = ask(runtime, cubes)
    assert how(report) == ["kv", "text", "kv"]
    assert report["cubes"][1]["why"] == "it has no kv.safetensors"
