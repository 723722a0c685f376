"""A question from end to end: its memories, the cache that is lent to it, the job that answers.

Used by the service, in its event loop; ``answering`` is what runs in the model's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from memfs.cube import layout
from memfs.cube.access import Caller
from memfs.errors import InvalidRequest, MemfsError, NotAllowed, NotFound
from memfs.runtime.asking.answering import Answer, Part, Question, answer
from memfs.runtime.asking.joint import Joints
from memfs.runtime.asking.policy import Policy
from memfs.runtime.cubes import Cube, Text
from memfs.runtime.mounting.choosing import Choosing
from memfs.runtime.mounting.making import Making
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.rates import Rates
from memfs.runtime.mounting.residency import Entry
from memfs.runtime.worker import Priority, Worker

MAX_ANSWER = 4096
"""Tokens of one answer, whatever a request says."""


class Asking:
    """Answers questions from a mounted set."""

    def __init__(
        self, mounted: Mounted, worker: Worker, making: Making, rates: Rates, policy: Policy
    ) -> None:
        self._mounted = mounted
        self._worker = worker
        self._making = making
        self._choosing = Choosing(mounted, making, rates)
        self._policy = policy
        self._joints = Joints(mounted, worker)

    async def ask(
        self,
        asked_at: float,
        caller: Caller,
        cubes: list[Cube] | None,
        question: str,
        *,
        kv: bool,
        limit: int,
    ) -> AsyncIterator[dict[str, Any]]:
        """Answers from the cubes named, or from the caller's session where none is named.

        Yields the answer's events, in the end its report as ``{"ok": …}``.

        Args:
            asked_at: ``time.perf_counter()`` when the request came in.
            kv: False to use the texts alone.
            limit: tokens of the answer, at most.
        """
        mounted = self._mounted
        named = mounted.session(caller.uid) if cubes is None else cubes
        if not 0 < limit <= MAX_ANSWER:
            raise InvalidRequest(f"an answer has 1 to {MAX_ANSWER} tokens, not {limit}")
        parts: list[Part] = []
        entries: list[Entry[Memory]] = []
        try:
            for cube in list(named):
                try:
                    part, entry = await self._part(caller, cube, parts, kv=kv)
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
            whole = Question(
                question, parts, limit, asked_at, drop_oldest=cubes is None, policy=self._policy
            )
            key = None
            if entries and len(entries) == len(parts):
                key, whole.lent, whole.lent_as = mounted.placed.lend(entries)
            job = self._worker.submit(answer(mounted.resident, whole), Priority.ANSWER)
            try:
                async for event in job:
                    yield event
            except BaseException:
                job.cancel()
                raise
            assert job.result is not None
            await self._after(caller, named, key, entries[: len(parts)], job.result)
            yield {"ok": job.result.report}
        finally:
            for entry in entries:
                entry.users -= 1

    async def _part(
        self, caller: Caller, cube: Cube, before: list[Part], *, kv: bool
    ) -> tuple[Part, Entry[Memory] | None]:
        """One memory of a question: its KV cache where that fits, else its text and the reason."""
        mounted = self._mounted
        why = "not wanted" if not kv else None
        if kv and before and mounted.resident.unplaceable:
            why = f"several cubes cannot be placed: {mounted.resident.unplaceable}"
        root = str(cube.store.root)
        with await mounted.open(caller, cube, "mount") as files:
            if why is None:
                try:
                    rows = await self._choosing.rows(files, caller.uid)
                    part = Part(cube.path, root, None, rows.cache)
                    part.ids, part.storage = rows.ids, rows.storage
                    part.computed, part.chose = rows.computed, rows.chose
                    return part, rows.entry
                except NotFound:
                    why = f"it has no {layout.KV}"
                except MemfsError as e:
                    why = str(e)
                except OSError as e:
                    why = f"{layout.KV}: {e.strerror}"
            text: Text = await mounted.in_io(files.text)
        return Part(cube.path, root, text.text, None, why), None

    async def _after(
        self,
        caller: Caller,
        named: list[Cube],
        key: str | None,
        entries: list[Entry[Memory]],
        done: Answer,
    ) -> None:
        """Keeps what was placed for the next question, has it made exact, has files
        written of what was made again, and announces who was asked."""
        mounted = self._mounted
        if key:
            if done.placed is not None and mounted.residency.peek(key) is None:
                mounted.placed.keep(key, done.placed, done.report["composed"])
            self._joints.soon(key, entries)
        self._making.publish_later(caller, [entry.value for entry in entries])
        for cube, line in zip(named, done.report["cubes"], strict=True):
            mounted.announce("asked", cube, uid=caller.uid, how=line["how"])
