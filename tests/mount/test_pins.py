"""``memfs pin`` through a mount and beside one; what is pinned is in the model from its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memfs.config import Config
from memfs.runtime.client import RuntimeClient, connect, stop

from .conftest import Mount, memfs, mounted_at, until


def pinned(mount: Mount, name: str) -> bool:
    return bool(mount.meta(name)["state"]["pinned"])


def in_model(client: RuntimeClient, mount: Mount) -> dict[str, dict[str, Any]]:
    lines = client.call("status")["mounted"]
    return {line["cube"]: line for line in lines if line["store"] == str(mount.store)}


def test_a_pin_is_in_the_header_with_no_model_running(mount: Mount) -> None:
    mount.cube("law")
    said = json.loads(memfs("pin", "--json", mount.dir / "law", **mount.env).stdout)
    assert said == [{"cube": "law", "pinned": True, "in_model": None}]
    assert pinned(mount, "law")
    memfs("pin", "--off", mount.dir / "law", **mount.env)
    assert not pinned(mount, "law")


def test_a_pin_in_a_store_without_a_mount(tmp_path: Path) -> None:
    with mounted_at(tmp_path) as mount:
        mount.cube("law")
    path = mount.store / "law" / "meta.json"
    before = json.loads(path.read_text())
    path.chmod(0o640)
    memfs("pin", mount.store / "law", **mount.env)
    after = json.loads(path.read_text())
    assert after["state"].pop("pinned") is True and before["state"].pop("pinned") is False
    assert after == before, "nothing else of it changed"
    assert path.stat().st_mode & 0o777 == (mount.store / "law/payload.md").stat().st_mode & 0o777
    frozen = json.loads(path.read_text())
    frozen["state"]["frozen"] = True
    path.write_text(json.dumps(frozen))
    assert memfs("pin", "--off", mount.store / "law", check=False, **mount.env).returncode != 0
    assert json.loads(path.read_text())["state"]["pinned"]


def test_what_is_pinned_is_in_the_model_from_its_start(
    tmp_path: Path, environment: dict[str, str], config: Config, ready: RuntimeClient
) -> None:
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        mount.cube("law", "the keeper of the light wrote down what ships had passed\n")
        line = memfs("pin", mount.dir / "law", **environment).stdout
        assert line.startswith("law: pinned, "), "made from its text first"
        assert in_model(ready, mount)["law"]["pinned"]
        assert pinned(mount, "law")
        ready.close()
        stop(config)
        with connect(config, start=True) as again:
            again.call("ready", timeout=120)
            line = until(lambda: in_model(again, mount).get("law"))
            assert line["pinned"] and line["sessions"] == []
            memfs("pin", "--off", mount.dir / "law", **environment)
            assert not in_model(again, mount)["law"]["pinned"]


def test_a_frozen_cube_is_not_pinned_anywhere(
    tmp_path: Path, environment: dict[str, str], ready: RuntimeClient
) -> None:
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        mount.cube("law", "the keeper of the light\n")
        memfs("encode", mount.dir / "law", **environment)
        meta = json.loads((mount.dir / "law/meta.json").read_text())
        meta["state"]["frozen"] = True
        (mount.dir / "law/meta.json").write_text(json.dumps(meta))
        assert memfs("pin", mount.dir / "law", check=False, **environment).returncode != 0
        assert not pinned(mount, "law")
        assert not in_model(ready, mount)["law"]["pinned"], "the model was told that it is not"
