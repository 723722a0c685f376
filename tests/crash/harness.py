"""Kills the mount, the runtime, or both, under a writing load, and looks at what is left.

A round: the load writes for a moment, something is killed with SIGKILL, the store is mounted again
by the command that anybody would use, every file is compared with what was promised of it, and
``memfs fsck`` is asked: before the new mount or after a clean end (what it finds it must mend, and
then find nothing), or of the mounted store, where it must find nothing. Used by the tests here and
by ``tools/crash``.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memfs.config import Config
from memfs.cube import kvfile, metadata
from memfs.filesystem import registry
from memfs.filesystem.mount import log_path
from memfs.runtime.client import RuntimeClient, connect
from memfs.runtime.protocol import socket_path

from .expected import Change, Content, Expected
from .load import ROLES

MEMFS = [sys.executable, "-m", "memfs.cli.main"]
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0
KILLS = {
    "mount": ("mount",),
    "runtime": ("runtime",),
    "both": ("mount", "mount", "mount", "mount", "runtime", "both"),  # a runtime starts slowly
}


class Violation(AssertionError):
    """Something was promised and not kept."""


class Load:
    """One process of the load."""

    def __init__(self, role: str, directory: Path, seed: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.load", role, directory, str(seed)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self) -> None:
        """Starts it, or stops it."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it did since it was started, once it is down."""
        assert self._process.stdout
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "down":
                return
            yield event
        raise Violation(f"the load ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends it, whatever it is at."""
        self._process.kill()
        self._process.communicate()


class Campaign:
    """A store, its mount and its load, killed over and over."""

    def __init__(self, root: Path, config: Config, *, what: str, seed: int) -> None:
        self.tally: collections.Counter[str] = collections.Counter()
        """What was killed, and what fsck had to mend, how often."""
        self._store, self._mountpoint = root / "store", root / "mem"
        self._config = config
        self._what = what
        self._random = random.Random(seed)
        self._env = os.environ | {
            "MEMFS_MODEL": config.model,
            "MEMFS_DEVICE": config.device,
            "MEMFS_DTYPE": config.dtype,
            "MEMFS_AUTOSTART": "off" if what == "mount" else "on",
        }
        self._expected = Expected()
        self._killed_at = math.inf
        roles = [role for role in ROLES if role != "made" or what != "mount"]
        self._loads = [
            Load(r, self._mountpoint / r, self._random.randrange(1 << 30)) for r in roles
        ]
        self._mount()

    def finish(self) -> None:
        """A clean end, after which nothing is wrong with the store.

        But for what the last kill left, where the mount ended before it had come by it.
        """
        self._end()
        self._repair()
        self._require_nothing_wrong()

    def close(self) -> None:
        """Ends the load, and clears the mount away where it is there still."""
        for load in self._loads:
            load.close()
        if registry.at(self._mountpoint) is not None:
            subprocess.run([*MEMFS, "umount", "--lazy", self._mountpoint], check=False)

    def round(self) -> None:
        """Writes, kills, looks. Raises Violation."""
        killed = self._random.choice(KILLS[self._what])
        runtime = self._runtime() if killed != "mount" else None
        for load in self._loads:
            load.say()
        time.sleep(self._random.uniform(0.02, 0.7))
        pids = self._pids(killed, runtime)
        self._killed_at = time.time() if killed != "runtime" else math.inf
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if killed == "runtime":
            time.sleep(self._random.uniform(0.0, 0.3))  # the mount goes on without
        for load in self._loads:
            load.say()
        self.tally[f"killed: {killed}"] += 1
        self._take_in()
        if killed != "runtime":
            _until_gone(self._mountpoint)
            if self._random.random() < 0.5:
                self._repair()
            self._mount()
        self._verify()
        if killed != "mount":
            self._ask()
        chance = self._random.random()
        if chance < 0.15:
            self._require_nothing_wrong()
        elif chance < 0.3:
            self.finish()
            self._mount()

    def _mount(self) -> None:
        self._memfs("mount", self._store, self._mountpoint)

    def _end(self) -> None:
        self._memfs("umount", self._mountpoint)
        log = log_path(str(self._mountpoint)).read_text()
        if "Traceback" in log:
            raise Violation(log)

    def _runtime(self) -> RuntimeClient:
        client = connect(self._config, start=True)
        client.call("ready", timeout=120)
        return client

    def _pids(self, killed: str, runtime: RuntimeClient | None) -> list[int]:
        record, pids = registry.at(self._mountpoint), []
        if killed != "runtime":
            assert record is not None
            assert record.pid is not None
            pids.append(record.pid)
        if runtime is not None:
            pids.append(int(socket_path(self._config).with_suffix(".pid").read_text()))
            runtime.close()
        self._random.shuffle(pids)
        return pids

    def _take_in(self) -> None:
        """What the load reported before it came to its end."""
        for load in self._loads:
            for event in load.events():
                if event["event"] == "begin":
                    data = base64.b64decode(event["data"])
                    change = Change(event["kind"], event["path"], data, event["to"])
                    self._expected.begin(change)
                elif event["event"] == "done":
                    self._expected.done(event["path"])
                elif event["event"] == "error" and not self._is_of_the_kill(event):
                    raise Violation(event["what"])
                self.tally[event["event"]] += 1

    def _is_of_the_kill(self, error: dict[str, Any]) -> bool:
        """Whether an operation failed as the kernel took the mount down: by EIO, now and then."""
        return error["errno"] == errno.EIO and self._killed_at < error["at"]

    def _verify(self) -> None:
        for root in (self._store, self._mountpoint):
            found = self._expected.violations(lambda path, root=root: _read(root / path))
            if found:
                raise Violation("; ".join(found))
        for kv in self._store.glob("made/*/kv.safetensors"):
            with kv.open("rb") as file:
                kvfile.check_tensors(file.fileno(), kvfile.read_header(file.fileno()))
        for header in self._store.glob("*/*/meta.json"):
            metadata.parse(header.read_bytes())
        for header in self._mountpoint.glob("*/*/meta.json"):
            metadata.parse(header.read_bytes())

    def _ask(self) -> None:
        """The runtime answers again, from a cube that the load has written."""
        cubes = [{"store": str(self._store), "path": "made/0"}]
        if not (self._store / "made/0/payload.md").exists():
            cubes = []
        with self._runtime() as client:
            client.call("ask", timeout=WAIT_S, cubes=cubes, question="Who wrote?", max_tokens=4)

    def _repair(self) -> None:
        """fsck of a store that is not mounted: it mends all that it finds."""
        said = self._fsck("--repair", self._store)
        if said["left"]:
            raise Violation(f"fsck could not mend {said['problems']}")
        for problem in said["problems"]:
            what = problem["what"].split(" is ")[0]  # of the index, the field and not its values
            self.tally[f"mended by fsck: {problem['area']}: {what}"] += 1

    def _require_nothing_wrong(self) -> None:
        said = self._fsck(self._store)
        if said["problems"]:
            raise Violation(f"fsck: {said['problems']}")
        self.tally["fsck found nothing"] += 1

    def _fsck(self, *args: str | Path) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._memfs("fsck", "--json", *args, check=False))
        if "problems" not in said:
            raise Violation(f"fsck: {said}")
        return said

    def _memfs(self, *args: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            [*MEMFS, *args],
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        if check and done.returncode:
            raise Violation(f"memfs {args[0]}: {done.stderr}")
        return done.stdout


def _read(path: Path) -> Content:
    """A file as the load means it: of a header, its title. Reading mounts nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, BlockingIOError):
        return None
    with os.fdopen(fd, "rb") as file:
        data = file.read()
    if path.name == "meta.json":
        return str(json.loads(data)["descriptive"]["title"]).encode()
    return data


def _until_gone(mountpoint: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while (record := registry.at(mountpoint)) is not None and record.alive:
        if time.monotonic() > deadline:
            raise Violation("the mount survived SIGKILL")
        time.sleep(0.005)


@contextlib.contextmanager
def campaign(root: Path, config: Config, *, what: str, seed: int) -> Iterator[Campaign]:
    """A campaign that is cleared away afterwards, whatever happened."""
    running = Campaign(root, config, what=what, seed=seed)
    try:
        yield running
        running.finish()
    except Violation as e:
        e.add_note(log_path(str(root / "mem")).read_text()[-4000:])
        raise
    finally:
        running.close()
