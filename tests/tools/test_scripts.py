"""The scripts in tools/, and what they rely on."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "name",
    ["tools/quickstart", "tools/test", "tools/crash", "tools/mutations", "tools/lib.sh", ".ci/run"],
)
def test_the_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert name.endswith(".sh") or os.access(ROOT / name, os.X_OK)


def test_every_dependency_is_pinned_at_a_version_that_will_do() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "tools" / "constraints.txt").read_text().lower().splitlines()
        if not line.startswith("#")
    )
    pins = {name.replace("_", "-"): version for name, version in pins.items()}
    script = (ROOT / "tools" / "lib.sh").read_text()
    (pins["torch"],) = re.findall(r"^torch=torch==(\S+)$", script, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name, minimum = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        assert _numbers(pins[name]) >= _numbers(minimum), name


def _numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


def test_the_quickstarts_document_is_about_2000_tokens(default_model_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(default_model_dir / "tokenizer.json"))
    (document,) = (ROOT / "docs" / "examples").glob("*.md")
    assert 1800 < len(tokenizer.encode(document.read_text()).ids) < 2200
    assert document.name in (ROOT / "tools" / "quickstart").read_text()


def test_without_the_right_to_install_the_one_line_is_printed(tmp_path: Path) -> None:
    """As a user without sudo: what to run as root, and a failure."""
    for name in ("apt-get", "id"):
        (tmp_path / name).write_text("#!/bin/sh\necho 1000\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", f". {ROOT}/tools/lib.sh; install_packages python3.11-venv fuse3"],
        env={"PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    line = "apt-get update && apt-get install -y --no-install-recommends python3.11-venv fuse3"
    assert line in done.stderr


def test_what_the_tests_drive_is_installed_or_done_without(tmp_path: Path) -> None:
    """On a machine where it is there, apt is not run; a user without sudo gets the line."""
    script = """
        . "$1/tools/lib.sh"
        test_packages=(coreutils:ls no-such:memfs-no-such libc6-dev:/etc/passwd other:/no/such)
        missing_test_packages
        id() { echo 1000; }
        apt-get() { return 1; }
        command() { [ "$2" != sudo ] && builtin command "$@"; }
        install_for_tests < /dev/null
        test_packages=(coreutils:ls)
        install_for_tests
    """
    done = subprocess.run(
        ["bash", "-euc", script, "bash", ROOT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "no-such",
        "other",
        "going on without; what needs them is skipped",
    ]
    assert "apt-get install -y --no-install-recommends no-such other" in done.stderr


def test_each_package_for_the_tests_is_named_once() -> None:
    script = '. "$1/tools/lib.sh"; printf "%s\\n" "${test_packages[@]}"'
    done = subprocess.run(
        ["bash", "-euc", script, "bash", ROOT], capture_output=True, text=True, check=True
    )
    entries = done.stdout.split()
    packages = [entry.partition(":")[0] for entry in entries]
    assert packages == sorted(set(packages))
    assert all(re.fullmatch(r"[a-z0-9.+-]+:[\w./-]+", entry) for entry in entries)


def test_conformance_says_what_it_can_run_and_refuses_anything_else() -> None:
    listed = subprocess.run(
        [ROOT / "tools/conformance", "--list"], check=True, capture_output=True, text=True
    ).stdout
    suites = {line.split()[0] for line in listed.splitlines()}
    assert suites == {"fio", "stress-ng", "cpython", "pyfilesystem", "loads", "model"}
    refused = subprocess.run(
        [ROOT / "tools/conformance", "missing"], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "there is no suite missing" in refused.stderr
