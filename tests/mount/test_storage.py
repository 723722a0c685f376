"""How a cube's KV cache is stored: chosen in its header or by ``memfs encode``, and shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfs.runtime.client import RuntimeClient

from .conftest import Mount, memfs, mounted_at, until

PREFILL_CHUNK = 256
"""As in memfs.runtime.model.engine, which takes torch to import."""
TEXT = "The keeper of the light wrote down what the ships had passed, and when. " * 30


@pytest.fixture
def linked(tmp_path: Path, environment: dict[str, str], ready: RuntimeClient) -> Iterator[Mount]:
    """A mount that knows of the loaded model, with nothing in that."""
    ready.call("unmount")
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        until(lambda: mount.status()["runtime"] == "ready")
        yield mount


def edit(cube: Path, storage: str) -> None:
    """As an editor does it."""
    meta = json.loads((cube / "meta.json").read_text())
    meta["state"]["storage"] = storage
    (cube / "meta.json").write_text(json.dumps(meta))


def shown(mount: Mount, name: str = "law") -> tuple[str, str, str | None]:
    """What the header says: as it is to be stored, the state of what is there, as that is."""
    state = mount.meta(name)["state"]
    return state["storage"], state["kv"]["state"], state["kv"]["storage"]


def encoded(mount: Mount, *args: str | Path) -> dict[str, Any]:
    [made] = json.loads(memfs("encode", "--json", *args, **mount.env).stdout)
    return made


def test_the_command_chooses_it_for_now_and_later(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    assert shown(linked) == ("exact", "none", None)
    exact = encoded(linked, cube)
    until(lambda: shown(linked) == ("exact", "ready", "exact"))

    made = encoded(linked, "--storage", "int8", cube)
    whole_chunks = made["tokens"] // PREFILL_CHUNK * PREFILL_CHUNK
    assert (made["made"], made["storage"], made["kept_tokens"]) == (True, "int8", whole_chunks)
    assert made["bytes"] < exact["bytes"] / 2
    until(lambda: shown(linked) == ("int8", "ready", "int8"))
    assert not encoded(linked, "--storage", "int8", cube)["made"]
    assert "there already" in memfs("encode", cube, **linked.env).stdout

    (cube / "payload.md").write_text(TEXT + "More.")
    made = encoded(linked, cube)
    assert (made["storage"], made["kept_tokens"]) == ("int8", 0), "never from rounded rows"
    assert encoded(linked, "--storage", "exact", cube)["storage"] == "exact"
    until(lambda: shown(linked) == ("exact", "ready", "exact"))


def test_an_open_makes_what_the_header_says(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    edit(cube, "int8")
    subprocess.run(["cp", cube / "kv.safetensors", "/dev/null"], check=True)
    until(lambda: shown(linked) == ("int8", "ready", "int8"))
    until(lambda: "int8" in (linked.dir / ".memfs/status").read_text())
    line = next(line for line in linked.status()["mounted"] if line["cube"] == "law")
    assert line["storage"] == "int8"
    assert "int8" in memfs("status", linked.dir, **linked.env).stdout

    edit(cube, "exact")
    assert shown(linked) == ("exact", "ready", "int8"), "it fits, and stays until it is made anew"
    (cube / "kv.safetensors").unlink()
    subprocess.run(["cp", cube / "kv.safetensors", "/dev/null"], check=True)
    until(lambda: shown(linked) == ("exact", "ready", "exact"))


def test_a_copy_in_the_mount_is_checked_and_known(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    encoded(linked, "--storage", "int8", cube)
    shutil.copytree(cube, linked.dir / "copy")
    until(lambda: shown(linked, "copy") == ("int8", "ready", "int8"))
    data = bytearray((linked.store / "law/kv.safetensors").read_bytes())
    data[-1] ^= 1
    (linked.dir / "copy/kv.safetensors").write_bytes(data)
    until(lambda: shown(linked, "copy")[1:] == ("corrupt", None))
    assert "checksum" in linked.meta("copy")["state"]["kv"]["reason"]


def test_another_word_is_refused(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    with pytest.raises(OSError, match="Invalid argument"):
        edit(cube, "int4")
    assert shown(linked)[0] == "exact"


def test_a_frozen_cube_keeps_its_own(linked: Mount) -> None:
    cube = linked.cube("law", TEXT)
    meta = linked.meta("law")
    meta["state"]["frozen"] = True
    (cube / "meta.json").write_text(json.dumps(meta))
    done = memfs("encode", "--storage", "int8", cube, check=False, **linked.env)
    assert done.returncode == 8
    assert "frozen" in done.stderr
    assert shown(linked) == ("exact", "none", None)


def test_in_a_store_that_is_not_mounted(tmp_path: Path, linked: Mount) -> None:
    cube = tmp_path / "other/notes"
    cube.mkdir(parents=True)
    (tmp_path / "other/.memfs").mkdir()
    (cube / "payload.md").write_text(TEXT)
    assert encoded(linked, "--storage", "int8", cube)["storage"] == "int8"
    meta = json.loads((cube / "meta.json").read_text())
    assert (meta["state"]["storage"], meta["descriptive"]["title"]) == ("int8", "notes")
    assert os.stat(cube / "meta.json").st_mode == os.stat(cube / "payload.md").st_mode
    encoded(linked, "--storage", "exact", cube)
    again = json.loads((cube / "meta.json").read_text())
    assert again["state"]["storage"] == "exact"
    assert again["descriptive"] == meta["descriptive"]
