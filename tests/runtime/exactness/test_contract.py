"""What is said with a KV cache mounted is what is said with the text, bit for bit, whatever became
of the cache meanwhile. 200 prompts; ``tools/exactness`` asks more of the default model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memfs.config import Config
from memfs.runtime.kv import kv_store
from memfs.runtime.model.resident import Resident

from ..conftest import Shop, ask, how
from .harness import Subject, run, uncached
from .listening import Nursery
from .prompts import EDGES, LONGEST_QUESTION, LONGEST_TEXT, cases

TINY = {"text": LONGEST_TEXT, "question": LONGEST_QUESTION}
SHORT = {"text": 65, "question": 33}
SHARES = [
    ("default_model_dir", "float32", 12, SHORT),
    ("default_model_dir", "bfloat16", 12, SHORT),
    ("tiny_model_dir", "float32", 44, TINY),
    ("tiny_model_dir", "bfloat16", 44, TINY),
    ("tiny_qwen_dir", "float32", 44, TINY),
    ("tiny_qwen_dir", "bfloat16", 44, TINY),
]
"""Model, dtype, prompts, and the rows of the longest."""

WAYS = {"text", "file", "in place", "evicted", "restarted", "copied", "made again"}


@pytest.fixture
def subject(request: pytest.FixtureRequest, load_model: Callable[[Path, str], Resident]) -> Subject:
    model, dtype = request.param
    directory = request.getfixturevalue(model)
    config = Config(str(directory), device="cpu", dtype=dtype, threads=1)
    answer = 2 if model == "default_model_dir" else 4
    return Subject(directory, config, load_model(directory, dtype), answer)


def test_there_are_two_hundred_prompts_and_two_architectures() -> None:
    assert sum(count for _, _, count, _ in SHARES) == 200
    assert {model for model, _, _, _ in SHARES} >= {"default_model_dir", "tiny_qwen_dir"}


@pytest.mark.parametrize(
    ("subject", "count", "longest"),
    [((model, dtype), count, longest) for model, dtype, count, longest in SHARES],
    indirect=["subject"],
    ids=[f"{model}-{dtype}" for model, dtype, _, _ in SHARES],
)
def test_the_logits_are_bit_equal_in_every_way(
    subject: Subject, count: int, longest: dict[str, int], nursery: Nursery, tmp_path: Path
) -> None:
    asked = cases(subject.resident.prompt, count, **longest)
    outcomes = {found.way: found for found in run(subject, asked, nursery, tmp_path)}
    one_shot = {"one shot"} if subject.config.dtype == "float32" else set()
    assert outcomes.keys() == WAYS | one_shot
    for way, outcome in outcomes.items():
        assert outcome.asked == (count / 4 if way == "made again" else count)
        assert not outcome.differing, way


def test_the_prompts_are_the_same_at_every_run_and_lie_on_the_edges(
    tiny_model_dir: Path, load_model: Callable[[Path], Resident]
) -> None:
    prompt = load_model(tiny_model_dir).prompt
    made = cases(prompt, 44, **TINY)
    assert made == cases(prompt, 44, **TINY)
    assert len({case.text for case in made}) > 35
    texts = {case.rows[0] for case in made}
    assert len(texts & set(EDGES)) >= 10
    assert min(texts) <= 2
    assert max(texts) == LONGEST_TEXT
    assert max(case.rows[1] for case in made) == LONGEST_QUESTION


@pytest.mark.parametrize("subject", [("tiny_model_dir", "float32")], indirect=True)
def test_one_changed_bit_is_heard(subject: Subject, nursery: Nursery, shop: Shop) -> None:
    """What the harness compares with is what the daemon has mounted: rows that are others show."""
    resident = subject.resident
    (case,) = cases(resident.prompt, 1, text=40, question=40)
    cube = shop.cube("a", case.text)

    def heard() -> list[str]:
        runtime.heard()
        report = ask(runtime.client, [cube], question=case.question, max_tokens=subject.answer)
        assert how(report) == ["kv"]
        return runtime.heard()

    with nursery.runtime(subject.config) as runtime:
        runtime.client.call("encode", **cube)
        assert heard() == uncached(subject, case).heard
        with shop.kv("a").open("r+b") as file:
            cache, ids = kv_store.read(file.fileno(), resident, None)
            value = cache.layers[-1][1, 0, cache.length - 1, :1]
            value.view(torch.int32).bitwise_xor_(1 << 16)  # of its mantissa
            sha256 = hashlib.sha256(case.text.encode()).hexdigest()
            kv_store.write(file.fileno(), cache, resident, ids, sha256)
        assert heard() != uncached(subject, case).heard
