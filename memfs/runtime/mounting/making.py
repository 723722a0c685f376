"""Making a cube's ``kv.safetensors`` from its payload, for all who want it at once.

Used by the service, in its event loop; the prefill is a job of the model's thread, files are looked
at and published in the I/O threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from memfs.cube.access import Caller
from memfs.runtime.cubes import Cube, Text
from memfs.runtime.kv import cube_kv
from memfs.runtime.kv.encoding import Encodings, Tell, prefill
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.worker import Priority, Worker


class Making:
    """Makes KV caches; the mounted set is told of those that are made."""

    def __init__(self, mounted: Mounted, worker: Worker) -> None:
        self._mounted = mounted
        self._worker = worker
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

    async def _make(
        self, cube: Cube, text: Text, storage: str, tell: Tell, *, force: bool
    ) -> dict[str, Any]:
        mounted, in_io = self._mounted, self._mounted.in_io
        resident = mounted.resident
        if not force and (ready := await in_io(cube_kv.ready, cube, resident, text, storage)):
            return {**ready, "event": "done", "path": cube.path, "made": False}
        await in_io(cube.require_writable)
        earlier = None if force else await in_io(cube_kv.earlier, cube, resident, text)
        job = self._worker.submit(prefill(resident, text.text, earlier), Priority.ENCODE)
        try:
            async for event in job:
                tell(event)
        except asyncio.CancelledError:
            job.cancel()
            raise
        encoded = job.result
        assert encoded is not None
        size = await in_io(cube_kv.publish, cube, resident, encoded, text, storage)
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
            "storage": storage,
        }
