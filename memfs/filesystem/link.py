"""The mount's side of the runtime: what it is told, what it is asked, what it says.

Nothing here ever makes a file operation wait: requests are queued and sent by threads of this
module, and what the runtime says is kept as a ``RuntimeState`` that anybody may read. With no
runtime everything works but for the making of KV caches; a thread looks for one each second.

Threads: one listens (``subscribe``), one tells of changes in their order, a few wait for mounts,
one sees to what does not fit (``renewal``), one more for each KV cache that is being made.
All are daemons, and end with the process.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from memfs.config import Config
from memfs.cube.access import Caller
from memfs.errors import (
    Interrupted,
    KVCorrupt,
    KVForeign,
    MemfsError,
    Refused,
    RuntimeUnavailable,
)
from memfs.filesystem.renewal import Read, Renewal, Ticket
from memfs.runtime.client import RuntimeClient, connect

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
TELL_SECONDS = 5.0
"""How long the runtime may take to hear of a change; it answers that without using the model."""
MISFITS = (KVForeign, KVCorrupt)
"""What is wrong with a KV cache that one made from the text would not have."""
_MOUNTERS = 4


@dataclass(frozen=True)
class Resident:
    """A memory in the model."""

    tokens: int | None
    nbytes: int | None
    uids: frozenset[int]
    """The users whose sessions it is in."""


@dataclass(frozen=True)
class RuntimeState:
    """What is known of the runtime."""

    phase: str = "absent"
    """absent, loading, ready or failed."""
    error: str | None = None
    model: str | None = None
    device: str | None = None
    mounted: Mapping[str, Resident] = field(default_factory=dict)
    """By path of the cube, of this store alone."""


class Asked(NamedTuple):
    """A mount to be asked for, as somebody has read the file."""

    path: str
    kind: str
    caller: Caller
    ticket: Ticket


class Listener(Protocol):
    """Who is told of what the runtime says. Called in a thread of the link's."""

    def model_known(self, fingerprint: Mapping[str, str]) -> None:
        """A model is resident."""

    def happened(self, event: dict[str, Any]) -> None:
        """Something happened to a cube: mounted, unmounted, refused, encoded, asked."""


class Making:
    """A KV cache that is being made. Shared by all who wait for it; ends when the last one goes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.error: MemfsError | None = None
        self.waiting = 1
        self._done = threading.Event()
        self._client: RuntimeClient | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        return self._done.wait(seconds)

    @property
    def done(self) -> bool:
        """Whether it ended."""
        return self._done.is_set()

    def began(self, client: RuntimeClient) -> None:
        self._client = client

    def finish(self, error: MemfsError | None) -> None:
        self.error = error
        self._done.set()

    def cancel(self) -> None:
        """Nobody waits any more: closing the connection takes it back."""
        if self._client is not None:
            self._client.close()


class Link:
    """The connection of one mount to the runtime of its configuration's model."""

    def __init__(self, config: Config, store: str, listener: Listener) -> None:
        self.state = RuntimeState()
        self._config = config
        self._store = store
        self._listener = listener
        self._stopping = threading.Event()
        self._look_now = threading.Event()
        self._responsive = True
        self._subscription: RuntimeClient | None = None
        self._tell: queue.SimpleQueue[tuple[str, dict[str, object]] | None] = queue.SimpleQueue()
        self._mounts: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._renewal = Renewal(self._use)
        self._asked: dict[tuple[str, str, Caller], Ticket] = {}
        self._made: dict[tuple[str, Caller], Making] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the threads."""
        once = (self._listen, self._tell_all, self._renewal.run)
        for target in (*once, *[self._mount_all] * _MOUNTERS):
            self._thread(target)

    def stop(self) -> None:
        """Ends the connections. Threads that wait for an answer end with the process."""
        self._stopping.set()
        self._look_now.set()
        self._tell.put(None)
        self._renewal.stop()
        for _ in range(_MOUNTERS):
            self._mounts.put(None)
        if self._subscription is not None:
            self._subscription.close()

    def is_mounted(self, path: str, uid: int) -> bool:
        """Whether a cube is in the model, in this user's session."""
        found = self.state.mounted.get(path)
        return found is not None and uid in found.uids

    @property
    def answers_at_once(self) -> bool:
        """Whether a short wait for it is likely to be worth it."""
        return self.state.phase == "ready" and self._responsive

    @property
    def can_make(self) -> bool:
        """Whether a KV cache could be made: there is a runtime, or one may be started."""
        phase = self.state.phase
        return phase in ("loading", "ready") or (phase == "absent" and self._config.autostart)

    def timed_out(self) -> None:
        """Somebody waited in vain: nobody does again until it answers."""
        self._responsive = False

    def read(self, path: str, kind: str, caller: Caller) -> Read:
        """A cube's memory is being read: it is to be put into the model, in this user's session.

        Whoever calls it calls ``closed`` in the end.
        """
        key = (path, kind, caller)
        with self._lock:
            ticket = self._asked.get(key)
            if ticket is None:
                ticket = self._asked[key] = Ticket()
                self._mounts.put(Asked(path, kind, caller, ticket))
        read = Read(path, caller, ticket)
        self._renewal.began(read)
        return read

    def closed(self, read: Read) -> None:
        """The file that was read was closed."""
        self._renewal.closed(read)

    def changed(self, path: str) -> None:
        """A cube's files changed. What is not mounted is looked at when it is."""
        with self._lock:
            wanted = any(asked == path for asked, _, _ in self._asked)
        if wanted or path in self.state.mounted:
            self._tell.put(("changed", {"path": path}))

    def moved(self, old: str, new: str) -> None:
        """A cube, or a collection of them, was renamed."""
        below = old + "/"
        with self._lock:
            there = {
                new + path[len(old) :] if path == old or path.startswith(below) else path: resident
                for path, resident in self.state.mounted.items()
            }
            self.state = replace(self.state, mounted=there)
        if self.state.phase != "absent":
            self._tell.put(("moved", {"old": old, "new": new}))

    def make(self, path: str, caller: Caller) -> Making:
        """Has a cube's KV cache made. Whoever calls it calls ``leave`` in the end."""
        with self._lock:
            making = self._made.get((path, caller))
            if making is not None and not making.done:
                making.waiting += 1
                return making
            making = self._made[path, caller] = Making(path)
        self._thread(lambda: self._make(making, caller))
        return making

    def leave(self, making: Making) -> None:
        """One who waited for a KV cache waits no more."""
        with self._lock:
            making.waiting -= 1
            last = making.waiting == 0
            if last:
                for key in [key for key, found in self._made.items() if found is making]:
                    del self._made[key]
        if last and not making.done:
            making.cancel()

    def status(self, seconds: float) -> dict[str, Any] | None:
        """The runtime's own status; None where it has none within that time, or is not there."""
        if self.state.phase == "absent" or not self._responsive:
            return None
        try:
            with connect(self._config, start=False) as client:
                return client.call("status", timeout=seconds)
        except MemfsError:
            return None

    # The threads

    def _thread(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name="link", daemon=True).start()

    def _listen(self) -> None:
        while not self._stopping.is_set():
            self._look_now.clear()
            try:
                with connect(self._config, start=False) as client:
                    self._subscription = client
                    for event in client.stream("subscribe", store=self._store):
                        self._hear(event)
            except MemfsError as e:
                log.debug("no runtime: %s", e)
            self._subscription = None
            self.state = RuntimeState()
            self._look_now.wait(RETRY_SECONDS)

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        self._responsive = True
        if kind == "state":
            model = event.get("model") or {}
            self.state = RuntimeState(
                phase=str(event.get("state")),
                error=event.get("error"),
                model=model.get("name"),
                device=model.get("device"),
                mounted={
                    line["cube"]: Resident(
                        line["tokens"], line["bytes"], frozenset(line["sessions"])
                    )
                    for line in event.get("mounted", [])
                },
            )
            if model:
                self._listener.model_known(model["fingerprint"])
            return
        path = event.get("path")
        if not isinstance(path, str):
            return
        if kind in ("mounted", "unmounted"):
            self._set_mounted(path, event, there=kind == "mounted")
        self._listener.happened(event)

    def _set_mounted(self, path: str, event: dict[str, Any], *, there: bool) -> None:
        uid = event.get("uid")
        named = frozenset() if uid is None else frozenset({uid})
        with self._lock:
            mounted = dict(self.state.mounted)
            known = mounted.pop(path, None)
            uids = known.uids if known else frozenset()
            if there:
                mounted[path] = Resident(event.get("tokens"), event.get("bytes"), uids | named)
            elif named and known is not None:
                mounted[path] = replace(known, uids=uids - named)
            self.state = replace(self.state, mounted=mounted)

    def _tell_all(self) -> None:
        while (item := self._tell.get()) is not None:
            op, args = item
            try:
                with connect(self._config, start=False) as client:
                    client.call(op, timeout=TELL_SECONDS, store=self._store, **args)
            except MemfsError as e:
                log.debug("the runtime was not told of %s: %s", op, e)

    def _mount_all(self) -> None:
        while (asked := self._mounts.get()) is not None:
            try:
                self._mount(asked.path, asked.kind, asked.caller)
            except MISFITS:
                asked.ticket.misfit = True
            finally:
                with self._lock:
                    self._asked.pop((asked.path, asked.kind, asked.caller), None)
                asked.ticket.finish()

    def _mount(self, path: str, kind: str, caller: Caller) -> None:
        """Raises MISFITS where the file cannot be used, and one made from the text could."""
        try:
            with connect(self._config, start=self._config.autostart) as client:
                self._look_now.set()
                client.call("mount", store=self._store, path=path, kind=kind, **caller.to_wire())
                self._responsive = True
        except MISFITS:
            raise
        except Refused as e:
            log.debug("%s was not mounted: %s", path, e)  # the runtime has told everybody
        except MemfsError as e:
            if self._config.autostart or not isinstance(e, RuntimeUnavailable):
                self._refused(path, kind, caller.uid, e)

    def _use(self, read: Read) -> None:
        """A memory was read, and not in passing."""
        if (read.path, read.caller) not in self._made:
            self._thread(lambda: self._renew(read))

    def _renew(self, read: Read) -> None:
        """Has a KV cache that does not fit made anew, and mounted."""
        read.ticket.wait()
        if not read.ticket.misfit:
            return
        making = self.make(read.path, read.caller)
        making.wait(threading.TIMEOUT_MAX)
        self.leave(making)
        if making.error is None:
            with contextlib.suppress(*MISFITS):  # another model's runtime was there in between
                self._mount(read.path, "kv", read.caller)

    def _make(self, making: Making, caller: Caller) -> None:
        error: MemfsError | None = None
        try:
            with connect(self._config, start=self._config.autostart) as client:
                self._look_now.set()
                making.began(client)
                if making.waiting == 0:
                    raise Interrupted(making.path)
                client.call(
                    "encode",
                    store=self._store,
                    path=making.path,
                    mount=False,
                    force=False,
                    **caller.to_wire(),
                )
        except MemfsError as e:
            error = e
            if making.waiting:
                self._refused(making.path, "kv", caller.uid, e)
        finally:
            making.finish(error)

    def _refused(self, path: str, kind: str, uid: int, error: MemfsError) -> None:
        event = {"event": "refused", "path": path, "kind": kind, "uid": uid, "reason": str(error)}
        self._listener.happened(event)
