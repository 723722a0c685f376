"""Killed at any instant, nothing is lost that was promised. ``tools/crash`` does it for longer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.config import Config
from memfs.runtime.client import stop

from .expected import Change, Expected
from .harness import campaign


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> Iterator[Config]:
    config = Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)
    yield config
    stop(config)


def test_the_mount_is_killed(tmp_path: Path, config: Config) -> None:
    with campaign(tmp_path, config, what="mount", seed=1) as running:
        for _ in range(15):
            running.round()
        assert running.tally["done"] > 100


def test_the_runtime_is_killed_too(tmp_path: Path, config: Config) -> None:
    with campaign(tmp_path, config, what="both", seed=2) as running:
        for _ in range(3):
            running.round()


def test_a_campaign(
    tmp_path: Path, config: Config, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    rounds = request.config.getoption("--crash-rounds")
    if not rounds:
        pytest.skip("tools/crash runs it")
    what = request.config.getoption("--crash-what")
    seed = request.config.getoption("--crash-seed")
    began = time.monotonic()
    with campaign(tmp_path, config, what=what, seed=seed) as running:
        for number in range(1, rounds + 1):
            running.round()
            if number % 10 == 0 or number == rounds:
                with capsys.disabled():
                    print(f"\nround {number} of {rounds}, {time.monotonic() - began:.0f} s")
    with capsys.disabled():
        for what, count in sorted(running.tally.items()):
            print(f"{count:8} {what}")


def test_the_harness_tells_a_lost_file_from_a_kept_one() -> None:
    expected = Expected()
    for kind, path in (("rewrite", "a"), ("atomic", "b"), ("append", "c"), ("rewrite", "d")):
        expected.begin(Change(kind, path, b"first"))
        expected.done(path)
    expected.begin(Change("rewrite", "a", b"second"))
    expected.begin(Change("atomic", "b", b"second"))
    expected.begin(Change("append", "c", b"second"))
    expected.begin(Change("rename", "d", to="e"))
    fine = {"a": b"sec", "b": b"first", "c": b"firstsec", "e": b"first"}
    assert expected.violations(fine.get) == []
    assert expected.violations(fine.get) == []
    for path, worse in (("a", b"se"), ("b", b""), ("c", None), ("d", b"first"), ("e", None)):
        expected = Expected()
        for name, content in fine.items():
            expected.begin(Change("rewrite", name, content))
            expected.done(name)
        expected.files["d"] = None
        assert len(expected.violations((fine | {path: worse}).get)) == 1, path


@pytest.mark.parametrize(
    ("kind", "found"),
    [("atomic", b"sec"), ("append", b"sec"), ("rewrite", b"fir"), ("unlink", b""), ("title", None)],
)
def test_a_mixture_is_no_outcome(kind: str, found: bytes | None) -> None:
    expected = Expected()
    expected.begin(Change("rewrite", "a", b"first"))
    expected.done("a")
    expected.begin(Change(kind, "a", b"second"))
    assert len(expected.violations({"a": found}.get)) == 1
