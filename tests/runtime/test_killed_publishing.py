"""A runtime that is killed while it publishes a KV cache leaves the old file or the new one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memfs.cube import layout
from memfs.runtime.cubes import Cube
from memfs.runtime.kv import cube_kv
from memfs.runtime.kv.encoding import Encoded, prefill
from memfs.runtime.model.resident import Resident
from memfs.vault.store import Store

from .conftest import Shop, prose, run_all

KILLS = 40
STORAGES = ("exact", "int8")


def publish_for_ever(root: Path, resident: Resident, encoded: Encoded) -> None:
    """In a process of its own: one storage after the other takes the other's place."""
    with Store.open(root) as store:
        cube = Cube(store, "a")
        with cube.open(None) as files:
            text = files.text()
        while True:
            for storage in STORAGES:
                cube_kv.publish(cube, resident, encoded, text, storage)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_kill_leaves_a_whole_file(
    shop: Shop, tiny_model_dir: Path, load_model: Callable[..., Resident]
) -> None:
    resident = load_model(tiny_model_dir)
    encoded = run_all(prefill(resident, prose(400), None))
    shop.cube("a", prose(400))
    whole = set()
    with Store.open(shop.root) as store:
        cube = Cube(store, "a")
        with cube.open(None) as files:
            text = files.text()
        for storage in STORAGES:
            cube_kv.publish(cube, resident, encoded, text, storage)
            whole.add(shop.digest("a"))
    assert len(whole) == 2

    chance = random.Random(4)
    seen = set()
    for _ in range(KILLS):
        pid = os.fork()
        if pid == 0:
            try:
                publish_for_ever(shop.root, resident, encoded)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.005, 0.08))
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it was at it"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = shop.digest("a")
        assert found in whole
        seen.add(found)
    assert seen == whole, "both were there at a kill"
    names = {path.name for path in (shop.root / "a").iterdir()} - {layout.PAYLOAD, layout.KV}
    assert names, "some were killed in the middle"
    assert all(name.startswith(layout.TEMPORARY) for name in names), "the next mount clears them"
