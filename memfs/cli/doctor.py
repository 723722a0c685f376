"""``memfs doctor``: checks everything memfs needs, and prints the command that mends it.

The main thread.
"""

from __future__ import annotations

import argparse
import os
import shlex
import threading
from collections.abc import Iterator

from memfs.cli import output
from memfs.cli.checks import NOTE, OK, PROBLEM, Check, machine, packages, places
from memfs.config import Config, config_file, runtime_dir
from memfs.errors import InvalidConfig, MemfsError
from memfs.filesystem import registry
from memfs.runtime.client import RuntimeClient

HELP = "check everything memfs needs, and print what mends it"
EPILOG = """\
examples:
  memfs doctor
  memfs doctor --json | jq '.checks[] | select(.state == "problem")'

exit status: 0 where nothing is a problem, else 1
"""

ANSWER_SECONDS = 2.0
_COLOURS = {OK: "green", NOTE: "yellow", PROBLEM: "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--model", help="the model to look for (the configured one)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the checks and prints each as soon as it is done."""
    checks = []
    for check in _checks(args.model):
        checks.append(check)
        if not args.json:
            _print(check)
    problems = sum(check.state == PROBLEM for check in checks)
    if args.json:
        output.print_json({"ok": problems == 0, "checks": [c.to_json() for c in checks]})
    elif problems:
        print(f"\n{problems} problem{'s' if problems > 1 else ''}; the lines after → mend them")
    else:
        print("\nall is well")
    return 1 if problems else 0


def _print(check: Check) -> None:
    state = output.styled(f"{check.state:<7}", _COLOURS[check.state])
    print(f"{state}  {check.name:<17}  {output.plain(check.found)}", flush=True)
    if check.mend:
        print(f"         → {output.plain(check.mend)}")


def _checks(model: str | None) -> Iterator[Check]:
    yield from machine()
    yield from packages()
    try:
        config = Config.load(model=model)
        yield Check("configuration", OK, "valid")
    except InvalidConfig as e:
        yield Check("configuration", PROBLEM, e.detail, f"$EDITOR {config_file()}")
        config = Config(model=model or Config.model)
    yield from places(config)
    yield from _mounts()
    yield from _runtimes()


def _mounts() -> Iterator[Check]:
    """Every memfs mount that the kernel knows, and whether anybody still answers it."""
    for record in registry.mounted():
        found = f"{record.store} on {record.mountpoint}"
        reason = _unanswered(record.mountpoint)
        if reason is None:
            yield Check("mount", OK, found)
        else:
            mend = f"memfs umount {shlex.quote(record.mountpoint)}"
            yield Check("mount", PROBLEM, f"{found}: {reason}", mend)


def _unanswered(mountpoint: str) -> str | None:
    """Why nobody answers at ``mountpoint``, or None. A stuck mount must not hang the doctor."""
    reasons = ["does not answer"]

    def look() -> None:
        try:
            os.stat(mountpoint)
            reasons.clear()
        except PermissionError:
            reasons.clear()  # another user's mount: alive, and none of ours
        except OSError as e:
            reasons[:] = [e.strerror or str(e)]

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return reasons[0] if reasons else None


def _runtimes() -> Iterator[Check]:
    """Every runtime of this user that has a socket."""
    try:
        sockets = sorted(runtime_dir().glob("runtime-*.sock"))
    except (InvalidConfig, OSError):
        return  # reported by the check of the runtime directory
    for path in sockets:
        try:
            with RuntimeClient(path) as client:
                status = client.call("status", timeout=ANSWER_SECONDS)
        except MemfsError as e:
            yield Check("runtime", NOTE, f"{path.name} does not answer: {e.detail}", f"rm {path}")
            continue
        found = f"{status.get('model')} on {status.get('device')}: {status.get('state')}"
        if status.get("state") == "failed":
            log = path.with_suffix(".log")
            yield Check("runtime", PROBLEM, f"{found}: {status.get('error')}", f"less {log}")
        else:
            yield Check("runtime", OK, found)
