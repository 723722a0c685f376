"""Answering a question from memories: as KV caches where they are mounted, as text where not.

``answer`` is a job of the model's thread (``worker``): it yields the pieces of the answer as they
come, the first with the time to first token, and returns the report that ``memfs ask --json``
prints. Its prompt is computed alone, so the first token has the same bits whoever else is answered;
the tokens after it are taken together with those of others.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tokenizers.decoders import DecodeStream

from memfs.errors import TooLong
from memfs.runtime.asking.composition import place, refine
from memfs.runtime.asking.policy import Policy
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident
from memfs.runtime.model.steps import Step

Event = dict[str, Any]
Steps = Generator[Event | Step | None, Any, "Answer"]
R = TypeVar("R")


@dataclass
class Part:
    """One memory of a question."""

    path: str
    store: str
    text: str | None
    """To be prefilled; None where there is a cache."""
    cache: KVCache | None
    """[preamble | this cube]; it is only read."""
    why: str | None = None
    """Why it is text, where a KV cache was wanted."""
    computed: int = 0
    """Rows of the cache that were computed for this very question."""
    chose: dict[str, Any] | None = None
    """How the cache came to be there (``mounting.choosing``)."""
    tokens: int = 0
    ids: Sequence[int] = ()
    """Of the cache's rows; of the text, once it has been tokenized."""
    storage: str | None = None
    """How the file is stored that the cache came from."""

    @property
    def how(self) -> str:
        """``kv`` or ``text``."""
        return "kv" if self.cache is not None else "text"


@dataclass
class Question:
    """What is to be answered."""

    text: str
    parts: list[Part]
    limit: int
    """Tokens of the answer, at most."""
    asked_at: float
    """``time.perf_counter()`` when the request came in: where the time to first token starts."""
    drop_oldest: bool = False
    """Whether memories that do not fit the context are left out, the oldest first."""
    policy: Policy = field(default_factory=Policy)
    """Of what is computed again where several caches are placed."""
    lent: KVCache | None = None
    """All parts in one cache, to be answered in: nobody else is writing into its room."""
    lent_as: str | None = None
    """How several parts came into it: by a policy, or ``exact``."""


@dataclass
class Answer:
    """A report, and what is worth keeping."""

    report: dict[str, Any]
    placed: KVCache | None
    """The parts placed one after another, where that was done for this question."""


@dataclass
class _Memory:
    """What a question is put behind."""

    cache: KVCache
    cached: int = 0
    """Rows of it that came from KV caches."""
    recomputed: int = 0
    """Those of them that were computed again since."""
    composed: str | None = None
    """How several caches were put together; None where there are not several."""
    placed: KVCache | None = None
    """It again, if worth keeping."""


def answer(resident: Resident, question: Question) -> Steps:
    """Answers. Raises TooLong where memory, question and answer do not fit the context."""
    parts, ids = _fitting(resident, question)
    memory = yield from _memory(resident, question, parts, len(ids))
    cache = memory.cache
    logits = yield from _quietly(resident.engine.prefill(cache, ids, logits=True))
    assert logits is not None
    prompt_tokens = cache.length
    limit = min(question.limit, resident.context - prompt_tokens, cache.room + 1)
    decoded = yield from _decode(resident, cache, logits, limit, question.asked_at)
    report = {
        **decoded,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": memory.cached - sum(part.computed for part in parts),
        "recomputed_tokens": memory.recomputed,
        "composed": memory.composed,
        "cubes": [_line(part) for part in question.parts],
    }
    return Answer(report, memory.placed)


def _line(part: Part) -> dict[str, Any]:
    """What the report says of a memory."""
    names = ("path", "store", "how", "why", "tokens", "storage", "chose")
    return {name: getattr(part, name) for name in names}


def _fitting(resident: Resident, question: Question) -> tuple[list[Part], list[int]]:
    """The parts that go into the context, and the ids of the question."""
    ids = resident.prompt.question(question.text, bare=not question.parts)
    base = resident.base if question.parts else 0
    for part in question.parts:
        if part.cache is not None:
            part.tokens = part.cache.length - resident.base
        else:
            part.ids = resident.prompt.memory(part.text or "", resident.context)
            part.tokens = len(part.ids)
    parts = list(question.parts)
    room = resident.context - base - len(ids) - 1
    while sum(part.tokens for part in parts) > room:
        if not question.drop_oldest or not parts:
            total = base + sum(part.tokens for part in parts) + len(ids)
            raise TooLong(f"{total} tokens with the question, of {resident.context}")
        left = parts.pop(0)
        left.cache, left.why = None, "left out: the mounted memories are longer than the context"
        left.tokens, left.storage, left.chose = 0, None, None
    if not parts:
        ids = resident.prompt.question(question.text, bare=True)
    return parts, ids


def _memory(
    resident: Resident, question: Question, parts: list[Part], asked: int
) -> Generator[None, None, _Memory]:
    """The parts in one cache, with room for a question of ``asked`` tokens and the answer."""
    needed = asked + question.limit
    whole = question.lent
    if whole is not None and parts == question.parts:
        enough = whole.room >= needed
        cache = whole.borrowed() if enough else whole.resized(whole.length + needed)
        return _Memory(cache, cache.length, composed=question.lent_as)
    rows = sum(part.tokens for part in parts)
    memory = _Memory(resident.engine.new_cache(resident.base + rows + needed))
    if not parts:
        return memory
    cache = memory.cache
    cache.append(resident.preamble)
    memory.cached = resident.base
    for part in parts:
        if part.cache is None:
            yield from _quietly(resident.engine.prefill(cache, part.ids))
            continue
        if resident.inv_freq is None or part is parts[0]:
            cache.append(part.cache, resident.base)
        else:
            place(cache, part.cache, resident.base, resident.inv_freq)
            memory.composed = str(Policy())
        memory.cached += part.tokens
    if len(parts) > 1 and all(part.cache is not None for part in parts):
        if resident.packs:
            cubes = [part.ids for part in parts]
            steps = refine(resident, cache, cubes, question.policy)
            memory.recomputed = yield from _quietly(steps)
            memory.composed = str(question.policy)
        if parts == question.parts:
            memory.placed = cache.borrowed()
    return memory


def _decode(
    resident: Resident, cache: KVCache, logits: torch.Tensor, limit: int, asked_at: float
) -> Generator[Event | Step, Any, Event]:
    """Yields the answer's text piece by piece; returns what was measured.

    Greedy: ends before a token in ``Resident.stop``, or after ``limit`` tokens.
    """
    tokenizer = resident.prompt.tokenizer.backend_tokenizer
    pieces = DecodeStream(skip_special_tokens=True)
    text, count, began, ttft = "", 0, time.perf_counter(), None
    while (token := int(logits.argmax())) not in resident.stop:
        if ttft is None:
            began = time.perf_counter()
            ttft = began - asked_at
            yield {"event": "first", "ttft_s": ttft}
        count += 1
        piece = pieces.step(tokenizer, token) or ""
        text += piece
        yield {"event": "text", "text": piece}
        if count >= limit:
            break
        logits = yield Step(resident, cache, token)
    now = time.perf_counter()
    return {
        "answer": text,
        "ttft_s": now - asked_at if ttft is None else ttft,
        "tokens": count,
        "tokens_per_s": (count - 1) / (now - began) if count > 1 else None,
        "total_s": now - asked_at,
        "stopped": "length" if count >= limit else "end",
    }


def _quietly(steps: Generator[Any, None, R]) -> Generator[None, None, R]:
    """Runs what computes in chunks, giving the thread back after each, without its progress."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            found: R = stop.value
            return found
        yield
