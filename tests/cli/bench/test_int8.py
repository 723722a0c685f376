"""``memfs bench int8``: its arms on a tiny model, and what it aims for on the default one."""

from __future__ import annotations

from pathlib import Path

from memfs.config import Config
from memfs.runtime.measure.documents import documents

from .conftest import Bench, is_spread


def test_both_arms_and_both_ways_of_storing(bench: Bench) -> None:
    facts = bench("int8", "--documents", 1, "--tokens", "64,300", "--runs", 2)
    assert [line["arm"] for line in facts["answers"]] == ["int8", "exact, other chunks"]
    for line in facts["answers"]:
        assert line["answers"] == 5
        assert line["steps"] >= 5
        assert 0 <= line["mean_kl"] <= line["largest_kl"]
        assert line["share_same_answers"] <= line["share_same_tokens"] <= 1
    assert [line["tokens"] for line in facts["mount"]] == [64, 300]
    for line in facts["mount"]:
        assert line["share_of_bytes"] == line["int8_bytes"] / line["exact_bytes"] < 0.35
        assert is_spread(line["int8_s"])
        assert is_spread(line["exact_s"])


def test_every_document_and_question_is_another() -> None:
    made = documents(8)
    assert len({document.text for document in made}) == 8
    assert sum(len(document.questions) for document in made) == 40
    assert made == documents(8)


def test_the_answers_stay_as_near_as_is_aimed_for(default_model_dir: Path) -> None:
    """In float32, where the model's own rounding does not blur what storage does."""
    from memfs.runtime.measure.int8 import compare

    config = Config(device="cpu", dtype="float32", threads=1)
    _, [line, rounding] = compare(default_model_dir, config, 1, print)
    assert line["answers"] == 5
    assert line["mean_kl"] <= 0.005
    assert line["share_same_tokens"] >= 0.99
    assert rounding["mean_kl"] < line["mean_kl"], "the measure sees what is not there"
