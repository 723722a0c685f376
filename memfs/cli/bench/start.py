"""``memfs bench start``: until a mount can be used, and until the model can.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Facts, Say
from memfs.errors import MountFailed
from memfs.runtime.measure.spread import spread

EPILOG = """\
examples:
  memfs bench start --runs 7
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    config = harness.config_of(args)
    harness.model_directory(config, say)
    mounts, models = [], []
    for number in range(args.runs):
        say(f"run {number + 1} of {args.runs}")
        mounts.append(_mount_seconds())
        with harness.runtime(config) as client:
            models.append(client.call("status")["since_start_s"])
    lines = [
        {"what": "memfs mount returns, the mount usable", "taken_s": spread(mounts)},
        {"what": "process start to model ready", "taken_s": spread(models)},
    ]
    return {"model": config.model, "start": lines}


def show(facts: Facts) -> None:
    harness.show_lines(facts["start"])


def _mount_seconds() -> float:
    """From the command's start until a file was written and read through the mount."""
    memfs = [sys.executable, "-m", "memfs"]
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as root:
        store, mountpoint = Path(root, "store"), Path(root, "mem")
        store.mkdir()
        mountpoint.mkdir()
        began = time.perf_counter()
        command = [*memfs, "mount", str(store), str(mountpoint)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise MountFailed(done.stderr.strip())
        (mountpoint / "probe").write_text("x")
        (mountpoint / "probe").read_text()
        seconds = time.perf_counter() - began
        subprocess.run([*memfs, "umount", str(mountpoint)], check=True, capture_output=True)
    return seconds
