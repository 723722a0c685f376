"""What is mounted into the model: resident KV caches, whose sessions they belong to, and pins.

A mounted cube is looked at again before every use: while its payload and its KV file are the very
files they were, the resident rows are used; a file that changed is checked in full again, and what
no longer fits is unmounted with the reason. Belongs to the service's event loop; reading files goes
to the I/O threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from memfs.cube.access import Caller
from memfs.cube.metadata import rfc3339
from memfs.errors import MemfsError, NotAllowed, OutOfMemory, OverBudget, Refused
from memfs.runtime.cubes import Cube, Files, Text
from memfs.runtime.kv import kv_store
from memfs.runtime.kv.encoding import Encoded
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.spare import spare
from memfs.runtime.mounting.host import Host, to_device
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.placed import Placed
from memfs.runtime.mounting.residency import Entry, Residency
from memfs.runtime.shortage import telling

R = TypeVar("R")


KNOWN = 64
"""Cubes remembered that were in the model lately, or were read ahead, for ``status``."""


class Mounted:
    """The mounted set."""

    def __init__(
        self,
        resident: Resident,
        budget_bytes: int,
        io: Executor,
        announce: Callable[[dict[str, Any]], None],
        host: Host | None = None,
    ) -> None:
        """Nothing is mounted yet.

        Args:
            announce: is told of every change, as the events of the protocol.
            host: takes what is evicted, where the device has a memory of its own.
        """
        self.resident = resident
        self.host = host
        self.residency: Residency[Memory] = Residency(budget_bytes)
        self.placed = Placed(self.residency, resident.base)
        self.refusals: deque[dict[str, Any]] = deque(maxlen=20)
        self._sessions: dict[int, dict[str, Cube]] = {}
        self._known: OrderedDict[str, Cube] = OrderedDict()
        self._io = io
        self._announce = announce
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def session(self, uid: int) -> list[Cube]:
        """The cubes that a user has mounted, in the order of mounting."""
        return list(self._sessions.get(uid, {}).values())

    async def in_io(self, function: Callable[..., R], *args: object) -> R:
        """Runs what blocks in an I/O thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._io, telling, function, *args)

    async def open(self, caller: Caller, cube: Cube, right: str) -> Files:
        """A cube's files, to be closed. Raises NotAllowed where a caller has not a right."""
        with self.denying(cube, caller.uid, right):
            files: Files = await self.in_io(cube.open, caller, right)
        return files

    async def mount(self, files: Files, uid: int, *, pin: bool = False) -> Entry[Memory]:
        """Puts a cube's KV cache into the model and the user's session.

        Raises what ``load`` raises; what was mounted before stays.
        """
        entry = await self.load(files, uid)
        if pin:
            self.residency.pin(entry)
        self.join(files.cube, uid, entry)
        return entry

    async def pin(self, files: Files, uid: int) -> Entry[Memory]:
        """Has a cube in the model from now on, whether or not it is in anybody's session.

        Raises what ``load`` raises; OverBudget where too much is pinned.
        """
        entry = await self.load(files, uid)
        self.residency.pin(entry)
        entry.value.pinned = True
        return entry

    def unpin(self, cube: Cube) -> None:
        """It may be evicted again."""
        entry = self.residency.peek(cube.key)
        if entry is not None:
            entry.pinned = entry.value.pinned = False

    async def load(self, files: Files, uid: int) -> Entry[Memory]:
        """The resident KV cache of a cube, read and checked in full unless it is there already.

        Args:
            files: as the user was let to them: what they get is made of these.

        Raises:
            NotFound: the cube has no KV cache.
            NotAllowed: they may not read it.
            KVCorrupt, KVForeign, KVStale, OverBudget, OutOfMemory: it is refused; by name of what
                differs.
        """
        with self.refusing(files.cube, uid):
            async with self.only_one(files, uid) as found:
                entry = found or await self.read(files, uid, await self.in_io(files.text))
                self.residency.use(files.cube.key)
                return entry

    @contextlib.asynccontextmanager
    async def only_one(self, files: Files, uid: int) -> AsyncIterator[Entry[Memory] | None]:
        """A cube's KV cache, where it is in the model or in host memory and its files stand; None
        where the body is to bring it in, with ``read`` or ``add``. Who else wants the cube waits,
        and finds it there: two share one load. Raises OverBudget."""
        key = files.cube.key
        async with self._loading.setdefault(key, asyncio.Lock()):
            entry = self.residency.peek(key)
            if entry and not await self.in_io(entry.value.unchanged, files):
                self._drop(key, "its files changed")
            entry = self.residency.peek(key)  # it may have had to go while it was looked at
            yield entry or await self._from_host(files, uid)

    def is_held(self, cube: Cube) -> bool:
        """Whether it is on the device or in host memory."""
        if self.residency.peek(cube.key) is not None:
            return True
        return self.host is not None and self.host.residency.peek(cube.key) is not None

    async def load_ahead(self, files: Files) -> None:
        """Loads a cube that nobody asked for yet, on probation, where nothing has to go for it.

        Raises what ``load`` raises, and tells nobody of it; OverBudget where there is no room.
        """
        async with self._loading.setdefault(files.cube.key, asyncio.Lock()):
            if not self.is_held(files.cube):
                text: Text = await self.in_io(files.text)
                await self.read(files, files.owner, text, evicting=False)

    async def _from_host(self, files: Files, uid: int) -> Entry[Memory] | None:
        """The cube back on the device from host memory, where it is there and its files stand."""
        key = files.cube.key
        kept = self.host.residency.peek(key) if self.host else None
        if self.host is None or kept is None:
            return None
        if not await self.in_io(kept.value.unchanged, files):
            self.host.residency.remove(key)
            return None
        self.host.residency.use(key)
        rows, shape = kept.value.cache, self.resident.shape
        nbytes = (rows.length + kv_store.ROOM) * shape.token_bytes
        await self._make_room(nbytes)
        cache = await self._with_room(nbytes, partial(to_device, rows, shape, kv_store.ROOM))
        memory = replace(kept.value.copied_to(cache), cube=files.cube, pinned=False)
        return await self._put(files, uid, memory)

    async def read(
        self, files: Files, uid: int, text: Text, *, evicting: bool = True
    ) -> Entry[Memory]:
        """Loads a cube's KV cache from its file. Raises what ``load`` raises."""
        fd, signature = await self.in_io(files.open_kv)
        header = await self.in_io(kv_store.fit, fd, self.resident, text.sha256)
        rows = self.resident.base + header.tokens + kv_store.ROOM
        nbytes = rows * self.resident.shape.token_bytes
        make_room = self._make_room if evicting else self._require_room
        await make_room(nbytes)
        read = partial(kv_store.read, fd, self.resident, text.sha256)
        cache, ids = await (self._with_room(nbytes, read) if evicting else self.in_io(read))
        read_from = (text.sha256, text.signature, signature)
        memory = Memory(files.cube, cache, array("i", ids), *read_from, storage=header.storage)
        return await self._put(files, uid, memory, evicting=evicting)

    async def add(
        self, files: Files, uid: int, text: Text, made: Encoded, *, published: bool
    ) -> Entry[Memory]:
        """Keeps a cube's rows as they were made of its text.

        Args:
            files: the text is theirs, and so is the KV cache, which is open.
            published: whether that holds these rows; otherwise they are to take its place.

        Raises OverBudget.
        """
        made_of = (text.sha256, text.signature, files.open_kv()[1])
        memory = Memory(
            files.cube, made.cache, array("i", made.ids), *made_of, computed=True, storage="exact"
        )
        memory.unpublished = None if published else made
        return await self._put(files, uid, memory)

    async def _put(
        self, files: Files, uid: int, memory: Memory, *, evicting: bool = True
    ) -> Entry[Memory]:
        pinned = await self.in_io(files.pinned)
        make_room = self._make_room if evicting else self._require_room
        await make_room(memory.nbytes)  # another may have come in meanwhile
        tokens = memory.cache.length - self.resident.base
        entry = self.residency.add(files.cube.key, memory, tokens)
        self._remember(files.cube)
        self._follow_header(entry, pinned, uid)
        return entry

    def join(self, cube: Cube, uid: int, entry: Entry[Memory]) -> None:
        """Makes a resident cube part of a user's session."""
        self._sessions.setdefault(uid, {})[cube.key] = cube
        self.announce("mounted", cube, uid=uid, tokens=entry.tokens, bytes=entry.value.nbytes)

    def unmount(self, cube: Cube, uid: int) -> bool:
        """Takes a cube out of a user's session, and out of the model if that was the last one and
        its header does not pin it. Whether there was anything to take out."""
        was_there = self._sessions.get(uid, {}).pop(cube.key, None) is not None
        entry = self.residency.peek(cube.key)
        stays = entry is not None and entry.pinned and entry.value.pinned
        if not stays and not any(cube.key in session for session in self._sessions.values()):
            was_there = self._drop(cube.key, "unmounted") or was_there
        elif was_there:
            self.announce("unmounted", cube, uid=uid, reason="unmounted")
        return was_there

    async def recheck(self, cube: Cube) -> None:
        """Unmounts a cube at once where its text or its KV file is no longer the one mounted.

        It stays in the sessions it is in: their next question makes it again.
        """
        entry = self.residency.peek(cube.key)
        if entry is None:
            return
        try:
            with await self.in_io(cube.open, None) as files:
                if await self.in_io(entry.value.unchanged, files):
                    self._follow_header(entry, await self.in_io(files.pinned), files.owner)
                    return
        except (MemfsError, OSError):
            pass  # it is gone, or no longer to be read
        self._drop(cube.key, "its files changed")

    def moved(self, root: str, old: str, new: str) -> None:
        """Follows the rename of a cube or of a collection of cubes."""

        def now(cube: Cube) -> Cube:
            below = cube.path == old or cube.path.startswith(old + "/")
            if not below or str(cube.store.root) != root:
                return cube
            return Cube(cube.store, new + cube.path[len(old) :])

        for tier in [self.residency] + ([self.host.residency] if self.host else []):
            for entry in list(tier):
                if entry.value.cube is not None:
                    entry.value.cube = now(entry.value.cube)
                    tier.rename(entry.key, entry.value.cube.key)
        self._known = OrderedDict((cube.key, cube) for cube in map(now, self._known.values()))
        for uid, session in self._sessions.items():
            self._sessions[uid] = {cube.key: cube for cube in map(now, session.values())}

    def leave(self, cube: Cube, uid: int) -> None:
        """Takes a cube that is gone from the store out of a user's session."""
        self._sessions.get(uid, {}).pop(cube.key, None)

    def refuse(self, cube: Cube, uid: int, error: MemfsError) -> None:
        """Remembers and announces that a cube was refused."""
        event = {"cube": cube.path, "store": str(cube.store.root), "reason": str(error)}
        self.refusals.append({**event, "uid": uid, "time": rfc3339()})
        self.announce("refused", cube, uid=uid, reason=str(error))

    @contextlib.contextmanager
    def refusing(self, cube: Cube, uid: int) -> Iterator[None]:
        """Remembers and announces it where the body raises Refused."""
        try:
            yield
        except Refused as e:
            self.refuse(cube, uid, e)
            raise

    @contextlib.contextmanager
    def denying(self, cube: Cube, uid: int, right: str) -> Iterator[None]:
        """Announces that a user is denied something, where the body raises NotAllowed."""
        try:
            yield
        except NotAllowed as e:
            self.announce("denied", cube, uid=uid, right=right, reason=e.detail)
            raise

    def announce(self, event: str, cube: Cube, **facts: object) -> None:
        """Tells the subscribers of the cube's store."""
        where = {"store": str(cube.store.root), "path": cube.path}
        self._announce({"event": event, **where, "kind": "kv", "time": rfc3339(), **facts})

    def sessions_with(self, key: str) -> list[int]:
        """The users in whose sessions a memory is."""
        return [uid for uid, cubes in self._sessions.items() if key in cubes]

    def absent(self, uid: int | None) -> dict[str, Cube]:
        """The cubes, by key, that are not in the model and were lately, or are in a session.

        Args:
            uid: whose session alone is meant; None for all.
        """
        cubes = dict(self._known)
        for owner, session in self._sessions.items():
            if uid in (None, owner):
                cubes |= session
        return {key: cube for key, cube in cubes.items() if self.residency.peek(key) is None}

    def _follow_header(self, entry: Entry[Memory], pinned: bool, uid: int) -> None:
        """Pins a memory, or lets it go, where its cube's header has come to say so."""
        memory = entry.value
        if pinned == memory.pinned or memory.cube is None:
            return
        memory.pinned = pinned
        if not pinned:
            entry.pinned = False
            return
        try:
            self.residency.pin(entry)
        except OverBudget as e:  # it is mounted all the same, and may be evicted
            self.refuse(memory.cube, uid, e)

    async def _make_room(self, nbytes: int) -> None:
        """Evicts until ``nbytes`` more fit: they do until the caller awaits something else."""
        while gone := self.residency.make_room(nbytes):
            await self._put_out(gone)

    async def _with_room(self, nbytes: int, make: Callable[[], R]) -> R:
        """What takes ``nbytes`` to make, in an I/O thread; once more without what is colder, where
        the device has less than the budget."""
        try:
            return await self.in_io(make)
        except OutOfMemory:
            if not await self.relieve(nbytes):
                raise
            return await self.in_io(make)

    async def relieve(self, nbytes: int) -> bool:
        """Gives back what is coldest, ``nbytes`` where that much may go; whether any went."""
        gc.collect()  # errors and the frames that they came through, with caches in them
        had_spare = spare.clear()
        gone = self.residency.shed(nbytes)
        await self._put_out(gone)
        return had_spare or bool(gone)

    async def _put_out(self, gone: list[Entry[Memory]]) -> None:
        for entry in gone:
            for session in self._sessions.values():
                session.pop(entry.key, None)
            self._announce_gone(entry, "evicted")
        if self.host is not None:
            await self.host.keep(gone)

    async def _require_room(self, nbytes: int) -> None:
        if self.residency.used_bytes + nbytes > self.residency.budget_bytes:
            raise OverBudget(f"{nbytes} bytes are not free")

    def _remember(self, cube: Cube) -> None:
        self._known[cube.key] = cube
        self._known.move_to_end(cube.key)
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def _drop(self, key: str, reason: str) -> bool:
        """Takes a cube out of the model and out of host memory, and what it was placed in."""
        if self.host is not None:
            self.host.residency.remove(key)
        self.placed.drop_with(key)
        entry = self.residency.remove(key)
        if entry is not None:
            self._announce_gone(entry, reason)
        return entry is not None

    def _announce_gone(self, entry: Entry[Memory], reason: str) -> None:
        if entry.value.cube is not None:
            self.announce("unmounted", entry.value.cube, reason=reason)
