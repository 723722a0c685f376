"""``memfs bench ttft`` on a tiny model: its arms, with the tokens that were asked for."""

from __future__ import annotations

from .conftest import Bench, is_spread


def test_three_arms_of_each_length(bench: Bench) -> None:
    facts = bench("ttft", "--runs", 2, "--tokens", "64,300")
    assert [line["tokens"] for line in facts["ttft"]] == [64, 300]
    for line in facts["ttft"]:
        assert line["question_tokens"] == 22
        assert all(is_spread(line[f"{arm}_s"]) for arm in ("text", "file", "resident"))
        assert line["resident_s"]["min"] > 0
