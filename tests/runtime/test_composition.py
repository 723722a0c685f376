"""Several cubes in one cache: rotation is what the model would have computed, or it is not used.

What is computed again is what a prefill of all of them makes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memfs.errors import InvalidConfig
from memfs.runtime.asking.composition import place, refine
from memfs.runtime.asking.joint import joint
from memfs.runtime.asking.policy import Policy
from memfs.runtime.client import RuntimeClient
from memfs.runtime.kv.encoding import Encoded, prefill
from memfs.runtime.model.kv_cache import KVCache, Slot, for_model
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.rotary import rotated

from .conftest import Shop, ask, how, prose, run_all


@pytest.fixture(params=["tiny_model_dir", "tiny_qwen_dir"])
def resident(request: pytest.FixtureRequest, load_model: Callable[[Path], Resident]) -> Resident:
    return load_model(request.getfixturevalue(request.param))


def memory(resident: Resident, seed: int) -> KVCache:
    return run_all(prefill(resident, prose(40, seed), None)).cache


def encoded(resident: Resident, count: int, words: int = 40) -> list[Encoded]:
    return [run_all(prefill(resident, prose(words, seed), None)) for seed in range(count)]


def placed(resident: Resident, memories: list[Encoded]) -> KVCache:
    """[preamble | each memory], keys rotated."""
    rows = sum(len(memory.ids) for memory in memories)
    cache = resident.engine.new_cache(resident.base + rows)
    cache.append(resident.preamble)
    assert resident.inv_freq is not None
    for memory in memories:
        place(cache, memory.cache, resident.base, resident.inv_freq)
    return cache


def whole(resident: Resident, memories: list[Encoded]) -> KVCache:
    """The same, prefilled one behind the other."""
    ids = [memory.ids for memory in memories]
    return run_all(joint(resident, ids, resident.base + sum(map(len, ids))))


def same_rows(one: KVCache, other: KVCache) -> list[bool]:
    """Which rows are the same, but for rounding, in all layers."""
    near = torch.ones(one.length, dtype=torch.bool)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        a, b = mine[:, :, : one.length], theirs[:, :, : one.length]
        near &= ((a - b).norm(dim=-1) <= 1e-3 * b.norm(dim=-1)).all(1).all(0)
    return near.tolist()


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


@pytest.mark.parametrize("text", ["rotate", "link:16", "blend:0.1", "blend:1"])
def test_a_policy_is_written_as_it_is_read(text: str) -> None:
    assert str(Policy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "rotate:1", "link", "link:0", "link:-4", "blend:2", "exact"])
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfig, match="rotate, link:ROWS"):
        Policy.parse(text)


def test_rows_all_computed_again_are_those_of_a_prefill(resident: Resident) -> None:
    memories = encoded(resident, 3, words=150)  # more rows than a chunk
    cache = placed(resident, memories)
    expected = whole(resident, memories)
    assert not all(same_rows(cache, expected))
    count = run_all(refine(resident, cache, [m.ids for m in memories], Policy(blend=1)))
    assert count == sum(len(memory.ids) for memory in memories[1:])
    assert all(same_rows(cache, expected))


def test_link_rows_are_those_of_a_prefill_and_others_stay(resident: Resident) -> None:
    memories = encoded(resident, 2)
    before, cache = placed(resident, memories), placed(resident, memories)
    expected = whole(resident, memories)
    assert run_all(refine(resident, cache, [m.ids for m in memories], Policy(link=8))) == 8
    start = resident.base + len(memories[0].ids)
    assert all(same_rows(cache, expected)[: start + 8]), "all that they see is exact"
    for mine, was in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(mine[:, :, :start], was[:, :, :start]), "the first cube is untouched"
        assert torch.equal(mine[:, :, start + 8 :], was[:, :, start + 8 :])


def test_link_rows_are_no_more_than_a_cube_has(resident: Resident) -> None:
    memories = encoded(resident, 3)
    cache = placed(resident, memories)
    count = run_all(refine(resident, cache, [m.ids for m in memories], Policy(link=10_000)))
    assert count == sum(len(memory.ids) for memory in memories[1:])
    assert all(same_rows(cache, whole(resident, memories)))


def test_the_rows_that_differ_most_are_computed_again(resident: Resident) -> None:
    memories = encoded(resident, 2, words=150)
    before, cache = placed(resident, memories), placed(resident, memories)
    expected = whole(resident, memories)
    start = resident.base + len(memories[0].ids)
    # In the layer behind the first a row differs as far as the first layer's attention did.
    moved = (expected.layers[1][1] - before.layers[1][1])[:, start : cache.length]
    count = round(0.1 * len(memories[1].ids))
    most = set((start + moved.square().sum((0, 2)).topk(count).indices).tolist())
    assert run_all(refine(resident, cache, [m.ids for m in memories], Policy(blend=0.1))) == count
    last, was = cache.layers[-1][1], before.layers[-1][1]
    changed = (last[:, : cache.length] != was[:, : cache.length]).any(-1).any(0)
    assert set(changed.nonzero().flatten().tolist()) == most


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
