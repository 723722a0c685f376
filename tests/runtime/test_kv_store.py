"""A KV cache's file: where its blocks lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memfs.cube.kvfile import ALIGNMENT, TOKEN_IDS, read_header
from memfs.runtime.kv import kv_store

if TYPE_CHECKING:
    from memfs.runtime.model.resident import Resident


@pytest.mark.parametrize("tokens", [1, 7, 64, 257])
def test_layers_begin_at_whole_cache_lines(
    load_model: Callable[..., Resident], tiny_model_dir: Path, tmp_path: Path, tokens: int
) -> None:
    resident = load_model(tiny_model_dir)
    cache = resident.engine.new_cache(resident.base + tokens)
    cache.append(resident.preamble)
    for layer in cache.layers:
        layer[:, :, cache.length :] = 1.0
    cache.length = cache.capacity
    with (tmp_path / "kv").open("w+b") as file:
        kv_store.write(file.fileno(), cache, resident, [7] * tokens, "0" * 64)
        file.seek(0)
        header = read_header(file.fileno())
    offsets = {name: tensor.offset for name, tensor in header.tensors.items()}
    assert header.tokens == tokens
    assert offsets.pop(TOKEN_IDS) > max(offsets.values())
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
