"""100,000 cubes are indexed, and looked up in well under a millisecond each."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from memfs.cube.fingerprint import MODEL_FIELDS
from memfs.index.lmdb_index import Index
from memfs.vault.facts import CubeFacts
from memfs.vault.sig import Sig

CUBES = 100_000
MODEL = dict.fromkeys(MODEL_FIELDS, "0123456789abcdef" * 4)


def path_of(number: int) -> str:
    return f"work/collection-{number % 100}/cube-{number}"


def facts_of(number: int) -> CubeFacts:
    sig = Sig(number, 1, 2, 3)
    return CubeFacts(
        id=str(uuid.UUID(int=number)),
        title=f"Cube {number}",
        tags=("all", f"tag-{number % 50}"),
        payload_state="ready",
        payload_sha256=f"{number:064x}",
        payload_sig=sig,
        kv_state="stale" if number % 1000 == 0 else "ready",
        kv_sig=sig,
        kv_model=MODEL,
        meta_sig=sig,
        changed=1e9 + number,
    )


def median_seconds(call: Callable[[int], object]) -> float:
    taken = []
    for number in random.Random(0).sample(range(CUBES), 500):
        began = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def test_a_hundred_thousand_cubes(tmp_path: Path) -> None:
    with Index.open(tmp_path / "index") as index:
        assert index.put_many((path_of(n), facts_of(n)) for n in range(CUBES)) == CUBES
        assert len(index) == CUBES
        assert index.get(path_of(77_777)) == facts_of(77_777)
        assert median_seconds(lambda n: index.get(path_of(n))) < 0.0005
        assert median_seconds(lambda n: index.by_id(str(uuid.UUID(int=n)))) < 0.0005
        assert median_seconds(lambda n: index.count(str(uuid.UUID(int=n)), reads=1)) < 0.001
        assert median_seconds(lambda n: index.put(path_of(n), facts_of(n + CUBES))) < 0.002
        assert sum(1 for _ in index.find(kv_state="stale", tag="tag-0")) >= 99
        assert sum(1 for _ in index.under("work/collection-7")) == CUBES // 100
