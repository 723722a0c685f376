"""A damaged KV cache is refused, whatever is wrong with it. ``tools/mutations`` does more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from memfs.config import Config

from .harness import campaign
from .mutate import KINDS


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> Config:
    return Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)


def test_damaged_files_are_refused_by_name(tmp_path: Path, config: Config) -> None:
    with campaign(tmp_path / "store", config, seed=1) as running:
        running.run(150)
        assert running.kinds.keys() >= KINDS.keys()


def test_a_campaign(
    tmp_path: Path, config: Config, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    count = request.config.getoption("--mutations-count")
    if not count:
        pytest.skip("tools/mutations runs it")
    began = time.monotonic()
    with campaign(
        tmp_path / "store", config, request.config.getoption("--mutations-seed")
    ) as running:
        for done in range(100, count + 100, 100):
            running.run(min(done, count))
            with capsys.disabled():
                print(f"\n{running.count} of {count}, {time.monotonic() - began:.0f} s", end="")
    with capsys.disabled():
        print("\n", *running.summary(), sep="\n")
