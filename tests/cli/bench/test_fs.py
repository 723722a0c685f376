"""``memfs bench fs`` on a small store: every measure in every arm, and what it says of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        not (os.access("/dev/fuse", os.W_OK) and shutil.which("fusermount3")),
        reason="needs /dev/fuse and fusermount3",
    ),
]


def bench(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "memfs.cli.main",
        "bench",
        "fs",
        "--runs",
        "1",
        *map(str, args),
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


def test_every_arm_is_measured(tmp_path: Path) -> None:
    done = bench("--files", "300", "--dir", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    arms = {"disk", "memfs"} | ({"c"} if facts["c"] else set())
    assert len(facts["fs"]) == 10
    for line in facts["fs"]:
        assert set(line["runs"]) == arms
        assert all(value > 0 or line["unit"] == "" for value in line["runs"]["memfs"])
    assert facts["passthrough"]["on"] is (facts["passthrough"]["reason"] is None)
    assert os.listdir(tmp_path) == []


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    done = bench("--dir", tmp_path, "--fuse", "no-such-program")
    assert done.returncode == 3
    assert "no-such-program" in done.stderr
    broken = bench("--files", "0", "--dir", tmp_path, "--fuse", "false")
    assert broken.returncode == 9
    assert "did not mount" in broken.stderr
    assert os.listdir(tmp_path) == []
