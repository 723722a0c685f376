"""``memfs bench compose`` on a tiny model: every way beside the full prefill, costs in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfs.cli import main as cli
from memfs.config import Config
from memfs.runtime.asking.policy import Policy
from memfs.runtime.measure.composing import Asked, compositions

from .conftest import Bench, is_spread


def test_every_way_beside_the_full_prefill(bench: Bench) -> None:
    words = ["--cubes", "4,8", "--policies", "rotate,link:4,blend:1", "--questions", 1, "--runs", 2]
    facts = bench("compose", *words)
    lines = facts["compose"]
    ways = ["full prefill", "rotate", "link:4", "blend:1"]
    assert [(line["cubes"], line["way"]) for line in lines] == [
        (n, w) for n in (4, 8) for w in ways
    ]
    for full, rotate, link, blend in (lines[:4], lines[4:]):
        assert (full["kl"], full["share_of_rows"]) == (0, 1)
        assert rotate["share_of_rows"] == 0 < link["share_of_rows"] < blend["share_of_rows"]
        assert 0 <= blend["kl"] < 1e-4 < rotate["kl"], "all rows again are those of the prefill"
        assert blend["right"] == full["right"] and full["right"].endswith(" of 8")
        assert all(is_spread(line["cpu_s"]) and is_spread(line["times_less"]) for line in lines)


def test_an_answer_is_right_by_words() -> None:
    asked = Asked("Who?", ["ham", "bell ringers"])
    assert all(asked.right(answer) for answer in ("A ham.", "HAM", "hams", "the bell ringers' own"))
    assert not any(asked.right(answer) for answer in ("Hamnvik", "sham", "ringers", ""))


@pytest.mark.parametrize("words", [["--cubes", "1"], ["--policies", "guess"]])
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "compose", *words]) != 0
    assert capsys.readouterr().err.startswith("memfs: ")


def test_the_default_is_closer_than_rotation_alone(default_model_dir: Path) -> None:
    policies = [Policy(), Policy.parse(Config.compose)]
    config = Config(device="cpu", threads=1)
    lines = compositions(default_model_dir, config, [4], policies, 1, 1, lambda _: None)
    _, rotation, default = (line["kl"] for line in lines)
    assert 0 < default < rotation
