"""``memfs bench ttft`` on tiny models: its arms, with the tokens that were asked for."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest

from memfs.cli import main as cli
from memfs.cli.bench import harness, memos
from memfs.runtime.measure import shapes

from .conftest import Bench, is_spread

TIMES = ("build_s", "load_s", "text_s", "file_s", "resident_s")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here: nothing waits for memory to be made ready."""
    monkeypatch.setattr(harness, "settle", lambda: None)


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape like qwen3-8b's of two small layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    small = shapes.SHAPES["qwen3-8b"] | sizes | heads
    monkeypatch.setitem(shapes.SHAPES, "qwen3-8b", small)
    return "qwen3-8b"


def test_three_arms_of_each_length(bench: Bench) -> None:
    facts = bench("ttft", "--runs", 2, "--tokens", "64,300")
    assert [line["tokens"] for line in facts["ttft"]] == [64, 300]
    for line in facts["ttft"]:
        assert line["question_tokens"] == 22
        assert all(is_spread(line[name]) and line[name]["min"] > 0 for name in TIMES)
        assert all(line[f"less_{arm}"]["max"] < 1 for arm in ("from_file", "resident"))
    assert facts["dtype"] == "float32"
    assert facts["token_bytes"] == 2 * 2 * 2 * 16 * 4


def test_the_grid_on_a_shape(
    small_shape: str,
    public: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memos, "MEMORIES", (64, 128, 300))  # a small one of the same form
    monkeypatch.setattr(memos, "QUESTIONS", (16, 30, 95))
    monkeypatch.setattr("tempfile.tempdir", str(public))  # a socket's path is short
    words = ["--grid", "--shape", small_shape, "--device", "cpu", "--runs", "1", "--json"]
    assert cli.main(["bench", "ttft", *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["dtype"]) == ("qwen3-8b", "bfloat16")
    template = 11
    cells = [(line["tokens"], line["question_tokens"] - template) for line in facts["ttft"]]
    assert cells == [(m, q) for m in memos.MEMORIES for q in memos.QUESTIONS]
    assert facts["ttft"][0]["less_published"]["Qwen3-8B"] == 0.713
    assert facts["ttft"][-1]["less_published"]["Qwen2.5-72B"] == 0.764
    assert list(public.iterdir()) == [], "the model, the store and the runtime are gone"


def test_published_cuts_span_what_was_published() -> None:
    cuts = [cut for cell in memos.CUTS.values() for cut in cell]
    assert (len(cuts), min(cuts), max(cuts)) == (27, 0.186, 0.942)
    assert list(memos.CUTS) == [(m, q) for m in memos.MEMORIES for q in memos.QUESTIONS]


def test_a_shape_that_has_no_room_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    monkeypatch.setattr(shapes, "_SPARE", 0.0)
    assert cli.main(["bench", "ttft", "--shape", "qwen3-8b", "--device", "cpu"]) == 6
    said = capsys.readouterr().err
    assert "16.4 GB of weights and needs 16.4 GB of space in" in said
    assert "1.0 GB are free" in said
    monkeypatch.setattr(shapes, "_SPARE", 10.0**6)
    assert cli.main(["bench", "ttft", "--shape", "qwen3-8b", "--device", "cpu"]) == 6
    assert "of cpu memory" in capsys.readouterr().err


def test_a_shape_and_a_model_are_one_too_many(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "qwen3-8b", "--model", str(tiny_model_dir)]
    assert cli.main(["bench", "ttft", *words]) == 7
    assert "--shape is a model" in capsys.readouterr().err
