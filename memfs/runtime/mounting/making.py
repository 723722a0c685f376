"""Making a cube's ``kv.safetensors`` from its payload, for all who want it at once.

Used by the service, in its event loop; the prefill is a job of the model's thread, files are looked
at and published in the I/O threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from memfs.cube import layout
from memfs.cube.access import Caller
from memfs.errors import MemfsError
from memfs.runtime.cubes import Cube, Text
from memfs.runtime.kv import cube_kv
from memfs.runtime.kv.encoding import Earlier, Encoded, Encodings, Tell, prefill
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.rates import Rates
from memfs.runtime.worker import Priority, Worker

log = logging.getLogger("memfs.runtime")


class Making:
    """Makes KV caches; the mounted set is told of those that are made."""

    def __init__(self, mounted: Mounted, worker: Worker, rates: Rates) -> None:
        self._mounted = mounted
        self._worker = worker
        self._rates = rates
        self._behind: set[asyncio.Task[None]] = set()
        self.encodings = Encodings()

    async def make(
        self, caller: Caller, cube: Cube, text: Text, storage: str, *, force: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The ``progress`` of making it from ``text``, then ``done`` and what was done.

        Args:
            storage: how it is to be stored.
            force: also where there is one that fits, and from the first token on.
        """

        async def work(tell: Tell) -> dict[str, Any]:
            return await self._make(cube, text, storage, tell, force=force)

        key = f"{cube.key}\0{text.sha256}\0{storage}\0{force}"
        with self._mounted.denying(cube, caller.uid, "promote"):
            async for event in self.encodings.run(key, work):
                yield event

    def publish_later(self, caller: Caller, memories: list[Memory]) -> None:
        """Writes what is in no file yet of these to one, once nobody waits for the model.

        Nothing comes of it, and nobody is told, where the caller has not the right ``promote``, the
        cube is frozen or the disk full: the rows are resident, and can be made again.
        """
        for cube in [memory.cube for memory in memories if memory.unpublished]:
            assert cube is not None
            task = asyncio.create_task(self._publish(caller, cube))
            self._behind.add(task)  # the loop itself keeps no hold of it
            task.add_done_callback(self._behind.discard)

    async def _publish(self, caller: Caller, cube: Cube) -> None:
        in_io = self._mounted.in_io
        await self._worker.call(lambda: None, Priority.IDLE).done()
        try:
            with await in_io(cube.open, caller, "promote") as files:
                text: Text = await in_io(files.text)
                storage = await in_io(files.storage)
            await in_io(cube.require_writable)
            if self._unpublished(cube, text) is not None:
                async for _ in self.make(caller, cube, text, storage, force=False):
                    pass
        except (MemfsError, OSError) as e:
            log.debug("%s: no %s was made: %s", cube.path, layout.KV, e)

    async def _make(
        self, cube: Cube, text: Text, storage: str, tell: Tell, *, force: bool
    ) -> dict[str, Any]:
        mounted, in_io = self._mounted, self._mounted.in_io
        resident = mounted.resident
        if not force and (ready := await in_io(cube_kv.ready, cube, resident, text, storage)):
            return {**ready, "event": "done", "path": cube.path, "made": False}
        await in_io(cube.require_writable)
        encoded = None if force else self._unpublished(cube, text)
        if encoded is None:
            earlier = None if force else await in_io(cube_kv.earlier, cube, resident, text)
            encoded = await self.prefill(text, earlier, Priority.ENCODE, tell)
        signature = await in_io(cube_kv.publish, cube, resident, encoded, text, storage)
        entry = mounted.residency.peek(cube.key)
        if entry and entry.value.unpublished is encoded and storage == "exact":
            # The file is these rows' own now. One in int8 holds others, and is read.
            entry.value.unpublished, entry.value.kv_signature = None, signature
        await mounted.recheck(cube)  # what was mounted may be another file
        mounted.announce("encoded", cube, tokens=len(encoded.ids))
        return {
            "event": "done",
            "path": cube.path,
            "made": True,
            "tokens": len(encoded.ids),
            "kept_tokens": encoded.kept,
            "seconds": encoded.seconds,
            "bytes": signature[1],
            "storage": storage,
        }

    def _unpublished(self, cube: Cube, text: Text) -> Encoded | None:
        """What is resident of this text of a cube and in no file yet."""
        entry = self._mounted.residency.peek(cube.key)
        fits = entry is not None and entry.value.payload_sha256 == text.sha256
        return entry.value.unpublished if entry and fits else None

    async def prefill(
        self, text: Text, earlier: Earlier | None, priority: Priority, tell: Tell | None = None
    ) -> Encoded:
        """Computes the rows of a text in the model's thread, and corrects the rates by that.

        Raises what ``encoding.prefill`` raises.
        """
        resident = self._mounted.resident
        job = self._worker.submit(prefill(resident, text.text, earlier), priority)
        try:
            async for event in job:
                if tell:
                    tell(event)
        except asyncio.CancelledError:
            job.cancel()
            raise
        made = job.result
        assert made is not None
        computed = len(made.ids) - made.kept
        self._rates.prefilled(resident.base + made.kept, computed, made.busy_seconds)
        return made
