"""``memfs bench``: measures memfs on this machine, its arms side by side in one run."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memfs.cli import output, targets
from memfs.config import Config
from memfs.cube import layout
from memfs.errors import MountFailed
from memfs.runtime.client import RuntimeClient, stop
from memfs.runtime.model import model_store

HELP = "measure memfs on this machine"
EPILOG = """\
what is measured:
  ttft     time to first token: the text prefilled, its KV cache from the file, and resident
  mount    KV caches from the page cache into the model, beside a plain copy of their bytes
  start    until a mount can be used, and until the model can
  fs       a mount beside the disk it lies on and beside a FUSE program in C

examples:
  memfs bench ttft
  memfs bench ttft --tokens 1024,4096 --runs 9 --json
  memfs bench mount --device cuda
  memfs bench fs --dir /mnt/disk --fuse ./passthrough_fh

Medians of paired runs. It uses a store of its own, and a runtime that it starts and stops. fs needs
no model; as root it also empties the kernel's caches of names before each find.
"""

QUESTION = "What did the keeper write in the log that evening?"
"""22 tokens are computed for it: 11 of its own, 11 of the default model's template around it."""

Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("ttft", "mount", "start", "fs"), help="what to measure")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="counted runs (5)")
    parser.add_argument(
        "--tokens",
        type=_numbers,
        default=[256, 1024, 2048, 4096, 7168],
        metavar="N,N",
        help="lengths of the memories (256,1024,2048,4096,7168)",
    )
    parser.add_argument(
        "--files", type=int, default=100_000, metavar="N", help="fs: that find sees (100000)"
    )
    parser.add_argument("--dir", help="fs: on the disk to be measured (where temporary files go)")
    parser.add_argument(
        "--fuse",
        metavar="PROGRAM",
        help="fs: in C, called with a directory and a mountpoint (passthrough_hp,"
        " passthrough_fh or bindfs, the first on the PATH)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.what == "fs":
        return _fs(args)
    config = Config.load(model=args.model, device=args.device, dtype=args.dtype)
    with output.Progress() as progress:
        measure = {"ttft": _ttft, "mount": _mount, "start": _start}[args.what]
        lines = measure(args, config, progress.update)
    facts = {**_machine(), "runs": args.runs, "model": config.model, args.what: lines}
    if args.json:
        output.print_json(facts)
        return 0
    print(f"{facts['date']}, {facts['machine']}, median of {args.runs} paired runs")
    columns = list(lines[0])
    print(output.table([[_cell(c, line[c]) for c in columns] for line in lines], columns))
    return 0


def _fs(args: argparse.Namespace) -> int:
    from memfs.cli import bench_fs

    with output.Progress() as progress:
        facts = bench_fs.run(args.runs, args.files, args.dir, args.fuse, progress.update)
    facts = {**_machine(), "runs": args.runs, **facts}
    if args.json:
        output.print_json(facts)
        return 0
    print(f"{facts['date']}, {facts['machine']}, median (range) of {args.runs} paired runs")
    bench_fs.print_facts(facts)
    return 0


def _ttft(args: argparse.Namespace, config: Config, say: Callable[[str], None]) -> list[Facts]:
    directory = model_store.resolve(config.model, config, say)
    lines = []
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as root, _Runtime(config) as client:
        os.mkdir(os.path.join(root, layout.CONTROL))
        for tokens in args.tokens:
            cube: dict[str, Any] = {"store": os.path.realpath(root), "path": f"memory-{tokens}"}
            os.mkdir(os.path.join(root, cube["path"]))
            text = _text_of(directory, tokens)
            Path(root, cube["path"], layout.PAYLOAD).write_text(text)
            say(f"{tokens} tokens: encoding")
            made = client.call("encode", **cube)
            lines.append(_arms(client, cube, made["tokens"], args.runs, say))
    return lines


def _arms(
    client: RuntimeClient, cube: dict[str, Any], tokens: int, runs: int, say: Callable[[str], None]
) -> Facts:
    """Each run asks three times: with the text, with the KV file not yet in the model, resident."""
    arms: dict[str, list[float]] = {"text": [], "file": [], "resident": []}
    question_tokens = 0
    for number in range(runs + 1):  # the first warms up and is not counted
        say(f"{tokens} tokens: run {number} of {runs}")
        for arm, times in arms.items():
            if arm == "file" and number:
                client.call("unmount", **cube)
            report = client.call(
                "ask", cubes=[cube], question=QUESTION, kv=arm != "text", max_tokens=1
            )
            times.append(report["ttft_s"])
            if arm == "resident":
                question_tokens = report["prompt_tokens"] - report["cached_tokens"]
    medians = {arm: statistics.median(times[1:]) for arm, times in arms.items()}
    saved = [1 - f / t for f, t in zip(arms["file"][1:], arms["text"][1:], strict=True)]
    return {
        "tokens": tokens,
        "question_tokens": question_tokens,
        "text_s": medians["text"],
        "file_s": medians["file"],
        "resident_s": medians["resident"],
        "less_from_file": statistics.median(saved),
    }


def _mount(args: argparse.Namespace, config: Config, say: Callable[[str], None]) -> list[Facts]:
    from memfs.runtime.measure.mounting import mount_rates  # torch

    directory = model_store.resolve(config.model, config, say)
    return mount_rates(directory, config, args.tokens, args.runs, say)


def _start(args: argparse.Namespace, config: Config, say: Callable[[str], None]) -> list[Facts]:
    model_store.resolve(config.model, config, say)
    mounts, models = [], []
    for number in range(args.runs):
        say(f"run {number + 1} of {args.runs}")
        mounts.append(_mount_seconds())
        with _Runtime(config) as client:
            models.append(client.call("status")["since_start_s"])
    return [
        {"what": "memfs mount returns, the mount usable", "seconds": statistics.median(mounts)},
        {"what": "process start to model ready", "seconds": statistics.median(models)},
    ]


def _mount_seconds() -> float:
    """From the command's start until a file was written and read through the mount."""
    memfs = [sys.executable, "-m", "memfs"]
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as root:
        store, mountpoint = os.path.join(root, "store"), os.path.join(root, "mem")
        os.mkdir(store)
        os.mkdir(mountpoint)
        began = time.perf_counter()
        command = [*memfs, "mount", store, mountpoint]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise MountFailed(done.stderr.strip())
        Path(mountpoint, "probe").write_text("x")
        Path(mountpoint, "probe").read_text()
        seconds = time.perf_counter() - began
        subprocess.run([*memfs, "umount", mountpoint], check=True, capture_output=True)
    return seconds


class _Runtime:
    """A runtime of the bench's own, beside any that is running."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._directory = tempfile.TemporaryDirectory(prefix="memfs-bench-")
        self._before = os.environ.get("XDG_RUNTIME_DIR")

    def __enter__(self) -> RuntimeClient:
        os.environ["XDG_RUNTIME_DIR"] = self._directory.name
        self._client = targets.runtime(self._config)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        stop(self._config)
        if self._before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = self._before
        self._directory.cleanup()


def _text_of(directory: Path, tokens: int) -> str:
    """Prose of about ``tokens`` tokens for the model in ``directory``."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "".join(
        f"On day {n} the keeper saw {n * 7 % 41} ships pass the light, trimmed {n * 5 % 13} lamps "
        f"and wrote that the wind had turned to the {('north', 'east', 'south', 'west')[n % 4]}. "
        for n in range(1, tokens // 20 + 2)
    )
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return text[: encoded.offsets[tokens - 2][1]]  # one token more ends every memory


def _machine() -> Facts:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{names[0] if names else platform.machine()}, {cores} cores",
        "python": platform.python_version(),
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _cell(column: str, value: object) -> str:
    if column == "bytes" and isinstance(value, int):
        return output.size(value)
    if column.startswith(("less", "share")) and isinstance(value, float):
        return f"{value:.1%}"
    if isinstance(value, float):
        return output.seconds(value)
    return str(value)
