"""The ``memfs`` command: lazy modules, errors into exit statuses, help that is written down."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from memfs.cli import main as cli
from memfs.errors import KVForeign, MemfsError, NotFound

ROOT = Path(__file__).resolve().parent.parent.parent


def memfs(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memfs", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command module in the place of ``doctor``; a test gives it its ``run``."""
    module = types.ModuleType("memfs.cli.doctor")
    module.HELP, module.EPILOG = "try", ""
    module.add_arguments = lambda parser: parser.add_argument("--json", action="store_true")
    monkeypatch.setitem(sys.modules, "memfs.cli.doctor", module)
    return module


def raising(error: BaseException) -> object:
    def run(_: object) -> int:
        raise error

    return run


def test_help_is_quick_and_imports_no_command() -> None:
    took = []
    for _ in range(3):
        start = time.perf_counter()
        done = memfs("--help")
        took.append(time.perf_counter() - start)
    assert done.returncode == 0
    shown = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")]
    assert shown == list(cli.COMMANDS)
    # 0.06 s on an idle machine; this bound is against an import that does not belong here.
    assert min(took) < 0.5
    code = "import sys, memfs.cli.main as m; m.build_parser(None); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not {"torch", "transformers", "lmdb", "mfusepy", "memfs.config"} & loaded


def test_no_command_or_an_unknown_one_is_wrong_usage() -> None:
    assert memfs().returncode == 2
    done = memfs("no-such-command")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MemfsError("x"), 1, "memfs failed: x"),
        (NotFound("cube"), 3, "not found: cube"),
        (KVForeign("dtype"), 4, "the KV cache was made by another model: dtype"),
        (FileNotFoundError(2, "No such file", "a\x1bb"), 1, "a\\x1bb: No such file"),
    ],
)
def test_errors_become_exit_statuses(
    command: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    text: str,
) -> None:
    command.run = raising(error)
    assert cli.main(["doctor"]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"memfs: {text}\n")
    assert cli.main(["doctor", "--json"]) == status
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["type"] == type(error).__name__
    assert printed.err == f"memfs: {text}\n"


def test_an_interrupt_is_quiet(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = raising(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\n"


def test_a_bug_is_not_hidden(command: types.ModuleType) -> None:
    command.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    line = f"{sys.executable} -m memfs doctor | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert int(done.stdout) == cli.PIPE_CLOSED


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_module_keeps_the_form(name: str) -> None:
    module = importlib.import_module(f"memfs.cli.{name}")
    assert cli.COMMANDS[name] == module.HELP
    assert "memfs " + name in module.EPILOG, "an example"
    assert module.__doc__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys, memfs.cli.main as m\n"
        "try: m.main([sys.argv[1], '--help'])\n"
        "finally: print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy", "mfusepy"} & set(done.stdout.split())


def test_the_written_help_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "cli-docs", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
