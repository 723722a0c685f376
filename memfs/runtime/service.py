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
from dataclasses import dataclass
from typing import Any

import torch

from memfs.config import Config
from memfs.cube import process
from memfs.cube.access import Caller
from memfs.cube.metadata import rfc3339
from memfs.errors import InvalidRequest, MemfsError, NotFound, OutOfMemory, Refused
from memfs.runtime.asking.asks import Asking
from memfs.runtime.asking.policy import Policy
from memfs.runtime.cubes import Cube, Stores
from memfs.runtime.model.resident import Resident
from memfs.runtime.mounting.ahead import Ahead
from memfs.runtime.mounting.host import Host
from memfs.runtime.mounting.making import Making
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.preparing import Preparing
from memfs.runtime.mounting.rates import Rates
from memfs.runtime.mounting.tiers import has_host_tier, in_model, in_model_for, nearby, tiers
from memfs.runtime.subscribers import Subscribers
from memfs.runtime.worker import Priority, Worker

Events = AsyncIterator[dict[str, Any]]

log = logging.getLogger("memfs.runtime")

LOADING_SECONDS = 0.25
"""Between two words to a client that waits for the model."""


@dataclass(frozen=True)
class Serving:
    """What there is once the model is loaded."""

    mounted: Mounted
    rates: Rates
    making: Making
    asking: Asking
    preparing: Preparing
    ahead: Ahead


class Service:
    """The operations, over one resident model."""

    def __init__(self, config: Config, load: Callable[[Callable[[str], None]], Resident]) -> None:
        """``load`` makes the resident model, in the worker's thread, and says what it is at."""
        self.config = config
        self.state = "loading"
        self.failure: MemfsError | None = None
        self.step = "starting"
        """What the loading is at."""
        self._policy = Policy.parse(config.compose)
        self._load = load
        self._worker = Worker()
        # A second thread with an OpenMP team makes more threads than processors, and then those of
        # the model sleep at every barrier instead of spinning: 53 ms a question rather than 31.
        self._io = ThreadPoolExecutor(4, "io", initializer=torch.set_num_threads, initargs=(1,))
        self._stores = Stores()
        self._serving: Serving | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._subscribers = Subscribers()
        self._started = time.monotonic()
        self._load_seconds: float | None = None
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
            host = None
            if has_host_tier(self.config, resident):
                host = Host(self.config.host_budget_bytes, self._io)
            mounted = Mounted(resident, budget, self._io, self._subscribers.publish, host)
            rates = Rates()
            making = Making(mounted, self._worker, rates)
            self._serving = Serving(
                mounted,
                rates,
                making,
                Asking(mounted, self._worker, making, rates, self._policy),
                Preparing(resident, self._worker, rates),
                Ahead(mounted, self.config.prefetch_bytes),
            )
            self._preparing = asyncio.create_task(self._serving.preparing.start())
            self.state = "ready"
        self._load_seconds = time.monotonic() - self._started
        self._since_start = process.age()
        self._ready.set()
        self._subscribers.publish(self._state_event())

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
        await self._model()
        yield {"ok": self.hello()}

    async def status(self, caller: Caller | None) -> dict[str, Any]:
        """Everything there is to see, at once, also while the model loads.

        Args:
            caller: where given, who is told of the memories that are theirs to mount, of their own
                session and refusals, and of nobody else's.
        """
        mounted = self._serving.mounted if self._serving else None
        resident = mounted.resident if mounted else None
        lines = in_model(mounted) if mounted else []
        refusals = list(mounted.refusals) if mounted else []
        absent = await nearby(mounted, caller) if mounted else []
        if caller is not None and mounted is not None:
            lines = await in_model_for(mounted, caller)
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
            "nearby": absent,
            "tiers": tiers(self.config, resident, [*lines, *absent]),
            "refusals": refusals,
            "budget_bytes": self.config.budget_bytes,
            "used_bytes": sum(line["bytes"] for line in lines),
            "rates": self._serving.rates.facts() if self._serving else None,
            "shared": self.config.shared or None,
            "uptime_s": time.monotonic() - self._started,
            "load_s": self._load_seconds,
            "since_start_s": self._since_start,
        }
        if caller is None:
            status["ahead"] = self._serving.ahead.facts() if self._serving else None
            status["encoding"] = len(self._serving.making.encodings) if self._serving else 0
        return status

    async def mount(self, caller: Caller, cube: Cube, kind: str, pin: bool) -> dict[str, Any]:
        """Puts a cube's KV cache into the model and the caller's session."""
        serving = await self._model()
        mounted = serving.mounted
        with await mounted.open(caller, cube, "mount") as files:
            if kind != "kv":
                error = Refused(f"{cube.path}: this runtime mounts KV caches, not {kind}s")
                mounted.refuse(cube, caller.uid, error)
                raise error
            with mounted.denying(cube, caller.uid, "mount"):
                entry = await mounted.mount(files, caller.uid, pin=pin)
        serving.ahead.mounted(caller, cube)
        serving.preparing.soon()
        return {"mounted": {"cube": cube.path, "tokens": entry.tokens, "bytes": entry.value.nbytes}}

    async def pin(self, caller: Caller, cube: Cube, on: bool) -> dict[str, Any]:
        """Has a cube's KV cache stay in the model, or be evicted again like others."""
        serving = await self._model()
        mounted = serving.mounted
        with await mounted.open(caller, cube, "mount") as files:
            if not on:
                mounted.unpin(cube)
                return {"pinned": None}
            with mounted.denying(cube, caller.uid, "mount"):
                entry = await mounted.pin(files, caller.uid)
        serving.preparing.soon()
        return {"pinned": {"cube": cube.path, "tokens": entry.tokens, "bytes": entry.value.nbytes}}

    async def unmount(self, caller: Caller, cube: Cube | None) -> dict[str, Any]:
        """Takes a cube, or all, out of the caller's session."""
        mounted = (await self._model()).mounted
        if cube:
            (await mounted.open(caller, cube, "mount")).close()
        cubes = [cube] if cube else mounted.session(caller.uid)
        gone = [c.path for c in cubes if mounted.unmount(c, caller.uid)]
        if cube and not gone:
            entry = mounted.residency.peek(cube.key)
            pinned = "; it is pinned (memfs pin --off)" if entry and entry.pinned else ""
            raise NotFound(f"{cube.path} is not mounted in your session{pinned}")
        return {"unmounted": gone}

    async def changed(self, cube: Cube) -> None:
        """A file of a cube changed: what no longer fits is unmounted at once."""
        if self._serving:
            await self._serving.mounted.recheck(cube)

    def moved(self, root: str, old: str, new: str) -> None:
        """A cube, or a collection of them, was renamed."""
        if self._serving:
            self._serving.mounted.moved(root, old, new)

    async def encode(self, caller: Caller, cube: Cube, *, mount: bool, force: bool) -> Events:
        """Makes ``kv.safetensors`` from the payload; progress, then what was done."""
        serving = await self._model()
        mounted = serving.mounted
        with await mounted.open(caller, cube, "promote") as files:
            if mount:
                (await mounted.open(caller, cube, "mount")).close()
            text = await mounted.in_io(files.text)
            storage = await mounted.in_io(files.storage)
        async with _relieving(mounted):
            async for event in serving.making.make(caller, cube, text, storage, force=force):
                if event["event"] == "progress":
                    yield event
        if mount:
            with await mounted.open(caller, cube, "mount") as files:
                await mounted.mount(files, caller.uid)
        yield {"ok": event}

    async def ask(
        self, caller: Caller, cubes: list[Cube] | None, question: str, *, kv: bool, limit: int
    ) -> Events:
        """Answers from the cubes named, or from the caller's session where none is named."""
        asked_at = time.perf_counter()
        serving = await self._model()
        try:
            async with _relieving(serving.mounted):
                async for event in serving.asking.ask(
                    asked_at, caller, cubes, question, kv=kv, limit=limit
                ):
                    yield event
            if kv:
                named = serving.mounted.session(caller.uid) if cubes is None else cubes
                serving.ahead.asked(caller, named)
        finally:
            serving.preparing.soon()

    async def subscribe(self, root: str) -> Events:
        """What happens to the cubes of a store, from now on."""
        with self._subscribers.listening() as events:
            yield self._state_event(root)
            async for event in events:
                if event["event"] == "state":
                    yield self._state_event(root)
                elif event["store"] == root:
                    yield event

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

    def _say(self, step: str) -> None:
        self.step = step
        log.info("%s", step)

    async def _model(self) -> Serving:
        """What serves, once the model is there. Raises ModelUnusable where it never will be."""
        await self._ready.wait()
        if self._serving is None:
            raise self.failure or MemfsError("the model did not load")
        return self._serving

    def _state_event(self, root: str | None = None) -> dict[str, Any]:
        mounted = self._serving.mounted if self._serving else None
        lines = in_model(mounted) if mounted else []
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


@contextlib.asynccontextmanager
async def _relieving(mounted: Mounted) -> AsyncIterator[None]:
    """Where the body runs out of memory, the colder half of what is mounted goes: the next request
    has room."""
    try:
        yield
    except OutOfMemory:
        await mounted.relieve(mounted.residency.used_bytes // 2)
        raise
