"""What is recorded in docs/results, and what is made of it: tables and a chart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


def tool(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / name, *args]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_when_where_and_how_and_is_shown(path: Path) -> None:
    facts = json.loads(path.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["machine"]
    assert facts["runs"] > 0
    assert facts["command"].startswith(("memfs bench ", "tools/bench-peer"))
    assert f"<!-- {path.name} -->\n" in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("name", ["tables", "chart"])
def test_the_documents_show_what_was_recorded(name: str) -> None:
    done = tool(name, "--check")
    assert done.returncode == 0, done.stderr


def test_the_peer_is_pinned_and_the_bench_says_what_it_does() -> None:
    done = tool("bench-peer", "--help")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp restores the state" in done.stdout
    pinned = re.findall(r'"(llama-cpp-python.*?)"', (ROOT / "tools" / "bench-peer").read_text())
    assert [line for line in pinned if "==" in line]
