"""Damages a cube's KV cache in every way there is, under a real runtime that is asked to mount it.

Each damaged file is put into its place in one of the ways that files change, and the runtime is
asked for it: it has to refuse, to name what is wrong, and to live on. Used by the tests here and
by ``tools/mutations``.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from memfs.config import Config
from memfs.errors import Refused
from memfs.runtime.client import RuntimeClient, log_path
from tests.runtime.conftest import Shop, ask, daemon, how, prose

from .mutate import KINDS, Whole

RISE = 64 << 20
"""How much more memory the runtime may ever have had than at the beginning."""
CUT_WHILE_READ, SWAPPED = "cut while read", "swapped"


class Violation(AssertionError):
    """Something was promised and not kept."""


class Campaign:
    """One runtime, one cube, and what is done to its KV cache."""

    def __init__(self, client: RuntimeClient, shop: Shop, seed: int) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.too_late = 0
        """Files that were cut when they had been read already; they are in no other count."""
        self._client = client
        self._shop = shop
        self._chance = random.Random(seed)
        self._cube = shop.cube("law", prose(1500))
        client.call("encode", **self._cube)
        self._whole = Whole.of(shop.kv("law").read_bytes())
        self._others = [shop.cube(f"other{n}", prose(1500, n)) for n in (1, 2)]
        for other in self._others:
            client.call("encode", **other)
        client.call("mount", **self._cube)
        self._answer = ask(client, [self._cube])["answer"]
        client.call("unmount")
        self._pid = client.call("status")["pid"]
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # its peak begins anew
        self.before = self._memory("VmRSS")

    @property
    def count(self) -> int:
        """Damaged files so far."""
        return self.kinds.total()

    @property
    def rise(self) -> int:
        """How much more memory the runtime has had than at the beginning, at most."""
        return self._memory("VmHWM") - self.before

    def run(self, count: int) -> None:
        """Damages ``count`` files, each kind about as often as the others. Raises Violation."""
        kinds = [*KINDS, CUT_WHILE_READ, SWAPPED]
        while self.count < count:
            kind = kinds[self.count % len(kinds)]
            if kind == SWAPPED:
                self._swap()
            elif kind == CUT_WHILE_READ:
                self._cut_while_read()
            else:
                self._damage(kind)
            self._require_alive()

    def finish(self) -> None:
        """The whole file, put back, is mounted and answers as it did. Raises Violation."""
        self._put(self._whole.data)
        self._client.call("mount", **self._cube)
        report = ask(self._client, [self._cube])
        if how(report) != ["kv"] or report["answer"] != self._answer:
            raise Violation(f"the whole file is not what it was: {report}")
        if self.rise >= RISE:
            raise Violation(f"the runtime's memory rose by {self.rise} bytes")

    def summary(self) -> Iterator[str]:
        """Lines that say what was done, and what came of it."""
        yield f"{self.count} damaged files: 0 crashes, 0 mounted, "
        yield f"memory rose by {self.rise >> 20} MiB"
        yield f"{self.too_late} more were cut when they had been read, and dropped at the next use"
        for counted in (self.kinds, self.reasons):
            yield ""
            for what, number in counted.most_common():
                yield f"{number:8} {what}"

    def _damage(self, kind: str) -> None:
        while True:  # some changes change nothing
            data, named = KINDS[kind](self._chance, self._whole)
            if data != self._whole.data:
                break
        self._put(data)
        self._require_refused(kind, named)

    def _swap(self) -> None:
        """Another cube's KV cache, moved or copied here."""
        other = self._shop.kv(self._chance.choice(self._others)["path"])
        moved = other.with_name("moved")
        shutil.copy(other, moved)
        moved.replace(self._shop.kv("law"))
        self._require_refused(SWAPPED, "payload_sha256")

    def _cut_while_read(self) -> None:
        """Cut at some instant while it is being mounted; it may be too late for that."""
        self._put(self._whole.data)
        kv, at = self._shop.kv("law"), self._chance.randrange(len(self._whole.data))
        after = self._chance.uniform(0, 0.004)

        def cut() -> None:
            time.sleep(after)
            os.truncate(kv, at)

        cutting = threading.Thread(target=cut)
        cutting.start()
        try:
            self._client.call("mount", timeout=60, **self._cube)
        except Refused:
            cutting.join()
            self._require_refused(CUT_WHILE_READ, "bytes long|ends within|header")
        else:
            cutting.join()
            self.too_late += 1
            self._client.call("changed", **self._cube)
            if self._client.call("unmount")["unmounted"] != ["law"]:
                raise Violation("it was mounted, and was not in the session")

    def _put(self, data: bytes) -> None:
        """In one of the ways that files change: in place, or another in its place."""
        kv = self._shop.kv("law")
        if self._chance.random() < 0.5 and kv.exists():
            kv.write_bytes(data)
        else:
            beside = kv.with_name("beside")
            beside.write_bytes(data)
            beside.replace(kv)

    def _require_refused(self, kind: str, named: str) -> None:
        try:
            self._client.call("mount", timeout=60, **self._cube)
        except Refused as e:
            why = str(e)
        else:
            raise Violation(f"{kind}: it was mounted")
        if not re.search(named, why):
            raise Violation(f"{kind}: the reason does not name {named}: {why}")
        if not why.isprintable():
            raise Violation(f"{kind}: {why!r} would do something to a terminal")
        self.kinds[kind] += 1
        self.reasons[re.sub(r"'[^']*'|\S*\d\S*|\S*…\S*", "…", why)[:100]] += 1

    def _require_alive(self) -> None:
        status = self._client.call("status")
        if status["pid"] != self._pid:
            raise Violation("the runtime is another process")
        there = [line["cube"] for line in status["mounted"]]
        if there:
            raise Violation(f"mounted: {there}")

    def _memory(self, what: str) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        found = re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)
        assert found
        return int(found[1]) << 10


@contextlib.contextmanager
def campaign(root: Path, config: Config, seed: int) -> Iterator[Campaign]:
    """A campaign, and at its end what it promises: 0 crashes, 0 mounted, little memory."""
    root.mkdir(exist_ok=True)
    with daemon(config) as client:
        running = Campaign(client, Shop(root), seed)
        try:
            yield running
            running.finish()
        except Exception as e:
            e.add_note(log_path(config).read_text()[-4000:])
            raise
    log = log_path(config).read_text()
    if "Traceback" in log:
        raise Violation(log[-4000:])
