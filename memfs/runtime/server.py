"""The runtime's socket: lines in, lines out, each request run by the service.

One asyncio task a connection, and one more a request, which is cancelled when the client goes. A
client that says nothing costs a descriptor and no thread. Runs in the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

from memfs.cube.access import Caller
from memfs.errors import DiskFull, InvalidRequest, MemfsError, NotAllowed
from memfs.runtime.cubes import Cube
from memfs.runtime.protocol import MAX_LINE, decode, encode, peer_of
from memfs.runtime.service import Service

log = logging.getLogger("memfs.runtime")

Request = dict[str, Any]

_IDS = frozenset({"uid", "gid", "gids"})
"""What of a request names a user."""


class Server:
    """Serves connections until it is told to stop."""

    def __init__(self, service: Service, own_uid: int) -> None:
        """``own_uid`` is the user the daemon runs as."""
        self._service = service
        self._own_uid = own_uid
        self.stopped = asyncio.Event()

    async def serve(self, listening: list[socket.socket]) -> None:
        """Accepts until ``stopped`` is set."""
        servers = [
            await asyncio.start_unix_server(self._connection, sock=sock, limit=MAX_LINE)
            for sock in listening
        ]
        await self.stopped.wait()
        for server in servers:
            server.close()  # not waited for: clients may keep their connections open

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_of(writer.get_extra_info("socket"))
        line: asyncio.Task[bytes] = asyncio.create_task(reader.readline())
        try:
            while data := await line:
                line = asyncio.create_task(reader.readline())
                answering = asyncio.create_task(self._answer(data, peer, writer))
                await asyncio.wait({answering, line}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done() and not _next_line(line):
                    answering.cancel()  # the client is gone: nobody wants the rest
                await asyncio.gather(answering, return_exceptions=True)
        except (ConnectionError, ValueError) as e:  # reset, or a line beyond the limit
            log.debug("a connection ended: %s", e)
        except asyncio.CancelledError:
            pass  # the daemon is going down
        finally:
            line.cancel()
            writer.close()

    async def _answer(self, data: bytes, peer: Caller, writer: asyncio.StreamWriter) -> None:
        try:
            request = decode(data)
            async for line in self._run(request, self._caller(request, peer), peer):
                writer.write(encode(line))
                await writer.drain()
            return
        except MemfsError as e:
            error = e
        except OSError as e:
            where = f"{e.filename}: " if isinstance(e.filename, str) else ""
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            error = (DiskFull if full else MemfsError)(f"{where}{e.strerror or e}")
        except Exception as e:  # one bad request must not end the daemon
            log.exception("a request failed")
            error = MemfsError(f"{type(e).__name__}: {e}")
        writer.write(encode({"error": error.to_wire()}))
        await writer.drain()

    def _caller(self, request: Request, peer: Caller) -> Caller:
        """Whose rights count: the peer's; the mount process (root, or the daemon's own user) may
        say for which user it asks."""
        if not self._is_trusted(peer) or _IDS.isdisjoint(request):
            return peer
        caller = Caller.from_wire(request)
        if caller is None:  # never the mount's own rights instead
            raise InvalidRequest("a user is named by uid and gids, or uid and gid, all numbers")
        return caller

    def _is_trusted(self, peer: Caller) -> bool:
        return peer.uid in (0, self._own_uid)

    async def _run(  # noqa: PLR0912  one branch an operation
        self, request: Request, caller: Caller, peer: Caller
    ) -> AsyncIterator[dict[str, Any]]:
        """The lines that answer a request: events, and ``{"ok": …}`` in the end."""
        service, op = self._service, request.get("op")
        if op == "hello":
            yield {"ok": service.hello()}
        elif op == "ready":
            async for event in service.ready():
                yield event
        elif op == "status":
            yield {"ok": await service.status(None if self._is_trusted(peer) else peer)}
        elif op == "mount":
            kind, pin = str(request.get("kind", "kv")), bool(request.get("pin"))
            yield {"ok": await service.mount(caller, self._cube(request, caller, peer), kind, pin)}
        elif op == "pin":
            on = request.get("on") is not False
            yield {"ok": await service.pin(caller, self._cube(request, caller, peer), on)}
        elif op == "unmount":
            named = request.get("path") is not None
            cube = self._cube(request, caller, peer) if named else None
            yield {"ok": await service.unmount(caller, cube)}
        elif op == "changed":
            await service.changed(self._stores_cube(request, peer))
            yield {"ok": {}}
        elif op == "moved":
            old = self._stores_cube(request, peer, "old")
            new = self._stores_cube(request, peer, "new")
            service.moved(str(old.store.root), old.path, new.path)
            yield {"ok": {}}
        elif op == "encode":
            mount, force = bool(request.get("mount")), bool(request.get("force"))
            async for event in service.encode(
                caller, self._cube(request, caller, peer), mount=mount, force=force
            ):
                yield event
        elif op == "ask":
            async for event in self._ask(request, caller, peer):
                yield event
        elif op == "subscribe":
            root = str(request.get("store"))
            async for event in service.subscribe(root):
                # Each time: another's store may have come to stand there.
                if not self._is_trusted(peer) and not service.owns(peer, root):
                    raise NotAllowed(f"{root}: only its owner is told of what happens in a store")
                yield event
        elif op == "stop":
            if not self._is_trusted(peer):
                raise NotAllowed("only the daemon's own user may stop it")
            self.stopped.set()
            yield {"ok": {}}
        else:
            raise InvalidRequest(f"there is no operation {op!r}")

    def _ask(self, request: Request, caller: Caller, peer: Caller) -> AsyncIterator[dict[str, Any]]:
        question, named = request.get("question"), request.get("cubes")
        limit = request.get("max_tokens", 256)
        if not isinstance(question, str) or not question.strip():
            raise InvalidRequest("a question is wanted")
        if type(limit) is not int:
            raise InvalidRequest("max_tokens must be a whole number")
        cubes = None
        if named is not None:
            if not isinstance(named, list) or not all(isinstance(c, dict) for c in named):
                raise InvalidRequest("cubes must be a list of {store, path}")
            cubes = [self._cube(c, caller, peer) for c in named]
        kv = request.get("kv") is not False
        return self._service.ask(caller, cubes, question, kv=kv, limit=limit)

    def _cube(self, request: Request, caller: Caller, peer: Caller, field: str = "path") -> Cube:
        by_mount = caller is not peer
        return self._service.cube(
            request.get("store"), request.get(field), caller, by_mount=by_mount
        )

    def _stores_cube(self, request: Request, peer: Caller, field: str = "path") -> Cube:
        """A cube that the mount of its store tells of."""
        cube = self._cube(request, peer, peer, field)
        # The store that is open, not what the path leads to by now.
        if not self._is_trusted(peer) and os.fstat(cube.store.fd).st_uid != peer.uid:
            raise NotAllowed("only its owner tells of what changes in a store")
        return cube


def _next_line(line: asyncio.Task[bytes]) -> bool:
    """Whether the client sent another request rather than going away."""
    return not line.cancelled() and line.exception() is None and bool(line.result())
