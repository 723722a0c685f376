"""What the runtime does for its clients: one method an operation of the protocol.

Everything here runs in the daemon's event loop; the model is used in the worker's thread, files are
read and written in the I/O threads. The loop itself never blocks, so ``status`` answers while the
model loads or is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from memfs.config import Config
from memfs.cube import layout, process
from memfs.cube.access import Caller
from memfs.cube.metadata import rfc3339
from memfs.errors import InvalidRequest, MemfsError, NotAllowed, NotFound, Refused
from memfs.runtime.asking.answering import Answer, Part, Question, answer
from memfs.runtime.cubes import Cube, Files, Stores, Text
from memfs.runtime.kv import cube_kv, kv_store
from memfs.runtime.kv.encoding import Encodings, Tell, prefill
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.spare import spare
from memfs.runtime.mounting.mounted import Memory, Mounted
from memfs.runtime.mounting.residency import Entry
from memfs.runtime.worker import Priority, Worker

Events = AsyncIterator[dict[str, Any]]
R = TypeVar("R")

log = logging.getLogger("memfs.runtime")

LOADING_SECONDS = 0.25
"""Between two words to a client that waits for the model."""
IDLE_SECONDS = 0.5
"""After which nobody seems to be asking on."""
MAX_ANSWER = 4096
"""Tokens of one answer, whatever a request says."""


class Service:
    """The operations, over one resident model."""

    def __init__(self, config: Config, load: Callable[[Callable[[str], None]], Resident]) -> None:
        """``load`` makes the resident model, in the worker's thread, and says what it is at."""
        self.config = config
        self.state = "loading"
        self.failure: MemfsError | None = None
        self.step = "starting"
        """What the loading is at."""
        self._load = load
        self._worker = Worker()
        # A second thread with an OpenMP team makes more threads than processors, and then those of
        # the model sleep at every barrier instead of spinning: 53 ms a question rather than 31.
        self._io = ThreadPoolExecutor(4, "io", initializer=torch.set_num_threads, initargs=(1,))
        self._stores = Stores()
        self._encodings = Encodings()
        self._mounted: Mounted | None = None
        self._ready = asyncio.Event()
        self._subscribers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._started = time.monotonic()
        self._load_seconds: float | None = None
        self._preparing = False
        self._since_start: float | None = None

    async def start(self) -> None:
        """Loads the model. Does not raise: a model that cannot serve is what clients are told."""
        try:
            job = self._worker.call(lambda: self._load(self._say), Priority.ANSWER)
            resident = await job.done()
        except MemfsError as e:
            self.state, self.failure = "failed", e
        else:
            budget = self.config.budget_bytes
            self._mounted = Mounted(resident, budget, self._io, self._publish)
            self._prepare()
            self.state = "ready"
        self._load_seconds = time.monotonic() - self._started
        self._since_start = process.age()
        self._ready.set()
        self._publish(self._state_event())

    def close(self) -> None:
        """Ends the threads."""
        self._worker.close()
        self._io.shutdown(wait=False, cancel_futures=True)

    # Operations. ``caller`` is who the kernel says it is; the rest is what the request says. Those
    # that take a while yield events, and {"ok": …} in the end.

    def hello(self) -> dict[str, Any]:
        """Whether the model is ready, and what it is."""
        return {k: v for k, v in self._state_event().items() if k not in ("event", "mounted")}

    async def ready(self) -> Events:
        """What the loading is at until the model is ready. Raises ModelUnusable where it fails."""
        while not self._ready.is_set():
            yield {"event": "loading", "step": self.step}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), LOADING_SECONDS)
        await self._mounted_set()
        yield {"ok": self.hello()}

    async def status(self, caller: Caller | None) -> dict[str, Any]:
        """Everything there is to see, at once, also while the model loads.

        Args:
            caller: where given, who is told of the memories that are theirs to mount, of their own
                session and refusals, and of nobody else's.
        """
        mounted = self._mounted
        resident = mounted.resident if mounted else None
        lines = mounted.lines() if mounted else []
        refusals = list(mounted.refusals) if mounted else []
        if caller is not None and mounted is not None:
            lines = await mounted.lines_for(caller)
            refusals = [refusal for refusal in refusals if refusal["uid"] == caller.uid]
        status = {
            "pid": os.getpid(),
            "state": self.state,
            "error": str(self.failure) if self.failure else None,
            "model": resident.name if resident else self.config.model,
            "device": str(resident.shape.device) if resident else None,
            "dtype": resident.fingerprint["dtype"] if resident else None,
            "context": resident.context if resident else None,
            "token_bytes": resident.shape.token_bytes if resident else None,
            "unplaceable": resident.unplaceable if resident else None,
            "mounted": lines,
            "refusals": refusals,
            "budget_bytes": self.config.budget_bytes,
            "used_bytes": sum(line["bytes"] for line in lines),
            "shared": self.config.shared or None,
            "uptime_s": time.monotonic() - self._started,
            "load_s": self._load_seconds,
            "since_start_s": self._since_start,
        }
        return status if caller else status | {"encoding": len(self._encodings)}

    async def mount(self, caller: Caller, cube: Cube, kind: str, pin: bool) -> dict[str, Any]:
        """Puts a cube's KV cache into the model and the caller's session."""
        mounted = await self._mounted_set()
        with await self._open(mounted, caller, cube, "mount") as files:
            if kind != "kv":
                error = Refused(f"{cube.path}: this runtime mounts KV caches, not {kind}s")
                mounted.refuse(cube, caller.uid, error)
                raise error
            with mounted.denying(cube, caller.uid, "mount"):
                entry = await mounted.mount(files, caller.uid, pin=pin)
        self._prepare()
        return {"mounted": {"cube": cube.path, "tokens": entry.tokens, "bytes": entry.value.nbytes}}

    async def unmount(self, caller: Caller, cube: Cube | None) -> dict[str, Any]:
        """Takes a cube, or all, out of the caller's session."""
        mounted = await self._mounted_set()
        if cube:
            (await self._open(mounted, caller, cube, "mount")).close()
        cubes = [cube] if cube else mounted.session(caller.uid)
        gone = [c.path for c in cubes if mounted.unmount(c, caller.uid)]
        if cube and not gone:
            raise NotFound(f"{cube.path} is not mounted in the model")
        return {"unmounted": gone}

    async def changed(self, cube: Cube) -> None:
        """A file of a cube changed: what no longer fits is unmounted at once."""
        if self._mounted:
            await self._mounted.recheck(cube)

    def moved(self, root: str, old: str, new: str) -> None:
        """A cube, or a collection of them, was renamed."""
        if self._mounted:
            self._mounted.moved(root, old, new)

    async def encode(self, caller: Caller, cube: Cube, *, mount: bool, force: bool) -> Events:
        """Makes ``kv.safetensors`` from the payload; progress, then what was done."""
        mounted = await self._mounted_set()
        with await self._open(mounted, caller, cube, "promote") as files:
            if mount:
                (await self._open(mounted, caller, cube, "mount")).close()
            text = await self._in_io(files.text)

        async def work(tell: Tell) -> dict[str, Any]:
            return await self._encode(mounted, cube, text, tell, force=force)

        key = f"{cube.key}\0{text.sha256}\0{force}"
        with mounted.denying(cube, caller.uid, "promote"):
            async for event in self._encodings.run(key, work):
                if event["event"] == "progress":
                    yield event
        if mount:
            with await self._open(mounted, caller, cube, "mount") as files:
                await mounted.mount(files, caller.uid)
        yield {"ok": event}

    async def ask(
        self, caller: Caller, cubes: list[Cube] | None, question: str, *, kv: bool, limit: int
    ) -> Events:
        """Answers from the cubes named, or from the caller's session where none is named."""
        asked_at = time.perf_counter()
        mounted = await self._mounted_set()
        named = mounted.session(caller.uid) if cubes is None else cubes
        if not 0 < limit <= MAX_ANSWER:
            raise InvalidRequest(f"an answer has 1 to {MAX_ANSWER} tokens, not {limit}")
        parts: list[Part] = []
        entries: list[Entry[Memory]] = []
        try:
            for cube in list(named):
                try:
                    part, entry = await self._part(mounted, caller, cube, parts, kv=kv)
                except (NotFound, NotAllowed):
                    if cubes is not None:
                        raise
                    named.remove(cube)  # it was mounted once, and is gone since, or closed to them
                    mounted.leave(cube, caller.uid)
                    continue
                parts.append(part)
                if entry:
                    entry.users += 1
                    entries.append(entry)
            whole = Question(question, parts, limit, asked_at, drop_oldest=cubes is None)
            key = None
            if entries and len(entries) == len(parts):
                key, whole.lent = mounted.lend(entries)
            job = self._worker.submit(answer(mounted.resident, whole), Priority.ANSWER)
            try:
                async for event in job:
                    if event["event"] != "step":
                        yield event
            except BaseException:
                job.cancel()
                raise
            assert job.result is not None
            self._after(mounted, caller, named, key, job.result)
            yield {"ok": job.result.report}
        finally:
            for entry in entries:
                entry.users -= 1
            self._prepare()

    async def subscribe(self, root: str) -> Events:
        """What happens to the cubes of a store, from now on."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            yield self._state_event(root)
            while True:
                event = await queue.get()
                if event["event"] == "state":
                    yield self._state_event(root)
                elif event["store"] == root:
                    yield event
        finally:
            self._subscribers.discard(queue)

    def owns(self, caller: Caller, root: str) -> bool:
        """Whether a user owns the store at ``root``, which is its real path."""
        try:
            return os.path.realpath(root) == root and os.lstat(root).st_uid == caller.uid
        except OSError:
            return False

    def cube(self, root: object, path: object, caller: Caller, *, by_mount: bool) -> Cube:
        """The cube that a request names; ``by_mount`` as for ``Stores.cube``."""
        if not isinstance(root, str) or not isinstance(path, str):
            raise InvalidRequest("store and path must be strings")
        return self._stores.cube(root, path, caller, by_mount=by_mount)

    # How they do it.

    async def _open(self, mounted: Mounted, caller: Caller, cube: Cube, right: str) -> Files:
        """A cube's files, to be closed. Raises NotAllowed where a caller has not a right."""
        with mounted.denying(cube, caller.uid, right):
            files: Files = await self._in_io(cube.open, caller, right)
        return files

    def _prepare(self) -> None:
        """Has memory made ready for the next mount, once nothing else is wanted."""
        if self._preparing or self._mounted is None:
            return
        shape = self._mounted.resident.shape
        if shape.device.type != "cpu":
            return
        nbytes = (self._mounted.resident.context + kv_store.ROOM) * shape.token_bytes

        def now() -> None:
            self._preparing = False
            self._worker.submit(spare.prepare(nbytes), Priority.IDLE)

        self._preparing = True
        asyncio.get_running_loop().call_later(IDLE_SECONDS, now)

    def _say(self, step: str) -> None:
        self.step = step
        log.info("%s", step)

    async def _mounted_set(self) -> Mounted:
        """The mounted set, once the model is there. Raises ModelUnusable where it never will be."""
        await self._ready.wait()
        if self._mounted is None:
            raise self.failure or MemfsError("the model did not load")
        return self._mounted

    async def _part(
        self, mounted: Mounted, caller: Caller, cube: Cube, before: list[Part], *, kv: bool
    ) -> tuple[Part, Entry[Memory] | None]:
        """One memory of a question: its KV cache where that fits, else its text and the reason."""
        why = "not wanted" if not kv else None
        if kv and before and mounted.resident.unplaceable:
            why = f"several cubes cannot be placed: {mounted.resident.unplaceable}"
        root = str(cube.store.root)
        with await self._open(mounted, caller, cube, "mount") as files:
            if why is None:
                try:
                    entry = await mounted.load(files, caller.uid)
                    return Part(cube.path, root, None, entry.value.cache), entry
                except NotFound:
                    why = f"it has no {layout.KV}"
                except MemfsError as e:
                    why = str(e)
                except OSError as e:
                    why = f"{layout.KV}: {e.strerror}"
            text: Text = await self._in_io(files.text)
        return Part(cube.path, root, text.text, None, why), None

    def _after(
        self, mounted: Mounted, caller: Caller, named: list[Cube], key: str | None, done: Answer
    ) -> None:
        if key and done.placed is not None and mounted.residency.peek(key) is None:
            mounted.keep_placed(key, done.placed)
        for cube, line in zip(named, done.report["cubes"], strict=True):
            mounted.announce("asked", cube, uid=caller.uid, how=line["how"])

    async def _encode(
        self, mounted: Mounted, cube: Cube, text: Text, tell: Tell, *, force: bool
    ) -> dict[str, Any]:
        resident = mounted.resident
        if not force and (ready := await self._in_io(cube_kv.ready, cube, resident, text)):
            return {**ready, "event": "done", "path": cube.path, "made": False}
        await self._in_io(cube.require_writable)
        earlier = None if force else await self._in_io(cube_kv.earlier, cube, resident, text)
        job = self._worker.submit(prefill(resident, text.text, earlier), Priority.ENCODE)
        try:
            async for event in job:
                tell(event)
        except asyncio.CancelledError:
            job.cancel()
            raise
        encoded = job.result
        assert encoded is not None
        size = await self._in_io(cube_kv.publish, cube, resident, encoded, text)
        await mounted.recheck(cube)  # what was mounted was another file
        mounted.announce("encoded", cube, tokens=len(encoded.ids))
        return {
            "event": "done",
            "path": cube.path,
            "made": True,
            "tokens": len(encoded.ids),
            "kept_tokens": encoded.kept,
            "seconds": encoded.seconds,
            "bytes": size,
        }

    def _state_event(self, root: str | None = None) -> dict[str, Any]:
        mounted = self._mounted
        lines = mounted.lines() if mounted else []
        return {
            "event": "state",
            "state": self.state,
            "error": str(self.failure) if self.failure else None,
            "model": {
                "name": mounted.resident.name,
                "device": str(mounted.resident.shape.device),
                "fingerprint": mounted.resident.fingerprint,
            }
            if mounted
            else None,
            "mounted": [line for line in lines if line["store"] == root],
            "time": rfc3339(),
        }

    def _publish(self, event: dict[str, Any]) -> None:
        for queue in self._subscribers:
            queue.put_nowait(event)

    async def _in_io(self, function: Callable[..., R], *args: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *args)
