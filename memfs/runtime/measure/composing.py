"""How close answers from cubes that were put together come to the full prefill, and at what cost.

Used by ``memfs bench compose``, in the process that asks, over a model loaded there: nothing of a
running daemon is touched.
"""

from __future__ import annotations

import random
import re
import statistics
import time
import tomllib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from memfs.config import Config
from memfs.runtime.asking.composition import LOOK_AT, place, refine
from memfs.runtime.asking.joint import joint
from memfs.runtime.asking.policy import Policy
from memfs.runtime.kv.encoding import Encoded, prefill
from memfs.runtime.measure.spread import spread
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident, load

ANSWER = 24
"""Tokens of an answer, at most."""
ROOM = 128
"""Rows for a question and its answer."""
FULL = "full prefill"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question about one of the documents."""

    text: str
    expected: list[str]

    def right(self, answer: str) -> bool:
        """Whether one of what is expected stands in an answer, as a word or words."""
        return any(
            re.search(rf"\b{re.escape(words)}('?s)?\b", answer, re.IGNORECASE)
            for words in self.expected
        )


@dataclass
class Document:
    """An invented text and what is asked about it, and its own KV cache."""

    encoded: Encoded
    asked: list[Asked]


@dataclass
class _Arm:
    """What was measured of one way, over all questions at one number of cubes."""

    right: int = 0
    kl: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Times less than the full prefill beside it."""
    share: list[float] = field(default_factory=list)


def compositions(
    directory: Path,
    config: Config,
    counts: Sequence[int],
    policies: Sequence[Policy],
    questions: int,
    runs: int,
    say: Callable[[str], None],
) -> list[Facts]:
    """Every policy beside the full prefill, at each number of cubes.

    All documents are taken, in an order that is mixed anew for each number, so many at a time. Each
    set is put together ``runs`` times in every way, in turn, and then asked all its questions.

    Args:
        counts: of cubes.
        questions: about each document, at most.

    Returns:
        One line for each number of cubes and way: answers that were right; the mean over the
        questions of the mean over the reference answer's tokens of KL(full prefill || this way), in
        nats; the rows computed times layers, as a share of the full prefill's; CPU seconds, and how
        many times less that is.
    """
    resident = load(directory, config)
    say("encoding the documents")
    documents = _documents(resident, questions)
    lines = []
    for count in counts:
        order = random.Random(count).sample(documents, len(documents))
        sets = [order[i : i + count] for i in range(0, len(order), count)]
        arms = {name: _Arm() for name in (FULL, *map(str, policies))}
        for number, documents_of_set in enumerate(sets, 1):
            doing = f"{count} cubes, set {number} of {len(sets)}"
            say(f"{doing}: putting together")
            ways = [_put_together(resident, documents_of_set, policies, arms) for _ in range(runs)]
            asked = [one for document in documents_of_set for one in document.asked]
            for at, question in enumerate(asked, 1):
                say(f"{doing}: question {at} of {len(asked)}")
                _ask(resident, ways[-1], question, arms)
        total = sum(len(document.asked) for document in documents)
        lines += [_line(count, name, arm, total) for name, arm in arms.items()]
    return lines


def _documents(resident: Resident, questions: int) -> list[Document]:
    """The documents that come with memfs, encoded."""
    text = files(__package__).joinpath("documents.toml").read_text()
    return [
        Document(
            _result(prefill(resident, found["text"].strip(), None)),
            [Asked(q["ask"], q["expected"]) for q in found["questions"][:questions]],
        )
        for found in tomllib.loads(text)["document"]
    ]


def _put_together(
    resident: Resident, documents: list[Document], policies: Sequence[Policy], arms: dict[str, _Arm]
) -> dict[str, KVCache]:
    """A cache for each way, the time and the rows of each recorded."""
    ids = [document.encoded.ids for document in documents]
    total = sum(map(len, ids))
    capacity = resident.base + total + ROOM
    began = time.process_time()
    made = {FULL: _result(joint(resident, ids, capacity))}
    full = time.process_time() - began
    _record(arms[FULL], full, full, 1.0)
    for policy in policies:
        began = time.process_time()
        cache = resident.engine.new_cache(capacity)
        cache.append(resident.preamble)
        assert resident.inv_freq is not None
        for document in documents:
            place(cache, document.encoded.cache, resident.base, resident.inv_freq)
        computed = _result(refine(resident, cache, ids, policy)) * resident.shape.layers
        seconds = time.process_time() - began
        if policy.blend:
            computed += (total - len(ids[0])) * LOOK_AT
        _record(arms[str(policy)], seconds, full, computed / (total * resident.shape.layers))
        made[str(policy)] = cache
    return made


def _record(arm: _Arm, seconds: float, full: float, share: float) -> None:
    arm.seconds.append(seconds)
    arm.times.append(full / seconds)
    arm.share.append(share)


def _ask(
    resident: Resident, ways: dict[str, KVCache], question: Asked, arms: dict[str, _Arm]
) -> None:
    """Asks once in every way, and compares with the full prefill's answer, token by token."""
    ids = resident.prompt.question(question.text, bare=False)
    tokens: list[int] = []
    expected = torch.empty(0)
    for name, cache in ways.items():
        answer = _answer(resident, cache, ids)
        arms[name].right += question.right(str(resident.prompt.tokenizer.decode(answer)))
        if name == FULL:
            tokens = answer
        if not tokens:
            continue
        rows = [*ids, *tokens[:-1]]
        scores = resident.engine.scores(cache.borrowed(), rows, len(tokens)).log_softmax(-1)
        if name == FULL:
            expected = scores
        divergence = (expected.exp() * (expected - scores)).sum(-1)
        arms[name].kl.append(float(divergence.mean()))


def _answer(resident: Resident, cache: KVCache, ids: list[int]) -> list[int]:
    """The greedy answer."""
    behind = cache.borrowed()
    logits = _result(resident.engine.prefill(behind, ids, logits=True))
    assert logits is not None
    return list(resident.engine.decode(behind, logits, resident.stop, ANSWER))


def _line(count: int, name: str, arm: _Arm, total: int) -> Facts:
    return {
        "cubes": count,
        "way": name,
        "right": f"{arm.right} of {total}",
        "kl": statistics.mean(arm.kl),
        "share_of_rows": statistics.mean(arm.share),
        "cpu_s": spread(arm.seconds),
        "times_less": spread(arm.times),
    }


def _result(steps: Generator[Any, None, Any]) -> Any:
    """What a job of the model's thread returns, run to its end here."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
