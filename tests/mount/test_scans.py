"""Programs that read everything: what is in use stays in the model, nothing is made for them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memfs.config import Config
from memfs.runtime.client import RuntimeClient, connect, stop

from .conftest import Mount, mounted_at, until

TEXT = "The keeper wrote that the wind had turned to the north.\n"
CUBES = 1000
BUDGET = 1 << 20
"""Room for a few of the scanned cubes, and for those in use."""


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> Iterator[Config]:
    """The small model, with so little room that a scan has to evict."""
    model = Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)
    config = replace(model, budget_bytes=BUDGET)
    stop(config)
    yield config
    stop(config)


@pytest.fixture
def scanned(
    tmp_path: Path, environment: dict[str, str], config: Config
) -> Iterator[tuple[Mount, RuntimeClient]]:
    """A thousand cubes, every second with a KV cache; one in use, and one pinned in the model."""
    store = tmp_path / "store"
    with connect(config, start=True) as client:
        client.call("ready", timeout=120)
        for name in ("used", "pinned"):
            (store / name).mkdir(parents=True)
            (store / name / "payload.md").write_text(TEXT)
            client.call("encode", store=str(store), path=name)
        kv = (store / "used/kv.safetensors").read_bytes()
        for number in range(CUBES):
            cube = store / f"many/{number // 100}/{number}"
            cube.mkdir(parents=True)
            (cube / "payload.md").write_text(TEXT)
            if number % 2:
                (cube / "kv.safetensors").write_bytes(kv)
        with mounted_at(tmp_path, **environment) as mount:
            until(lambda: mount.status()["index"]["cubes"] == CUBES + 2, 60)
            until(lambda: mount.status()["runtime"] == "ready")
            for _ in range(2):
                (mount.dir / "used/kv.safetensors").read_bytes()
            client.call("mount", store=str(store), path="pinned", pin=True)
            yield mount, client


def test_a_scan_changes_nothing_that_is_in_use(
    scanned: tuple[Mount, RuntimeClient], tmp_path: Path
) -> None:
    mount, client = scanned
    scans = {
        "grep": ["grep", "-r", "no such words", mount.dir],
        "rsync": ["rsync", "-a", f"{mount.dir}/", tmp_path / "copy"],
        "tar": ["sh", "-c", f"tar c -C {mount.dir} . | cat > {tmp_path}/backup.tar"],
    }
    for name, command in scans.items():
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, check=False, timeout=100
        )
        assert (done.returncode, done.stderr) == (1 if name == "grep" else 0, ""), name
        mounted = {line["cube"]: line for line in client.call("status")["mounted"]}
        assert {"used", "pinned"} <= mounted.keys(), name
        assert 2 < len(mounted) < CUBES / 4, "some were read into the model, and left it again"
        events = map(json.loads, (mount.dir / ".memfs/events").read_text().splitlines())
        assert "encoded" not in {event["event"] for event in events}, name
    copied = sum(1 for _ in (tmp_path / "copy/many").rglob("kv.safetensors"))
    assert copied == CUBES // 2, "those that were there, and none was made"
