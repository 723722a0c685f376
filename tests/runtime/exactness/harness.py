"""Asks a model the same questions in every way that there is, and compares all logits bit for bit.

What they must be is computed in this process, without memfs's files, caches or daemon: preamble,
text and question one after another from an empty cache. What they are is heard in real daemons
(``listening``): from the text; from a KV cache just made; from the same once more; after another
memory has pushed it out; in a daemon started anew; from a copy in another store. And in float32
they are compared with what transformers' own model gives for the whole in one shot. Used by
``test_contract`` and ``tools/exactness``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from memfs.config import Config
from memfs.runtime.kv.kv_store import ROOM
from memfs.runtime.model.resident import Resident

from ..conftest import Shop, run_all
from .listening import Nursery, Runtime, listen
from .prompts import Case

NEAR = 1e-4
"""How far logits may be from those of one shot, float32."""

FILLER = "filler"
"""A cube as large as the budget."""

REMADE = 4
"""Every how many-th KV cache is made again by the second daemon."""


@dataclass
class Outcome:
    """What came of one way of asking."""

    way: str
    asked: int = 0
    differing: list[str] = field(default_factory=list)
    """The rows of the cases whose logits, or bytes, were not those expected."""
    worst: float | None = None
    """The largest difference, where that may be other than none."""

    def add(self, case: Case, *, same: bool) -> None:
        """One more."""
        self.asked += 1
        if not same:
            self.differing.append("{} + {} rows".format(*case.rows))


@dataclass
class Subject:
    """A model in one dtype."""

    directory: Path
    config: Config
    resident: Resident
    """Of that directory and configuration, in this process."""
    answer: int
    """Tokens of an answer: the logits of each are compared."""


class Uncached(NamedTuple):
    """An answer that was computed from nothing."""

    first: torch.Tensor
    """The logits after the question, float32 [vocabulary]."""
    heard: list[str]
    """The digests of all logits of the answer."""


def run(
    subject: Subject,
    cases: Sequence[Case],
    nursery: Nursery,
    work: Path,
    tell: Callable[[int], None] = lambda _done: None,
) -> list[Outcome]:
    """Asks all in every way; ``work`` is an empty directory, ``tell`` is told how many are done."""
    outcomes: dict[str, Outcome] = {}

    def outcome(way: str) -> Outcome:
        return outcomes.setdefault(way, Outcome(way))

    expected = [uncached(subject, case) for case in cases]
    names = [f"{number:04}" for number in range(len(cases))]
    rows = max(case.rows[0] for case in cases)
    fits = (subject.resident.base + rows + ROOM) * subject.resident.shape.token_bytes
    config = replace(subject.config, budget_bytes=fits)
    shop = _shop(work / "store")

    def asked(way: str, runtime: Runtime, at: Shop, number: int, *, kv: bool = True) -> None:
        runtime.heard()
        report = runtime.client.call(
            "ask",
            cubes=[at.named(names[number])],
            question=cases[number].question,
            max_tokens=subject.answer,
            kv=kv,
        )
        same = runtime.heard() == expected[number].heard
        assert report["cubes"][0]["how"] == ("kv" if kv else "text"), report["cubes"]
        outcome(way).add(cases[number], same=same)

    with nursery.runtime(config) as runtime:
        longest = max(cases, key=lambda case: case.rows[0])
        runtime.client.call("encode", **shop.cube(FILLER, longest.text))
        for number, case in enumerate(cases):
            cube = shop.cube(names[number], case.text)
            asked("text", runtime, shop, number, kv=False)
            runtime.client.call("encode", **cube)
            asked("file", runtime, shop, number)
            asked("in place", runtime, shop, number)
            runtime.client.call("mount", **shop.named(FILLER))
            _require_gone(runtime, names[number])
            asked("evicted", runtime, shop, number)
            tell(number + 1)

    copy = _shop(work / "copy")
    for name in names:
        shutil.copytree(shop.root / name, copy.root / name)
    with nursery.runtime(config) as runtime:
        for number, case in enumerate(cases):
            asked("restarted", runtime, shop, number)
            asked("copied", runtime, copy, number)
            if number % REMADE == 0:
                before = shop.digest(names[number])
                runtime.client.call("encode", **shop.named(names[number]), force=True)
                outcome("made again").add(case, same=shop.digest(names[number]) == before)

    if subject.config.dtype == "float32":
        _one_shot(subject, cases, expected, outcome("one shot"))
    return list(outcomes.values())


def uncached(subject: Subject, case: Case) -> Uncached:
    """What nothing but the model gives: no file, no daemon, no row that was there before."""
    prompt, engine = subject.resident.prompt, subject.resident.engine
    cache = engine.new_cache(subject.resident.base + sum(case.rows) + subject.answer)
    with _heard(subject.resident) as heard:
        engine.forward(cache, prompt.preamble, logits=False)
        run_all(engine.prefill(cache, prompt.memory(case.text)))
        question = prompt.question(case.question, bare=False)
        first = run_all(engine.prefill(cache, question, logits=True))
        list(engine.decode(cache, first, subject.resident.stop, subject.answer))
    return Uncached(first, heard)


@contextlib.contextmanager
def _heard(resident: Resident) -> Iterator[list[str]]:
    """The digests of all logits that a model in this process gives meanwhile."""
    heard: list[str] = []
    handle = listen(resident, heard.extend)
    try:
        yield heard
    finally:
        handle.remove()


def _one_shot(
    subject: Subject, cases: Sequence[Case], expected: Sequence[Uncached], outcome: Outcome
) -> None:
    """Compares with transformers' own model, its own attention and no cache."""
    prompt = subject.resident.prompt
    own = AutoModelForCausalLM.from_pretrained(subject.directory, dtype=torch.float32).eval()
    outcome.worst = 0.0
    for case, found in zip(cases, expected, strict=True):
        question = prompt.question(case.question, bare=False)
        ids = torch.tensor([[*prompt.preamble, *prompt.memory(case.text), *question]])
        with torch.inference_mode():
            logits = own(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        difference = float((found.first - logits).abs().max())
        outcome.worst = max(outcome.worst, difference)
        outcome.add(case, same=difference < NEAR)


def _shop(root: Path) -> Shop:
    root.mkdir()
    return Shop(root)


def _require_gone(runtime: Runtime, name: str) -> None:
    mounted = {line["cube"] for line in runtime.client.call("status")["mounted"]}
    if name in mounted:
        raise AssertionError(f"{name} was not evicted: {mounted}")
