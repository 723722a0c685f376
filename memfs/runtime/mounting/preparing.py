"""What is made ready while nobody asks: the rates are measured, memory is had for the next mount.

Belongs to the service's event loop; the work is done in the model's thread."""

from __future__ import annotations

import asyncio
import logging

from memfs.errors import MemfsError
from memfs.runtime.kv import kv_store
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.spare import spare
from memfs.runtime.mounting.gauge import gauge
from memfs.runtime.mounting.rates import Rates
from memfs.runtime.worker import Priority, Worker

log = logging.getLogger("memfs.runtime")

IDLE_SECONDS = 0.5
"""After which nobody seems to be asking on."""


class Preparing:
    """Sees to the rates, once, and to the spare memory of a CPU; an accelerator has none."""

    def __init__(self, resident: Resident, worker: Worker, rates: Rates) -> None:
        self._resident = resident
        self._worker = worker
        self._rates = rates
        self._waiting = False
        self._nbytes = 0
        if resident.shape.device.type == "cpu":
            self._nbytes = (resident.context + kv_store.ROOM) * resident.shape.token_bytes

    async def start(self) -> None:
        """Begins with it; to be called once."""
        self.soon()
        await asyncio.sleep(IDLE_SECONDS)
        try:
            measured = await self._worker.submit(gauge(self._resident), Priority.IDLE).done()
            self._rates.prefilling, self._rates.loading = measured
        except MemfsError as e:  # out of memory, maybe: then what is there is loaded
            log.warning("the rates could not be measured: %s", e)
        self.soon()

    def soon(self) -> None:
        """Memory may have been taken: it is made ready again, once nothing else is wanted."""
        if self._nbytes and not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_later(IDLE_SECONDS, self._now)

    def _now(self) -> None:
        self._waiting = False
        self._worker.submit(spare.prepare(self._nbytes), Priority.IDLE)
