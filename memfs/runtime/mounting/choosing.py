"""How the rows of a cube come into the model for a question: the way that takes least.

They are there already; or they are loaded from the cube's file; or, where that takes longer than
computing them, prefilled from its text. A file that does not fit the text or the model is made
again: what is unchanged of an earlier one of this model's is kept, the rest is prefilled. Whichever
it is, rows of exact storage are the same bits, so no answer depends on it. Used by the asks, in the
service's event loop.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from memfs.errors import KVCorrupt, KVForeign, KVStale, OverBudget
from memfs.runtime.cubes import Files, Text
from memfs.runtime.kv import cube_kv, kv_store
from memfs.runtime.kv.encoding import Encoded
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.mounting.making import Making
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.rates import Choice, Rates, Stored
from memfs.runtime.mounting.residency import Entry
from memfs.runtime.worker import Priority


@dataclass
class Rows:
    """A cube's rows, and how they came."""

    cache: KVCache
    """[preamble | cube]; it is only read."""
    ids: Sequence[int]
    storage: str | None
    """How they are stored in the file that they came from, or are to be the same as."""
    entry: Entry[Memory] | None
    """None where there is no room to keep them."""
    computed: int = 0
    """How many were computed for this question."""
    chose: dict[str, Any] = field(default_factory=dict)
    """For the report: ``way`` (resident, file, prefill, made again), ``why``, and estimates."""


class Choosing:
    """Brings cubes into a mounted set for questions."""

    def __init__(self, mounted: Mounted, making: Making, rates: Rates) -> None:
        self._mounted = mounted
        self._making = making
        self._rates = rates

    async def rows(self, files: Files, uid: int) -> Rows:
        """The rows of a cube that has a KV cache, whether that fits or not.

        Raises:
            NotFound: it has none.
            NotAllowed: they may not read it.
            TooLong, OverBudget: the text has to do.
        """
        mounted = self._mounted
        with mounted.refusing(files.cube, uid):
            async with mounted.only_one(files, uid) as entry:
                if entry is not None:
                    rows = _had(entry, {"way": "resident", "why": None})
                else:
                    rows = await self._bring(files, uid)
                mounted.residency.use(files.cube.key)
                return rows

    async def _bring(self, files: Files, uid: int) -> Rows:
        mounted, in_io = self._mounted, self._mounted.in_io
        resident = mounted.resident
        fd, _ = await in_io(files.open_kv)
        text: Text = await in_io(files.text)
        try:
            header = await in_io(kv_store.fit, fd, resident, text.sha256)
            file = await in_io(Stored.of, fd)
            choice = self._rates.choose(
                file, resident.base, header.tokens, exact=header.storage == "exact"
            )
            if choice.load:
                began = time.perf_counter()
                entry = await mounted.read(files, uid, text)
                self._rates.loaded(file, time.perf_counter() - began)
                return _had(entry, _told("file", choice))
        except (KVCorrupt, KVForeign, KVStale) as e:
            mounted.refuse(files.cube, uid, e)
            earlier = None
            if isinstance(e, KVStale):
                earlier = await in_io(cube_kv.earlier_in, fd, resident)
            made = await self._making.prefill(text, earlier, Priority.ANSWER)
            told = {"way": "made again", "why": str(e), "kept_tokens": made.kept}
            return await self._kept(files, uid, text, made, told, published=False)
        made = await self._making.prefill(text, None, Priority.ANSWER)
        return await self._kept(files, uid, text, made, _told("prefill", choice), published=True)

    async def _kept(
        self,
        files: Files,
        uid: int,
        text: Text,
        made: Encoded,
        told: dict[str, Any],
        *,
        published: bool,
    ) -> Rows:
        """Keeps what was prefilled as if it had been loaded, where there is room."""
        entry = None
        with contextlib.suppress(OverBudget):  # an answer does not fail because it cannot be kept
            entry = await self._mounted.add(files, uid, text, made, published=published)
        return Rows(made.cache, made.ids, "exact", entry, len(made.ids) - made.kept, told)


def _had(entry: Entry[Memory], told: dict[str, Any]) -> Rows:
    memory = entry.value
    return Rows(memory.cache, memory.ids, memory.storage, entry, 0, told)


def _told(way: str, choice: Choice) -> dict[str, Any]:
    return {"way": way, **{k: v for k, v in asdict(choice).items() if k != "load"}}
