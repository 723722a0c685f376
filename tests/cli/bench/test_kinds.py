"""``memfs bench``: the form that every kind keeps, and what is kept of every run."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import pytest

from memfs.cli import bench as command
from memfs.cli import main as cli
from memfs.cli.bench import harness
from memfs.config import Config


@pytest.mark.parametrize("name", command.KINDS)
def test_every_kind_keeps_the_form(name: str) -> None:
    kind = importlib.import_module(f"memfs.cli.bench.{name}")
    assert f"memfs bench {name}" in kind.EPILOG, "an example"
    assert f"memfs bench {name}" in kind.__doc__
    parser = argparse.ArgumentParser()
    kind.add_arguments(parser)
    assert callable(kind.measure)
    assert callable(kind.show)


def test_a_run_says_what_was_typed_and_on_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memfs.cli.bench import start

    monkeypatch.setattr(start, "measure", lambda args, _say: {"start": [{"runs": args.runs}]})
    assert cli.main(["bench", "start", "--runs", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    assert '"command": "memfs bench start --runs 3"' in printed
    assert '"machine": "' in printed
    assert cli.main(["bench", "start", "--runs", "3"]) == 0
    assert ": median (range) of 3 runs" in capsys.readouterr().out


def test_a_kind_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bench"], ["bench", "no-such"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
    assert "invalid choice: 'no-such'" in capsys.readouterr().err


def test_values_are_shown_with_their_unit_and_range(capsys: pytest.CaptureFixture[str]) -> None:
    ranged = {"median": 0.05, "min": 0.004, "max": 2.5}
    harness.show_lines(
        [
            {
                "tokens": 4096,
                "bytes": 3 << 20,
                "file_s": ranged,
                "less_x": ranged,
                "ratio": 1.23456,
                "c": None,
            }
        ]
    )
    header, rule, line = (row.split("|")[1:-1] for row in capsys.readouterr().out.splitlines())
    assert [cell.strip() for cell in header] == ["tokens", "bytes", "file", "less x", "ratio", "c"]
    assert all(set(cell.strip()) == {"-"} for cell in rule)
    assert [cell.strip() for cell in line] == [
        "4,096",
        "3.0 MiB",
        "50 ms (4.0 ms to 2.50 s)",
        "5.0% (0.4 to 250.0)",
        "1.235",
        "-",
    ]


def test_a_runtime_of_the_benchs_own_leaves_the_environment(tiny_model_dir: Path) -> None:
    config = Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)
    before = os.environ["XDG_RUNTIME_DIR"]
    with harness.runtime(config) as client:
        assert os.environ["XDG_RUNTIME_DIR"] != before
        assert client.call("status")["state"] == "ready"
    assert os.environ["XDG_RUNTIME_DIR"] == before


@pytest.mark.parametrize("words", [["clients", "--clients", "0"], ["ttft", "--tokens", "64,-1"]])
def test_what_counts_is_one_at_least(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", *words])
    assert "is less than 1" in capsys.readouterr().err
