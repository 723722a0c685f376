"""A real runtime daemon that also tells what it heard from its model: a digest of all logits.

``Nursery`` is a process that has torch imported, and from which daemons are forked: each is a new
process with a model of its own, without the seconds that the imports take. ``Runtime`` is one such
daemon, which answers at the socket of its configuration like any other; ``heard`` gives the SHA-256
of each row of logits that its model gave since it was asked last, bit for bit what an answer was
made of. Nothing of memfs is replaced: the model is told to call back (``register_forward_hook``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfs.config import Config
from memfs.errors import RuntimeUnavailable
from memfs.runtime.client import RuntimeClient, connect, stop
from memfs.runtime.protocol import socket_path

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

    from memfs.runtime.model.resident import Resident

START_SECONDS = 60.0
"""The first daemon waits for torch to be imported."""

ROOT = Path(__file__).resolve().parents[3]


def digests(logits: torch.Tensor) -> list[str]:
    """SHA-256 of the bytes of each row of logits, [..., vocabulary], in float32."""
    rows = logits.detach().float().cpu().reshape(-1, logits.shape[-1]).numpy()
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]


class Runtime:
    """A daemon, and a client of it."""

    def __init__(self, client: RuntimeClient, heard: Path) -> None:
        self.client = client
        self._heard = heard
        self._known = 0

    def heard(self) -> list[str]:
        """The digests of the logits that were not told yet."""
        found = self._heard.read_text().split()
        new, self._known = found[self._known :], len(found)
        return new


class Nursery:
    """Where daemons come from."""

    def __init__(self, directory: Path) -> None:
        """Starts it; ``directory`` is where its daemons' logs and digests go."""
        self._directory = directory
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.exactness.listening"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def runtime(self, config: Config) -> Iterator[Runtime]:
        """A new daemon, its model ready; stopped at the end."""
        self._count += 1
        heard = self._directory / f"heard-{self._count}"
        heard.touch()
        wanted = {
            "config": dataclasses.asdict(config),
            "socket": os.fspath(socket_path(config)),
            "heard": os.fspath(heard),
            "log": os.fspath(heard.with_suffix(".log")),
        }
        assert self._process.stdin
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        with _connected(config) as client:
            client.call("ready", timeout=300)
            yield Runtime(client, heard)
        stop(config)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def _connected(config: Config) -> RuntimeClient:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return connect(config, start=False)
        except RuntimeUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def main() -> None:
    """Forks a daemon for each line of standard input."""
    import memfs.runtime.server
    import memfs.runtime.service  # noqa: F401  torch and transformers, once for all of them

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        wanted = json.loads(line)
        if os.fork() == 0:
            _daemon(wanted)


def _daemon(wanted: dict[str, Any]) -> None:
    from memfs.runtime import daemon
    from memfs.runtime.model import resident

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    load = resident.load

    def write(new: list[str]) -> None:
        with Path(wanted["heard"]).open("a") as file:
            file.writelines(digest + "\n" for digest in new)

    def load_and_listen(directory: Path, config: Config) -> Resident:
        found = load(directory, config)
        listen(found, write)
        return found

    resident.load = load_and_listen
    os._exit(daemon.run(Config(**wanted["config"]), Path(wanted["socket"])))


def listen(found: Resident, tell: Callable[[list[str]], None]) -> RemovableHandle:
    """Has ``tell`` called with the digests of the logits of each forward that gives some."""

    def told(_model: object, _inputs: object, output: Any) -> None:
        tell(digests(output.logits))

    return found.engine.model.register_forward_hook(told)


if __name__ == "__main__":
    main()
