"""A thread that does things later, one after the other. Used by the historian; any thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable

from memfs.errors import MemfsError

log = logging.getLogger(__name__)

Job = Callable[[], object]


class Later:
    """Jobs by the time when they are due. Errors of theirs are logged."""

    def __init__(self, name: str) -> None:
        self.stopping = False
        """Whether a job that takes long should break off."""
        self._due: list[tuple[float, int, Hashable, Job]] = []
        self._numbers = itertools.count()
        self._waiting: dict[Hashable, float] = {}
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def after(
        self, seconds: float, job: Job, key: Hashable = None, *, put_off: bool = False
    ) -> None:
        """Has a job done in so many seconds.

        Args:
            key: where a job with the same key waits already, that one is enough.
            put_off: then that one waits until this one would be due.
        """
        due = time.monotonic() + seconds
        with self._wake:
            if key is not None:
                if key in self._waiting:
                    if put_off:
                        self._waiting[key] = max(due, self._waiting[key])
                    return
                self._waiting[key] = due
            heapq.heappush(self._due, (due, next(self._numbers), key, job))
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread, when the job that it is at has ended."""
        with self._wake:
            self.stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def left(self) -> list[tuple[Hashable, bool]]:
        """The jobs that still wait: their keys, and whether they are due."""
        now = time.monotonic()
        with self._wake:
            return [(key, due <= now) for due, _, key, _ in self._due]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except InterruptedError:
                pass  # it has seen ``stopping``
            except (OSError, MemfsError) as e:
                log.warning("%s: %s", self._thread.name, e)
            except Exception:
                log.exception("%s failed", self._thread.name)

    def _next(self) -> Job | None:
        with self._wake:
            while not self.stopping:
                now = time.monotonic()
                if not self._due or self._due[0][0] > now:
                    self._wake.wait(self._due[0][0] - now if self._due else None)
                    continue
                _, number, key, job = heapq.heappop(self._due)
                if key is not None and self._waiting[key] > now:
                    heapq.heappush(self._due, (self._waiting[key], number, key, job))
                    continue
                self._waiting.pop(key, None)
                return job
        return None
