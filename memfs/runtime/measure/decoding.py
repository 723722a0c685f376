"""The time of a token behind a mounted memory, and behind the same text as a prompt.

Used by ``memfs bench decode``. Runs in the process that asks, over a model loaded there.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from memfs.config import Config
from memfs.errors import TooLong
from memfs.runtime.kv import kv_store
from memfs.runtime.measure.spread import spread
from memfs.runtime.model import attention
from memfs.runtime.model.engine import Engine
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident, load

Facts = dict[str, Any]

ANSWER = 33
"""Tokens of each answer: the time between two of them is measured 32 times."""


def token_times(
    directory: Path, config: Config, lengths: list[int], runs: int, say: Callable[[str], None]
) -> list[Facts]:
    """One line for each length of the memory, the three arms side by side in each run.

    Each run makes the cache of each arm anew, from its KV file or by a prefill, and takes the
    median time of a token of its answer.
    """
    resident = load(directory, config)
    lines = []
    for length in lengths:
        times: dict[str, list[float]] = {"mounted": [], "prompt": [], "generate": []}
        for run in range(runs + 1):  # the first warms up and is not counted
            say(f"{length} tokens: run {run} of {runs}")
            for arm, seconds in _run(resident, length).items():
                times[arm] += [seconds] if run else []
        line: Facts = {"tokens": length}
        line |= {f"{arm}_s": spread(seconds) for arm, seconds in times.items()}
        for other in ("prompt", "generate"):
            pairs = zip(times["mounted"], times[other], strict=True)
            line[f"share_{other}"] = spread([mine / theirs for mine, theirs in pairs])
        lines.append(line)
    return lines


def _run(resident: Resident, length: int) -> dict[str, float]:
    """Median seconds of a token in each arm."""
    engine = resident.engine
    memory = [token % 1000 + 100 for token in range(length)]  # what they are does not matter
    question = resident.prompt.question("What did the keeper write?", bare=False)
    if resident.base + length + len(question) + ANSWER > resident.context:
        raise TooLong(f"{length} tokens with a question and an answer, of {resident.context}")
    prompt = engine.new_cache(resident.base + length + len(question) + ANSWER)
    prompt.append(resident.preamble)
    deque(engine.prefill(prompt, memory), maxlen=0)
    with tempfile.TemporaryFile() as file:
        kv_store.write(file.fileno(), prompt, resident, memory, "0" * 64)
        mounted, _ = kv_store.read(file.fileno(), resident, None)
    whole = [*resident.prompt.preamble, *memory, *question]
    return {
        "mounted": _ours(engine, mounted, question),
        "prompt": _ours(engine, prompt, question),
        "generate": _theirs(engine.model, whole),
    }


def _ours(engine: Engine, cache: KVCache, question: list[int]) -> float:
    logits = engine.forward(cache, question)
    assert logits is not None
    times = [time.perf_counter() for _ in engine.decode(cache, logits, frozenset(), ANSWER)]
    return _between(times)


def _theirs(model: PreTrainedModel, ids: list[int]) -> float:
    clock = _Clock()
    model.set_attn_implementation("sdpa")
    try:
        model.generate(  # type: ignore[operator]  # its stub says it is a tensor
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            do_sample=False,
            min_new_tokens=ANSWER,
            max_new_tokens=ANSWER,
            streamer=clock,
        )
    finally:
        model.set_attn_implementation(attention.NAME)
    return _between(clock.times[1:])  # the first is told of the prompt


class _Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  when is all that is wanted
        """Called by generate for the prompt, and for each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate at the end."""


def _between(times: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(times))
