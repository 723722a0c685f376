"""``memfs bench clients`` and ``memfs bench decode`` on a tiny model: every arm is there."""

from __future__ import annotations

from .conftest import Bench, is_spread


def test_clients_are_counted_beside_one(bench: Bench) -> None:
    facts = bench("clients", "--clients", "1,3", "--tokens", 60, "--answer", 6, "--runs", 2)
    assert [line["clients"] for line in facts["clients"]] == [1, 3]
    for line in facts["clients"]:
        assert all(is_spread(line[name]) for name in ("tokens_a_second", "times_one", "first_s"))
    assert facts["clients"][0]["times_one"]["median"] == 1


def test_a_token_is_timed_in_each_arm(bench: Bench) -> None:
    facts = bench("decode", "--tokens", "300", "--runs", 2)
    (line,) = facts["decode"]
    assert line["tokens"] == 300
    for name in ("mounted_s", "prompt_s", "generate_s", "share_prompt", "share_generate"):
        assert is_spread(line[name])
        assert line[name]["min"] > 0
