"""What int8 storage costs and saves: bytes, seconds, and how near the answers stay.

Used by ``memfs bench int8``, in the process that asks, over a model loaded there. The reference is
the greedy answer from the exact KV cache; its tokens are given, one by one, to the same model over
each other cache (teacher forcing), and the next token's probabilities compared at every step.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from memfs.config import Config
from memfs.cube.fingerprint import STORAGES
from memfs.runtime.kv import kv_store
from memfs.runtime.kv.encoding import Encoded, prefill
from memfs.runtime.measure.documents import documents
from memfs.runtime.measure.spread import spread
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident, load
from memfs.runtime.model.spare import MOST, spare

Facts = dict[str, Any]
Say = Callable[[str], None]
R = TypeVar("R")

ANSWER = 48
"""Tokens of an answer, at most."""
OTHER_CHUNKS = "exact, other chunks"
"""The arm that shows what rounding alone does: no storage, the text prefilled in half the chunk."""


@dataclass
class _Arm:
    """What was found of one cache beside the exact one."""

    divergences: list[torch.Tensor] = field(default_factory=list)
    """KL divergence in nats at every step, of one answer each."""
    same: list[torch.Tensor] = field(default_factory=list)
    """Whether the likeliest token is the same, likewise."""

    def line(self, name: str) -> Facts:
        divergences, same = torch.cat(self.divergences), torch.cat(self.same)
        return {
            "arm": name,
            "answers": len(self.same),
            "steps": len(same),
            "mean_kl": float(divergences.mean()),
            "largest_kl": float(divergences.max()),
            "share_same_tokens": float(same.double().mean()),
            "share_same_answers": sum(bool(s.all()) for s in self.same) / len(self.same),
        }


def compare(directory: Path, config: Config, count: int, say: Say) -> tuple[Resident, list[Facts]]:
    """How near the answers stay, over ``count`` invented documents and the questions to them.

    Returns:
        The model, and a line an arm: mean and largest KL divergence (exact from the arm, in nats),
        the share of steps with the same likeliest token, and of answers where all of them are: it
        is these that a greedy answer from that cache repeats word for word.
    """
    resident = load(directory, config)
    arms = {"int8": _Arm(), OTHER_CHUNKS: _Arm()}
    for number, document in enumerate(documents(count), 1):
        say(f"document {number} of {count}")
        made = _returned(prefill(resident, document.text, None))
        with _file(resident, made.cache, made.ids, "int8") as fd:
            stored, _ = kv_store.read(fd, resident, None)
        caches = {"int8": stored, OTHER_CHUNKS: _in_other_chunks(resident, made)}
        for question in document.questions:
            ids = resident.prompt.question(question, bare=False)
            tokens, expected = _answer(resident, made.cache.borrowed(), ids, None)
            for name, cache in caches.items():
                _, found = _answer(resident, cache.borrowed(), ids, tokens)
                arms[name].divergences.append(_divergence(expected, found))
                arms[name].same.append(expected.argmax(-1) == found.argmax(-1))
    return resident, [arm.line(name) for name, arm in arms.items()]


def mount_seconds(resident: Resident, tokens: Sequence[int], runs: int, say: Say) -> list[Facts]:
    """Files of either storage from the page cache into the model, in turns.

    Returns:
        A line for each number of tokens: bytes of both files, their ratio, seconds of both.
    """
    lines = []
    for count in tokens:
        say(f"mounting {count} tokens")
        cache = resident.engine.new_cache(resident.base + count)
        for layer in cache.layers:
            layer.normal_()  # neither reading nor checking depends on what they are
        cache.length = cache.capacity
        ids, sizes = [7] * count, dict.fromkeys(STORAGES, 0)
        seconds: dict[str, list[float]] = {storage: [] for storage in STORAGES}
        for _ in range(runs + 1):  # the first warms up and is not counted
            for storage in STORAGES:
                with _file(resident, cache, ids, storage) as fd:
                    sizes[storage] = kv_store.fit(fd, resident, None).kv_bytes
                    seconds[storage].append(_mounted_in(resident, fd))
        lines.append(
            {
                "tokens": count,
                **{f"{storage}_bytes": sizes[storage] for storage in STORAGES},
                "share_of_bytes": sizes["int8"] / sizes["exact"],
                **{f"{storage}_s": spread(seconds[storage][1:]) for storage in STORAGES},
            }
        )
    return lines


def _mounted_in(resident: Resident, fd: int) -> float:
    """Seconds that reading a file takes, into memory made ready before as the daemon has it."""
    device = resident.shape.device
    if device.type == "cpu":
        deque(spare.prepare(MOST), maxlen=0)
    began = time.perf_counter()
    kv_store.read(fd, resident, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _file(resident: Resident, cache: KVCache, ids: list[int], storage: str) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        kv_store.write(file.fileno(), cache, resident, ids, "0" * 64, storage)
        yield file.fileno()


def _in_other_chunks(resident: Resident, made: Encoded) -> KVCache:
    cache = resident.engine.new_cache(made.cache.capacity)
    cache.append(resident.preamble)
    step = PREFILL_CHUNK // 2
    for start in range(0, len(made.ids), step):
        resident.engine.forward(cache, made.ids[start : start + step], logits=False)
    return cache


def _answer(
    resident: Resident, cache: KVCache, ids: list[int], given: list[int] | None
) -> tuple[list[int], torch.Tensor]:
    """The tokens of an answer and the logits at every step, [steps, vocabulary].

    Args:
        cache: a memory; it is written behind.
        given: the tokens to go on with at each step; None for the likeliest.
    """
    logits = _returned(resident.engine.prefill(cache, ids, logits=True))
    steps, tokens = [], []
    for step in range(ANSWER if given is None else len(given)):
        assert logits is not None
        steps.append(logits)
        tokens.append(int(logits.argmax()) if given is None else given[step])
        if tokens[-1] in resident.stop:
            break
        logits = resident.engine.forward(cache, tokens[-1:])
    return tokens, torch.stack(steps)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL divergence at every step, in nats."""
    exact, other = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1)


def _returned(steps: Generator[Any, None, R]) -> R:
    """What a job returns, run to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            returned: R = stop.value
            return returned
