"""``memfs doctor``: what it finds on this machine, and what it says where something is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from memfs.cli import checks, doctor
from memfs.config import Config, runtime_dir


def run_doctor(**environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Its exit status, and its checks by name."""
    done = subprocess.run(
        [sys.executable, "-m", "memfs", "doctor", "--json"],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)
    assert found["ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in found["checks"]}


def test_a_problem_makes_it_fail_and_says_what_mends_it(tmp_path: Path) -> None:
    status, found = run_doctor(XDG_CACHE_HOME=str(tmp_path))
    assert status == 1
    assert found["model"]["state"] == "problem"
    assert found["model"]["mend"] == "memfs runtime --prepare"
    assert found["Python"]["state"] == "ok"


@pytest.mark.usefixtures("default_model_dir")
def test_the_model_is_found_without_torch() -> None:
    assert run_doctor()[1]["model"]["state"] == "ok"
    code = "import sys, memfs.cli.main as m; m.main(['doctor']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_bad_configuration_is_one_problem_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "memfs").mkdir()
    (tmp_path / "memfs" / "config.toml").write_text("colour = 'red'")
    _, found = run_doctor(XDG_CONFIG_HOME=str(tmp_path))
    assert "unknown key 'colour'" in found["configuration"]["found"]
    assert str(tmp_path) in found["configuration"]["mend"]
    assert "runtime directory" in found


def test_a_runtime_directory_too_long_for_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    _, found = run_doctor(XDG_RUNTIME_DIR=str(deep))
    assert found["runtime directory"]["state"] == "problem"


def test_a_socket_nobody_answers_is_noted() -> None:
    path = runtime_dir() / "runtime-gone-00000000.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    try:
        _, found = run_doctor()
        assert found["runtime"]["state"] == "note"
        assert found["runtime"]["mend"] == f"rm {path}"
    finally:
        path.unlink()


def test_people_read_a_line_a_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    doctor._print(checks.Check("disk", checks.PROBLEM, "full\x1b", "rm things"))
    assert capsys.readouterr().out.splitlines() == [
        "problem  disk               full\\x1b",
        "         → rm things",
    ]


def test_a_missing_or_old_package_is_a_problem() -> None:
    assert checks._package("pytest", "1.0").state == "ok"
    assert checks._package("pytest", "1000.0").state == "problem"
    missing = checks._package("memfs-no-such-package", "2.0")
    assert missing.mend.endswith("-m pip install 'memfs-no-such-package>=2.0'")


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("5.0rc1", (5, 0)), ("x", ())]
)
def test_versions(version: str, numbers: tuple[int, ...]) -> None:
    assert checks._numbers(version) == numbers


def test_a_full_disk_is_a_problem_only_where_the_model_is_missing(tmp_path: Path) -> None:
    assert checks._room(needed=0).state == "ok"
    full = checks._room(needed=1 << 60)
    assert full.state == "problem"
    assert "XDG_CACHE_HOME" in full.mend


def test_another_model_is_named_in_what_mends_it(tmp_path: Path) -> None:
    model, *_ = checks.places(Config(model=str(tmp_path)))
    assert model.mend == f"memfs runtime --prepare --model {tmp_path}"


def test_a_directory_that_answers_and_one_that_does_not(tmp_path: Path) -> None:
    assert doctor._unanswered(str(tmp_path)) is None
    assert doctor._unanswered(str(tmp_path / "none")) == "No such file or directory"
