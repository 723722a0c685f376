"""A change of a file is seen by its status, however fast it followed the last look."""

from __future__ import annotations

import os
from pathlib import Path

from memfs.vault.sig import settled_sig, sig_of


def test_a_change_shows(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    before = sig_of(path.stat())
    assert sig_of(path.stat()) == before
    os.utime(path, ns=(0, 0))
    assert sig_of(path.stat()) != before


def test_a_young_file_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    found = path.stat()
    assert settled_sig(found) != sig_of(found)
    assert settled_sig(found, found.st_ctime_ns + 1_000_000) != sig_of(found)
    assert settled_sig(found, found.st_ctime_ns + 1_000_000_000) == sig_of(found)
    assert settled_sig(found) == sig_of(found).unsettled()


def test_a_coarse_clock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    fields = list(path.stat())
    # A filesystem whose stamps are whole seconds.
    coarse = os.stat_result(
        [*fields[:7], 100, 100, 100],
        {"st_mtime_ns": 100_000_000_000, "st_ctime_ns": 100_000_000_000},
    )
    assert coarse.st_ctime_ns == 100_000_000_000
    assert settled_sig(coarse, 101_500_000_000) != sig_of(coarse)
    assert settled_sig(coarse, 103_000_000_000) == sig_of(coarse)
