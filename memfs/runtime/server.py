"""The runtime's socket: lines in, lines out, each request run by the service.

One asyncio task a connection, and one more a request, which is cancelled when the client goes. A
client that says nothing costs a descriptor and no thread; one that asks and does not read is cut
off after a while. Runs in the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from memfs.cube.access import Caller
from memfs.errors import DiskFull, InvalidRequest, MemfsError, NotAllowed, RuntimeUnavailable
from memfs.runtime.cubes import Cube
from memfs.runtime.protocol import MAX_REQUEST, decode, encode, peer_of
from memfs.runtime.service import Service
from memfs.runtime.shortage import shortage

log = logging.getLogger("memfs.runtime")

Request = dict[str, Any]

ACCEPT_AGAIN_SECONDS = 0.25
"""After which it is looked again whether there are descriptors."""
UNREAD_SECONDS = 60.0
"""How long a client may leave its answer unread once the socket's buffers are full."""

_IDS = frozenset({"uid", "gid", "gids"})
"""What of a request names a user."""


class Server:
    """Serves connections until it is told to stop."""

    def __init__(self, service: Service, own_uid: int, most: int) -> None:
        """``own_uid`` is the user the daemon runs as; ``most`` clients are served at once."""
        self._service = service
        self._own_uid = own_uid
        self._most = most
        self._connections: set[asyncio.Task[None]] = set()
        self.stopped = asyncio.Event()

    async def serve(self, listening: list[socket.socket]) -> None:
        """Accepts until ``stopped`` is set."""
        accepting = [asyncio.create_task(self._accept(one)) for one in listening]
        await self.stopped.wait()
        for task in accepting:  # clients may keep their connections: they end with the loop
            task.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        # Not asyncio's own server: where descriptors run out, that tells of it a thousand times a
        # second (once for each place in its backlog).
        listening.setblocking(False)
        loop, told = asyncio.get_running_loop(), False
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as e:  # out of descriptors or memory; who waits to connect waits on
                if not told:
                    log.warning("nobody can connect: %s", e.strerror)
                told = True
                await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            told = False
            if len(self._connections) >= self._most:
                error = RuntimeUnavailable(f"it has {self._most} clients, and can have no more")
                with contextlib.suppress(OSError):
                    connection.send(encode({"error": error.to_wire()}))
                connection.close()
                continue
            serving = asyncio.create_task(self._connection(connection))
            self._connections.add(serving)
            serving.add_done_callback(self._connections.discard)

    async def _connection(self, connection: socket.socket) -> None:
        try:
            peer = peer_of(connection)
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_REQUEST)
        except OSError as e:
            log.warning("a client cannot be served: %s", e)
            connection.close()
            return
        line: asyncio.Task[bytes] = asyncio.create_task(reader.readline())
        try:
            while data := await line:
                line = asyncio.create_task(reader.readline())
                answering = asyncio.create_task(self._answer(data, peer, writer))
                await asyncio.wait({answering, line}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done() and not _next_line(line):
                    answering.cancel()  # the client is gone: nobody wants the rest
                await asyncio.gather(answering, return_exceptions=True)
                if writer.is_closing():  # it does not hear what else it has asked for
                    break
        except ValueError:
            error = InvalidRequest(f"a request has at most {MAX_REQUEST} bytes")
            writer.write(encode({"error": error.to_wire()}))
        except ConnectionError as e:
            log.debug("a connection ended: %s", e)
        except asyncio.CancelledError:
            pass  # the daemon is going down
        finally:
            line.cancel()
            writer.close()

    async def _answer(self, data: bytes, peer: Caller, writer: asyncio.StreamWriter) -> None:
        """Writes the lines of an answer, as fast as the client takes them; one that takes none for
        a while is cut off, as what answers it is kept in memory meanwhile."""
        async with contextlib.aclosing(self._lines(data, peer)) as lines:
            async for line in lines:
                writer.write(encode(line))
                try:
                    async with asyncio.timeout(UNREAD_SECONDS):
                        await writer.drain()
                except TimeoutError:
                    log.info("a client did not read its answer for %d s", UNREAD_SECONDS)
                    writer.transport.abort()
                    return

    async def _lines(self, data: bytes, peer: Caller) -> AsyncGenerator[dict[str, Any], None]:
        """The lines that answer a request, an error the last of them."""
        try:
            request = decode(data)
            async for line in self._run(request, self._caller(request, peer), peer):
                yield line
        except MemfsError as e:
            yield {"error": e.to_wire()}
        except Exception as e:  # noqa: BLE001  one bad request must not end the daemon
            yield {"error": _explained(e).to_wire()}

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


def _explained(error: Exception) -> MemfsError:
    """An error that is not memfs's own, as one that can be sent."""
    if (short := shortage(error)) is not None:
        return short
    if isinstance(error, OSError):
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (DiskFull if full else MemfsError)(f"{where}{error.strerror or error}")
    log.error("a request failed", exc_info=error)
    return MemfsError(f"{type(error).__name__}: {error}")
