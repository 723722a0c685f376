"""A cube on a mount and the same files on the disk, to do to both what one does at a desk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from memfs.index.rebuild import MODEL, open_or_empty
from memfs.vault.store import Store

from . import kvmaker
from .conftest import Mount, memfs, mounted_at, until

TEXT = "First line.\nSecond line, with ünïcödé.\n"
OTHER = TEXT.replace("First", "Changed")

SOON = 60.0
"""Seconds for what is to come to an end by itself."""


class Pair(NamedTuple):
    """A cube on the mount, and its twin: a directory on the disk with the same files."""

    cube: Path
    native: Path

    @property
    def name(self) -> str:
        return self.cube.name


class Desk:
    """A mount and a native directory beside it."""

    def __init__(self, root: Path, mount: Mount) -> None:
        self.root = root
        self.mount = mount
        (root / "native").mkdir()
        self.made: dict[str, dict[str, Any]] = {}
        """The descriptive part of each cube's header, as it should be."""

    def pair(self, name: str) -> Pair:
        """A new cube with a KV cache that is ready, and its twin."""
        cube, native = self.mount.cube(name, TEXT), self.root / "native" / name
        meta = self.mount.meta(name)
        meta["descriptive"]["tags"] = ["edited"]  # memfs's own first header may be made anew
        (cube / "meta.json").write_text(json.dumps(meta))
        native.mkdir()
        (cube / "kv.safetensors").write_bytes(kvmaker.kv_file(TEXT.encode()))
        for file in ("payload.md", "meta.json", "kv.safetensors"):
            (native / file).write_bytes((self.mount.store / name / file).read_bytes())
        self.made[name] = self.mount.meta(name)["descriptive"]
        self.require(name, TEXT, "ready")
        return Pair(cube, native)

    def both(self, action: Callable[[Path], None], pair: Pair) -> None:
        """Does the same in both directories, at once; what it leaves there is the same."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(action, pair))
        self.require_alike(pair)

    def require_alike(self, pair: Pair) -> None:
        """The directories look the same, soon: an editor says that it has saved, then tidies."""
        deadline = time.monotonic() + SOON
        found, wanted = look(pair.cube), look(pair.native)
        while found != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
            found, wanted = look(pair.cube), look(pair.native)
        assert found == wanted
        store = self.mount.store / pair.name
        until(lambda: not any(name.startswith(".memfs") for name in os.listdir(store)))

    def require(self, name: str, text: str, kv: str) -> None:
        """The cube has this text, the KV cache is in this state, and all else is as it was."""
        payload = self.mount.dir / name / "payload.md"
        with contextlib.suppress(AssertionError):
            until(lambda: _reads(payload, text), SOON)
        assert payload.read_text() == text
        assert (self.mount.store / name / "payload.md").read_text() == text
        meta = self.mount.meta(name)
        assert meta["state"]["kv"]["state"] == kv
        assert meta["descriptive"] == self.made[name]
        identity = os.getxattr(self.mount.dir / name, "user.memfs.id").decode()
        assert identity == self.made[name]["id"]
        assert self.mount.status()["index"]["cubes"] == len(self.made)

    def require_refused(self, name: str, rejected: str) -> None:
        """A header was refused: the old one stands, the text is kept, and both are told of."""
        self.require(name, TEXT, "ready")
        assert (self.mount.dir / name / "meta.json.rejected").read_text() == rejected
        refusal = self.mount.status()["refusals"][-1]
        assert (refusal["path"], refusal["kind"]) == (name, "meta")
        assert "meta.json is not valid" in refusal["reason"]
        assert "meta.json.rejected" in refusal["reason"]
        control = self.mount.dir / ".memfs"
        assert f"{name}: {refusal['reason']}" in (control / "status").read_text()
        events = map(json.loads, (control / "events").read_text().splitlines())
        event = [event for event in events if event["event"] == "refused"][-1]
        assert (event["path"], event["reason"]) == (name, refusal["reason"])


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except FileNotFoundError:
        return False  # an editor has renamed it away, and is about to write another


def look(directory: Path) -> dict[str, tuple[object, ...]]:
    """What ``ls -la`` shows, with the sizes of texts only; of what memfs adds, nothing."""
    found: dict[str, tuple[object, ...]] = {}
    for name in os.listdir(directory):
        if name == "meta.json.rejected":
            continue
        try:
            status = (directory / name).lstat()
        except FileNotFoundError:
            continue  # an editor is tidying
        size = status.st_size if name.startswith("payload.md") else None
        owner = (status.st_uid, status.st_gid, status.st_nlink)
        found[name] = (stat.filemode(status.st_mode), *owner, size)
    return found


@contextlib.contextmanager
def open_desk() -> Iterator[Desk]:
    """A desk for the tests of a module; in the end the cubes, and they alone, are in the index.

    It is not in /tmp, where emacs makes no backups.
    """
    root = Path(tempfile.mkdtemp(prefix="memfs-", dir="/var/tmp"))
    root.chmod(0o755)
    try:
        (root / "store").mkdir()
        with Store.open(root / "store") as store:
            index, _ = open_or_empty(store)
            index.set_info(MODEL, kvmaker.MODEL)  # so that a KV cache can be ready
            index.close()
        with mounted_at(root) as mount:
            until(mount.has_index)
            desk = Desk(root, mount)
            yield desk
            found = json.loads(memfs("index", "find", "--json", mount.dir).stdout)
            assert sorted(cube["path"] for cube in found) == sorted(desk.made)
            memfs("index", "check", mount.dir)
    finally:
        shutil.rmtree(root)
