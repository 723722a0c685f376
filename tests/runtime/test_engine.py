"""One forward over several sequences, or over rows out of their order, computes what alone does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident

from .conftest import prose, run_all

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@pytest.fixture(params=["tiny_model_dir", "tiny_qwen_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["float32", "bfloat16"])
def resident(
    request: pytest.FixtureRequest, directory: Path, load_model: Callable[..., Resident]
) -> Resident:
    return load_model(directory, request.param)


def prefilled(resident: Resident, ids: list[int]) -> KVCache:
    cache = resident.engine.new_cache(len(ids) + 64)
    run_all(resident.engine.prefill(cache, ids))
    return cache


def near(one: torch.Tensor, other: torch.Tensor, resident: Resident) -> bool:
    tolerance = TOLERANCE[resident.fingerprint["dtype"]]
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


def test_several_sequences_in_one_forward(resident: Resident) -> None:
    assert resident.packs
    texts = [resident.prompt.memory(prose(words, words)) for words in (3, 90, 400)]
    tails = [[5], [9, 11, 300, 7], [8]]
    alone = []
    for ids, tail in zip(texts, tails, strict=True):
        cache = prefilled(resident, ids)
        alone.append((resident.engine.forward(cache, tail), cache))
    caches = [prefilled(resident, ids) for ids in texts]
    found = resident.engine.together(caches, tails)
    for row, cache, (logits, reference) in zip(found, caches, alone, strict=True):
        assert logits is not None
        assert near(row, logits, resident)
        assert cache.length == reference.length
        for mine, theirs in zip(cache.layers, reference.layers, strict=True):
            assert near(mine[:, :, : cache.length], theirs[:, :, : cache.length], resident)


def test_rows_computed_again_in_place(resident: Resident) -> None:
    ids = resident.prompt.memory(prose(120))
    reference = prefilled(resident, ids)
    cache = prefilled(resident, ids)
    again = [2, 3, 40, 41, 42, len(ids) - 1]
    for layer in cache.layers:
        layer[:, :, again] = 0.5
    resident.engine.recompute(cache, [ids[i] for i in again], again)
    assert cache.length == reference.length
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert near(mine[:, :, : cache.length], theirs[:, :, : cache.length], resident)


def test_rows_computed_again_see_what_is_before_them_alone(resident: Resident) -> None:
    ids = resident.prompt.memory(prose(120))
    reference, cache = prefilled(resident, ids), prefilled(resident, ids)
    for layer in cache.layers:
        layer[:, :, 60:] = 100.0
    resident.engine.recompute(cache, ids[50:60], range(50, 60))
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert near(mine[:, :, :60], theirs[:, :, :60], resident)
