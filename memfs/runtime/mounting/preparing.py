"""Has memory made ready for the next mount while nobody asks. In the service's event loop."""

from __future__ import annotations

import asyncio

from memfs.runtime.kv import kv_store
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.spare import spare
from memfs.runtime.worker import Priority, Worker

IDLE_SECONDS = 0.5
"""After which nobody seems to be asking on."""


class Preparing:
    """Sees to the spare memory of a CPU; on an accelerator there is none."""

    def __init__(self, resident: Resident, worker: Worker) -> None:
        shape = resident.shape
        self._worker = worker
        self._waiting = False
        self._nbytes = 0
        if shape.device.type == "cpu":
            self._nbytes = (resident.context + kv_store.ROOM) * shape.token_bytes

    def soon(self) -> None:
        """Memory may have been taken: it is made ready again, once nothing else is wanted."""
        if self._nbytes and not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_later(IDLE_SECONDS, self._now)

    def _now(self) -> None:
        self._waiting = False
        self._worker.submit(spare.prepare(self._nbytes), Priority.IDLE)
