"""How clients and the runtime talk: JSON lines over a Unix stream socket. No torch here.

A request is one line, ``{"op": NAME, ...}``. The answer is any number of ``{"event": ...}`` lines,
then one last line: ``{"ok": {...}}`` or ``{"error": {type, detail, message}}``. The next request
may follow on the same connection. Closing it cancels what it asked for. Who asks is told by the
kernel (``SO_PEERCRED``), never by the request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfs.config import DEFAULT_MODEL, Config, runtime_dir, shared_dir
from memfs.cube.access import Caller
from memfs.cube.process import context_of, groups_of
from memfs.errors import InvalidRequest

_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024
"""The most that Python asks for: 256 groups."""

MAX_LINE = 8 << 20
"""Bytes of a line of an answer; a longer one ends the connection."""

MAX_REQUEST = 1 << 20
"""Bytes of a request; a longer one is refused, and ends the connection."""


def model_spec(config: Config) -> str:
    """The model that a configuration names; a path as one that is right from everywhere."""
    spec = config.model
    if spec != DEFAULT_MODEL and os.path.exists(spec):
        return os.path.realpath(spec)
    return spec


def model_key(config: Config) -> str:
    """A short name for a model as it is served: the spec, and device and dtype where chosen."""
    spec = model_spec(config)
    chosen = [part for part in (config.device, config.dtype) if part != "auto"]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(spec).name)[:40].strip("-.") or "model"
    digest = hashlib.sha256("\0".join([spec, *chosen]).encode()).hexdigest()[:8]
    return "-".join([readable, *[re.sub(r"\W+", "", c) for c in chosen], digest])


def socket_path(config: Config) -> Path:
    """The socket of the runtime that serves this configuration's model. It need not exist."""
    return runtime_dir() / _socket_name(config)


def shared_socket_path(config: Config, uid: int) -> Path:
    """The socket at which a user shares that runtime. It need not exist."""
    return shared_dir(uid) / _socket_name(config)


def _socket_name(config: Config) -> str:
    return f"runtime-{model_key(config)}.sock"


def encode(message: Mapping[str, object]) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line. Raises InvalidRequest where it is not a JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"a line is not JSON ({e})") from e
    if not isinstance(message, dict):
        raise InvalidRequest("a line is not a JSON object")
    return message


def peer_of(connection: socket.socket) -> Caller:
    """The process at the other end, as the kernel knew it when it connected."""
    pid, uid, gid = peer_ids(connection)
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        groups = frozenset(struct.unpack(f"{len(raw) // 4}I", raw))
    except OSError:  # it has more
        groups = groups_of(pid) or frozenset()
    return Caller(uid, groups | {gid}, context_of(pid))


def peer_ids(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid
