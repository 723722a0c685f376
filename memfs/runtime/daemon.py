"""The runtime daemon: binds its socket, loads the model, serves. One a model.

The socket is bound before anything heavy is imported, so whoever starts a daemon can connect at
once. Started by ``client.connect`` and ``memfs runtime`` as ``python -m memfs.runtime.daemon``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import grp
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memfs.config import Config, shared_dir
from memfs.errors import InvalidConfig, RuntimeUnavailable
from memfs.runtime.protocol import shared_socket_path

if TYPE_CHECKING:
    from memfs.runtime.model.resident import Resident


DESCRIPTORS_A_CLIENT = 4
"""Its connection, and the directory and two files of the cube that it asks for."""

EVERYBODY = "all"
"""What ``shared`` says where it is not a group."""


def main(argv: list[str] | None = None) -> int:
    """Serves until it is stopped; 0 then, an error's exit code otherwise."""
    parser = argparse.ArgumentParser(prog="python -m memfs.runtime.daemon")
    parser.add_argument("--socket", type=Path, required=True)
    for option in ("--model", "--device", "--dtype"):
        parser.add_argument(option, default=getattr(Config, option[2:]))
    parser.add_argument("--threads", type=int, default=Config.threads)
    parser.add_argument("--budget-bytes", type=int, default=Config.budget_bytes)
    parser.add_argument("--host-budget-bytes", type=int, default=Config.host_budget_bytes)
    parser.add_argument("--prefetch-bytes", type=int, default=Config.prefetch_bytes)
    parser.add_argument("--shared", default=Config.shared)
    parser.add_argument("--compose", default=Config.compose)
    args = parser.parse_args(argv)
    options = vars(args)
    path = options.pop("socket")
    config = Config(**options)
    try:
        return run(config, path)
    except (RuntimeUnavailable, InvalidConfig) as e:
        print(f"memfs: {e}", file=sys.stderr)  # noqa: T201  a daemon's last words, for its log
        return e.exit_code


def run(config: Config, path: Path) -> int:
    """Serves a configuration's model at a socket until it is stopped; where it is shared, at
    another as well.

    Raises:
        RuntimeUnavailable: another daemon serves there.
        InvalidConfig: it cannot be shared in this way.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _only_one(path), contextlib.ExitStack() as sockets:
        listening = [sockets.enter_context(_socket_at(path))]
        if config.shared:
            listening.append(sockets.enter_context(_socket_of_others(config)))
        clients = _descriptors() // DESCRIPTORS_A_CLIENT
        for one in listening:  # not before all is well: who is let in takes it that it serves
            one.listen(1024)
        asyncio.run(_serve(config, listening, clients))
    return 0


async def _serve(config: Config, listening: list[socket.socket], clients: int) -> None:
    from memfs.runtime.server import Server  # torch: seconds, while clients already connect
    from memfs.runtime.service import Service

    service = Service(config, lambda say: _load(config, say))
    server = Server(service, os.getuid(), clients)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, server.stopped.set)
    loading = asyncio.create_task(service.start())
    try:
        await server.serve(listening)
    finally:
        loading.cancel()
        service.close()


def _descriptors() -> int:
    """How many descriptors this process may have: from now on as many as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _load(config: Config, say: Callable[[str], None]) -> Resident:
    """The resident model, fetched and converted first where that has not been done yet."""
    from huggingface_hub import constants

    from memfs.runtime.model import model_store
    from memfs.runtime.model.resident import load

    directory = model_store.resolve(config.model, config, say)
    constants.HF_HUB_OFFLINE = True  # the model is there: from here on nothing is asked of a hub
    say(f"loading {directory.name}")
    return load(directory, config)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds the lock that says a daemon serves at this socket."""
    with path.with_suffix(".pid").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.seek(0)
            raise RuntimeUnavailable(
                f"a runtime for this model is running already, as process {lock.read().strip()}"
            ) from e
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextlib.contextmanager
def _socket_at(path: Path) -> Iterator[socket.socket]:
    """A socket that only its owner may connect to; gone from the directory afterwards."""
    path.unlink(missing_ok=True)  # a daemon that was killed left it: we hold its lock
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        bound.bind(os.fspath(path))
    finally:
        os.umask(mask)
    try:
        yield bound
    finally:
        bound.close()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _socket_of_others(config: Config) -> Iterator[socket.socket]:
    """A socket that all users, or those of a group, may connect to."""
    directory = shared_dir(os.getuid())
    with contextlib.suppress(FileExistsError):
        directory.mkdir(0o755)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InvalidConfig(f"shared: {directory} is not ours alone to write; remove it")
    directory.chmod(0o755)
    path = shared_socket_path(config, os.getuid())
    gid = -1
    if config.shared != EVERYBODY:
        try:
            gid = grp.getgrnam(config.shared).gr_gid
        except KeyError:
            raise InvalidConfig(f"shared: there is no group {config.shared!r}") from None
    with _socket_at(path) as bound:
        try:
            os.chown(path, -1, gid)
        except PermissionError:
            raise InvalidConfig(f"shared: you are not in the group {config.shared}") from None
        path.chmod(0o660 if gid >= 0 else 0o666)
        yield bound


if __name__ == "__main__":
    sys.exit(main())
