"""``memfs bench fs``: a mount beside the disk it lies on and a C program's mount of the same files.

Used by ``bench``, in the main thread. Every run takes every measure in every arm, one after another
and each time in another order, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memfs.cli.bench.harness import Facts, Say
from memfs.errors import MountFailed, NotFound
from memfs.filesystem import libfuse
from memfs.filesystem import measure as measures
from memfs.filesystem.measure import Place

EPILOG = """\
examples:
  memfs bench fs --runs 3
  memfs bench fs --dir /mnt/disk --fuse ./passthrough_fh

No model is needed. As root the kernel's caches of names are emptied before each find.
"""

C_PROGRAMS = ("passthrough_hp", "passthrough_fh", "bindfs")
"""FUSE programs in C that show a directory as it is: the first two are examples of libfuse's."""
QUIET_SECONDS = 1.5
"""An index that takes in nothing new for so long is complete."""


@dataclass(frozen=True)
class Measure:
    """One line of the result."""

    name: str
    take: Callable[[Place, int], float]
    unit: str
    aim: str = ""
    aim_alone: str | None = None
    """Without passthrough, where that is another: no server comes near the disk."""
    options: str = "mount_on_read=off"
    """Of memfs's mount: what is in the model is read as everything is where no read counts."""


MEASURES = (
    Measure("blob read, warm", measures.blob_warm, "MB/s", ">= 95% of the disk", ">= 85% of C"),
    Measure("blob read, cold", measures.blob_cold, "MB/s", ">= 90% of the disk", ">= 60% of C"),
    Measure("copies of it in memory", measures.copies, "", "1", ""),
    Measure(
        "blob read, warm, not yet in the model",
        measures.blob_warm,
        "MB/s",
        options="mount_on_read=on",
    ),
    Measure("find, files in plain directories, cold", measures.walk_plain, "s", "<= 0.7 s"),
    Measure("find, files in cubes, cold", measures.walk_cubes, "s"),
    Measure("getattr", measures.getattr_, "µs", "<= 45 µs"),
    Measure("open and close", measures.open_close, "µs", "<= 90 µs"),
    Measure("write, 1 MiB at a time", measures.write, "MB/s", ">= 500 MB/s"),
    Measure("creating files", measures.create, "1/s", ">= 45% of the disk"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--files", type=int, default=100_000, metavar="N", help="that find sees (100000)"
    )
    parser.add_argument("--dir", help="on the disk to be measured (where temporary files go)")
    parser.add_argument(
        "--fuse",
        metavar="PROGRAM",
        help="in C, called with a directory and a mountpoint (passthrough_hp, passthrough_fh or"
        " bindfs, the first on the PATH)",
    )


def measure(args: argparse.Namespace, say: Say) -> Facts:
    """Measures in a store of its own.

    Raises:
        MountFailed: memfs or the C program could not mount.
        NotFound: there is no such program.
    """
    runs, files = args.runs, args.files
    program = _program(args.fuse)
    library = libfuse.find()
    lines: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="memfs-bench-", dir=args.dir) as name:
        root = Path(os.path.realpath(name))
        store = root / "store"
        store.mkdir()
        say("making the files")
        measures.prepare(store, files, runs)
        passthrough: Facts = {}
        for options in dict.fromkeys(m.options for m in MEASURES):
            chosen = [m for m in MEASURES if m.options == options]
            with contextlib.ExitStack() as stack:
                places = {"disk": Place(store, store)}
                if program is not None:
                    mounted = stack.enter_context(_c_mount(program, store, root / "c"))
                    places["c"] = Place(mounted, store)
                mounted = stack.enter_context(_memfs_mount(store, root / "memfs", options))
                places["memfs"] = Place(mounted, store)
                passthrough = _status(mounted)["passthrough"]
                for number in range(runs):
                    say(f"run {number + 1} of {runs}")
                    _one_run(chosen, places, number, lines)
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", store], capture_output=True, text=True, check=True
        )
    return {
        "libfuse": ".".join(map(str, libfuse.version(library))) if library else None,
        "kernel": os.uname().release,
        "passthrough": passthrough,
        "disk": kind.stdout.strip(),
        "c": os.path.basename(program) if program else None,
        "files": files,
        "cold_walks": measures.can_drop_caches(),
        "fs": [_line(m, lines[m.name], passed=passthrough["on"]) for m in MEASURES],
    }


def show(facts: Facts) -> None:
    """The result as a table in Markdown."""
    mode = "with passthrough" if facts["passthrough"]["on"] else "without passthrough"
    print(
        f"libfuse {facts['libfuse']}, Linux {facts['kernel']}, {mode}, on {facts['disk']};", end=""
    )
    print(f" beside {facts['c']}" if facts["c"] else f" no C program: {_MISSING}")
    if not facts["cold_walks"]:
        print("find is not cold: only root can empty the kernel's directory cache")
    print("\n| | disk | C | memfs | of the disk | of C | aim |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for line in facts["fs"]:
        arms = [_shown(line, arm) for arm in ("disk", "c", "memfs")]
        shares = [_share(line.get(name)) for name in ("of_disk", "of_c")]
        print(f"| {' | '.join([line['what'], *arms, *shares, line['aim']])} |")


_MISSING = f"none of {', '.join(C_PROGRAMS)} is on the PATH (--fuse names another)"


def _one_run(
    chosen: list[Measure],
    places: dict[str, Place],
    number: int,
    lines: dict[str, dict[str, list[float]]],
) -> None:
    arms = list(places)
    first = number % len(arms)
    for m in chosen:
        for arm in arms[first:] + arms[:first]:
            value = m.take(places[arm], number)
            lines.setdefault(m.name, {}).setdefault(arm, []).append(value)


def _line(m: Measure, arms: dict[str, list[float]], *, passed: bool) -> Facts:
    aim = m.aim if passed or m.aim_alone is None else m.aim_alone
    line: Facts = {"what": m.name, "unit": m.unit, "aim": aim, "runs": arms}
    medians = {arm: statistics.median(values) for arm, values in arms.items()}
    line |= medians
    for arm in ("disk", "c"):
        if arm in arms and m.unit:
            pairs = zip(arms["memfs"], arms[arm], strict=True)
            line[f"of_{arm}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return line


def _shown(line: Facts, arm: str) -> str:
    if arm not in line:
        return "-"
    low, high = min(line["runs"][arm]), max(line["runs"][arm])
    digits = 2 if line["unit"] in ("s", "") else 1 if line["unit"] == "µs" and high < 10 else 0
    value = f"{line[arm]:,.{digits}f} {line['unit']}".rstrip()
    return f"{value} ({low:,.{digits}f} to {high:,.{digits}f})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _program(given: str | None) -> str | None:
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise NotFound(f"{given}: no such program")
        return found
    return next(filter(None, map(shutil.which, C_PROGRAMS)), None)


def _status(mountpoint: Path) -> Facts:
    facts: Facts = json.loads((mountpoint / ".memfs/status.json").read_text())
    return facts


@contextlib.contextmanager
def _memfs_mount(store: Path, mountpoint: Path, options: str) -> Iterator[Path]:
    memfs = [sys.executable, "-m", "memfs"]
    environment = os.environ | {"MEMFS_AUTOSTART": "off"}
    command = [*memfs, "mount", "-o", options, str(store), str(mountpoint)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise MountFailed(done.stderr.strip())
    try:
        _await_index(mountpoint)
        yield mountpoint
    finally:
        subprocess.run([*memfs, "umount", str(mountpoint)], check=True, capture_output=True)


def _await_index(mountpoint: Path) -> None:
    """The new store's cubes are read once; that is no part of what is measured."""
    known, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        now = _status(mountpoint)["index"]["cubes"]
        if now is None or now != known:
            known, since = now, time.monotonic()
        time.sleep(0.1)


@contextlib.contextmanager
def _c_mount(program: str, store: Path, mountpoint: Path) -> Iterator[Path]:
    mountpoint.mkdir(exist_ok=True)
    if os.path.basename(program) == "passthrough_fh":  # shows all of ``/``
        command = [program, "-o", f"modules=subdir,subdir={store}", str(mountpoint)]
    else:
        command = [program, str(store), str(mountpoint)]
    # It goes to the background by itself once it has mounted.
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not os.path.ismount(mountpoint):
        raise MountFailed(f"{program} did not mount: {(done.stderr or done.stdout).strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", mountpoint], check=True, capture_output=True)
