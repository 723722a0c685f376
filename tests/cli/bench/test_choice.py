"""``memfs bench choice`` on a tiny model: a line for each memory and question."""

from __future__ import annotations

import pytest

from memfs.cli.bench import harness

from .conftest import Bench, is_spread


def test_each_memory_with_each_question(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settle", lambda: None)
    facts = bench("choice", "--runs", 2, "--tokens", "64,300", "--questions", "8,40")
    assert [line["tokens"] for line in facts["choice"]] == [64, 64, 300, 300]
    short, long = [line["question_tokens"] for line in facts["choice"][:2]]
    assert long - short == 40 - 8
    for line in facts["choice"]:
        assert line["way"] in ("file", "prefill")
        assert all(is_spread(line[name]) for name in ("mounting_s", "text_s", "share_of_text"))
