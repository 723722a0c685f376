"""``memfs bench mount``: a line for each tier there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfs.cli.bench import mount
from memfs.config import Config
from memfs.runtime.measure.mounting import mount_rates


def test_each_tier_is_measured(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(device="cpu", dtype="float32", threads=1)
    lines = mount_rates(tiny_model_dir, config, [64], 2, lambda _: None)
    tiers = [line["tier"] for line in lines]
    assert tiers in (["disk", "page cache", "device"], ["page cache", "device"])
    assert all(line["bytes"] == 64 * 2 * 2 * 2 * 16 * 4 for line in lines)
    assert all(line["mount_s"]["min"] > 0 and line["copy_s"]["min"] > 0 for line in lines)
    assert [line["share_of_copy"] is None for line in lines] == [t == "device" for t in tiers]
    mount.show({"mount": lines})
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(lines)
