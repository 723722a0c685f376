"""What the kinds of bench share: a runtime of their own, texts of a length, tables of results.

The main thread.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfs.cli import output, targets
from memfs.config import Config
from memfs.cube import layout
from memfs.runtime.client import RuntimeClient, stop
from memfs.runtime.model import model_store

Facts = dict[str, Any]
Say = Callable[[str], None]
Cube = dict[str, Any]
"""As the protocol names one."""


def machine() -> Facts:
    """When and where something is measured."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{names[0] if names else platform.machine()}, {cores} cores",
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    """A device as torch calls it, an accelerator with its name."""
    if device == "cpu":
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def heading(facts: Facts) -> str:
    """The line above what a run found."""
    known = [facts[name] for name in ("machine", "model", "device", "dtype") if name in facts]
    if "threads" in facts:
        known.append(f"threads: {facts['threads']}")
    return f"{facts['date']}, {', '.join(known)}: median (range) of {facts['runs']} runs"


def numbers(text: str) -> list[int]:
    """The type of an argument such as ``--tokens 256,1024``."""
    return [number(part) for part in text.split(",")]


def number(text: str) -> int:
    """The type of an argument that counts: 1 at least."""
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{found} is less than 1")
    return found


def config_of(args: argparse.Namespace) -> Config:
    """The configuration, with what ``targets.add_model_arguments`` was given."""
    return Config.load(model=args.model, device=args.device, dtype=args.dtype)


def threads(config: Config) -> int:
    """How many a runtime of this configuration computes with."""
    return config.threads or len(os.sched_getaffinity(0))


def model_directory(config: Config, say: Say) -> Path:
    """The model that is measured, made or fetched where it is not there yet."""
    return model_store.resolve(config.model, config, say)


@contextmanager
def runtime(config: Config) -> Iterator[RuntimeClient]:
    """A runtime of the bench's own, its model loaded, beside any that is running."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as directory:
        os.environ["XDG_RUNTIME_DIR"] = directory
        try:
            with targets.runtime(config) as client:
                yield client
        finally:
            stop(config)
            if before is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = before


class Store:
    """A store of the bench's own, without a mount."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def cube(self, name: str, text: str) -> Cube:
        """A new cube of this text."""
        directory = self.root / name
        directory.mkdir()
        (directory / layout.PAYLOAD).write_text(text)
        return {"store": str(self.root), "path": name}


@contextmanager
def store() -> Iterator[Store]:
    """A store where temporary files go, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as name:
        root = Path(os.path.realpath(name))
        (root / layout.CONTROL).mkdir()
        yield Store(root)


def text_of(directory: Path, tokens: int, seed: int = 0) -> str:
    """Prose of ``tokens`` tokens as a memory for the model in ``directory``.

    Texts with other seeds differ from the first sentence on.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "".join(
        f"On day {n} the keeper saw {n * 7 % 41} ships pass the light, trimmed {n * 5 % 13} lamps "
        f"and wrote that the wind had turned to the {('north', 'east', 'south', 'west')[n % 4]}. "
        for n in range(seed + 1, seed + tokens // 20 + 2)
    )
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return text[: encoded.offsets[tokens - 2][1]]  # one token more ends every memory


def settle() -> None:
    """Waits as long as a runtime takes to make memory ready for the next mount.

    It does that when nobody has asked for half a second, so between two people's questions.
    """
    time.sleep(1)


def show_lines(lines: Sequence[Facts]) -> None:
    """Prints lines that have the same columns as a table in Markdown.

    A value is a number, a text, or what ``spread`` gives; None where there is none. The column's
    name says the unit: ``…bytes``, ``share…`` and ``less…`` are shares, ``…_s`` is in seconds.
    """
    columns = list(lines[0])
    header = [column.removesuffix("_s").replace("_", " ") for column in columns]
    rows = [header, *([_cell(c, line[c]) for c in columns] for line in lines)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |")


def _cell(column: str, value: object) -> str:
    if isinstance(value, dict):
        low, middle, high = (_cell(column, value[name]) for name in ("min", "median", "max"))
        unit = middle.lstrip("0123456789.,")  # said once where it is that of all three
        if low.endswith(unit) and high.endswith(unit):
            low, high = low.removesuffix(unit), high.removesuffix(unit)
        return f"{middle} ({low} to {high})"
    if column.endswith("bytes") and isinstance(value, int):
        return output.size(value)
    if isinstance(value, float):
        if column.startswith(("less", "share")):
            return f"{value:.1%}"
        return _seconds(value) if column.endswith("_s") else f"{value:.4g}"
    if isinstance(value, int):
        return output.number(value)
    return "-" if value is None else str(value)


def _seconds(value: float) -> str:
    """A duration: what takes milliseconds has a digit more than people are shown elsewhere."""
    return f"{value * 1000:.1f} ms" if value < 0.01 else output.seconds(value)
