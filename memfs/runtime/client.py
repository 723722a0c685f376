"""Talking to a runtime, and starting one. No torch here: every process imports this.

A ``RuntimeClient`` is one connection and belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from memfs.config import Config
from memfs.errors import InvalidConfig, InvalidRequest, RuntimeUnavailable, from_wire
from memfs.runtime.protocol import (
    MAX_LINE,
    decode,
    encode,
    model_spec,
    peer_ids,
    shared_socket_path,
    socket_path,
)

START_SECONDS = 10.0
"""How long a new daemon may take to answer its socket. It binds that before it loads anything."""
STOP_SECONDS = 30.0
"""How long one may take to end: it finishes the step it is in."""


class RuntimeClient:
    """A connection to a runtime."""

    def __init__(self, path: Path, served_by: int | None = None) -> None:
        """Connects. Raises RuntimeUnavailable where nobody listens, or we may not talk to them.

        Args:
            served_by: the user whose process it has to be; root's will do as well. Not needed for a
                socket in a directory of our own.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as e:
            self._socket.close()
            raise RuntimeUnavailable(f"{path}: {e.strerror}") from e
        if served_by is not None and peer_ids(self._socket)[1] not in (0, served_by):
            self._socket.close()
            raise RuntimeUnavailable(f"{path}: it is not user {served_by} who listens there")
        self._pending = b""

    def call(self, op: str, *, timeout: float | None = None, **args: object) -> dict[str, Any]:
        """The final answer to a request; events on the way are dropped.

        Raises the MemfsError that the runtime answered with; RuntimeUnavailable where the
        connection ends, or no line comes within ``timeout`` seconds.
        """
        final: dict[str, Any] = {}
        for message in self.stream(op, timeout=timeout, **args):
            final = message
        return final

    def stream(
        self, op: str, *, timeout: float | None = None, **args: object
    ) -> Iterator[dict[str, Any]]:
        """The events of a request as they come; the last item is its final answer."""
        message = self._exchange(encode({"op": op, **args}), timeout)
        while "event" in message:
            yield message
            message = self._exchange(b"", timeout)
        if "error" in message:
            raise from_wire(message["error"])
        yield dict(message["ok"])

    def close(self) -> None:
        """Ends the connection, and with it what it has asked for."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is reading
        except OSError:
            pass  # the other end was gone first
        self._socket.close()

    def __enter__(self) -> RuntimeClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, request: bytes, timeout: float | None) -> dict[str, Any]:
        """Sends what there is to send, and gives the next message."""
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(request)
            return decode(self._line())
        except (OSError, InvalidRequest) as e:
            self.close()
            raise RuntimeUnavailable(f"the connection ended ({e})") from e

    def _line(self) -> bytes:
        while b"\n" not in self._pending:
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise ConnectionError("the runtime closed it")
            self._pending += chunk
            if len(self._pending) > MAX_LINE:
                raise ConnectionError("a line is too long")
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def connect(config: Config, *, start: bool) -> RuntimeClient:
    """A connection to the runtime of this configuration's model: our own, else one that root shares
    with us; or, where the configuration says so, another user's.

    With ``start`` a daemon is started where none answers; its model may still be loading when this
    returns. Raises RuntimeUnavailable.
    """
    if config.runtime_of:
        uid = _uid(config.runtime_of)
        return RuntimeClient(shared_socket_path(config, uid), served_by=uid)
    path = socket_path(config)
    try:
        return RuntimeClient(path)
    except RuntimeUnavailable:
        with contextlib.suppress(RuntimeUnavailable):
            return RuntimeClient(shared_socket_path(config, 0), served_by=0)
        if not start:
            raise
    with (path.parent / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two starters: the second finds the first one's daemon
        try:
            return RuntimeClient(path)
        except RuntimeUnavailable:
            return _start(config, path)


def stop(config: Config) -> bool:
    """Ends the runtime of this configuration's model, and waits; False where none was running.

    Raises RuntimeUnavailable where it does not end.
    """
    path = socket_path(config)
    try:
        with RuntimeClient(path) as client:
            client.call("stop", timeout=STOP_SECONDS)
    except RuntimeUnavailable:
        if not path.exists():
            return False
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if not path.exists():
            return True
        time.sleep(0.02)
    raise RuntimeUnavailable(f"it was told to stop and has not in {STOP_SECONDS:.0f} s")


def log_path(config: Config) -> Path:
    """Where the daemon of this configuration's model writes what it has to say."""
    return socket_path(config).with_suffix(".log")


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        if user.isdecimal():
            return int(user)
        raise InvalidConfig(f"runtime_of: there is no user {user!r}") from None


def _start(config: Config, path: Path) -> RuntimeClient:
    command = [sys.executable, "-m", "memfs.runtime.daemon", "--socket", os.fspath(path)]
    command += ["--model", model_spec(config), "--device", config.device, "--dtype", config.dtype]
    command += ["--threads", str(config.threads), "--budget-bytes", str(config.budget_bytes)]
    command += ["--host-budget-bytes", str(config.host_budget_bytes)]
    command += ["--prefetch-bytes", str(config.prefetch_bytes)]
    command += ["--shared", config.shared, "--compose", config.compose]
    with log_path(config).open("ab") as log:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,  # it outlives the command that happened to start it
            close_fds=True,
        )
    threading.Thread(target=daemon.wait, daemon=True).start()  # so that it never stays a zombie
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            return RuntimeClient(path)
        except RuntimeUnavailable:
            if daemon.poll() is not None:
                break
            time.sleep(0.02)
    raise RuntimeUnavailable(f"the runtime did not start; see {log_path(config)}")
