"""Benches as they are typed, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfs.cli import main as cli

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """``bench("ttft", "--runs", 2)``: what its ``--json`` prints, measured on the tiny model."""

    def call(kind: str, *args: object) -> dict[str, Any]:
        model = ["--model", str(tiny_model_dir), "--device", "cpu", "--dtype", "float32"]
        status = cli.main(["bench", kind, *map(str, args), *model, "--json"])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(printed.out)

    return call


def is_spread(value: dict[str, float]) -> bool:
    """Whether it is what ``spread`` gives, in order."""
    return value["min"] <= value["median"] <= value["max"]
