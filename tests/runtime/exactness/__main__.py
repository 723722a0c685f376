"""Asks a model the same questions in every way that there is, and compares all logits.

Prints a line for each way: how many prompts, and how many gave other logits than an uncached run
that is split at the same boundaries. Exits with 1 where any did.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from memfs.config import Config
from memfs.runtime.model import model_store
from memfs.runtime.model.resident import load

from ... import tiny
from .harness import Outcome, Subject, run
from .listening import Nursery
from .prompts import LONGEST_QUESTION, LONGEST_TEXT, cases

MADE: dict[str, Callable[[Path, Path], Path]] = {"tiny-llama": tiny.llama, "tiny-qwen3": tiny.qwen3}
EPILOG = """\
examples:
  tools/exactness                                     the default model and two tiny ones
  tools/exactness --prompts 20 --dtype float32        a short run
  tools/exactness --model /models/Qwen3-0.6B          another model

tiny-llama and tiny-qwen3 are made with random weights and the default model's tokenizer.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        "tools/exactness",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="of each model (200)")
    parser.add_argument(
        "--model",
        default=",".join(["default", *MADE]),
        metavar="LIST",
        help="models, as memfs takes them, separated by commas (%(default)s)",
    )
    parser.add_argument("--dtype", default="float32,bfloat16", metavar="LIST", help="(%(default)s)")
    args = parser.parse_args()
    prompts, differing = 0, 0
    with tempfile.TemporaryDirectory(prefix="memfs-") as temporary:
        work = Path(temporary)
        os.environ["XDG_RUNTIME_DIR"] = temporary  # its daemons are not the user's
        nursery = Nursery(work)
        for model in args.model.split(","):
            directory = _directory(model, work)
            for dtype in args.dtype.split(","):
                began = time.monotonic()
                found = _asked(f"{model} {dtype}", directory, dtype, args.prompts, nursery, work)
                for outcome in found:
                    print(f"{model:12} {dtype:9} {_line(outcome)}", flush=True)
                prompts += args.prompts
                differing += sum(len(outcome.differing) for outcome in found)
                _progress(f"{model} {dtype}: {time.monotonic() - began:.0f} s\n")
        nursery.close()
    print(f"{prompts} prompts, {differing} times other logits")
    return 1 if differing else 0


def _directory(model: str, work: Path) -> Path:
    """Where a model is, fetched or made where it is not there."""
    if model not in MADE:
        return model_store.resolve(model, Config(), lambda step: _progress(step + "\n"))
    default = model_store.resolve("default", Config(), lambda step: _progress(step + "\n"))
    return MADE[model](work / model, default)


def _asked(
    name: str, directory: Path, dtype: str, count: int, nursery: Nursery, work: Path
) -> list[Outcome]:
    config = Config(str(directory), device="cpu", dtype=dtype, threads=Config.load().threads)
    resident = load(directory, config)
    rooms = {
        "text": min(LONGEST_TEXT, resident.context // 2),
        "question": min(LONGEST_QUESTION, resident.context // 4),
    }
    with tempfile.TemporaryDirectory(dir=work) as stores:
        return run(
            Subject(directory, config, resident, answer=8),
            cases(resident.prompt, count, **rooms),
            nursery,
            Path(stores),
            lambda done: _progress(f"\r{name}: {done} of {count} "),
        )


def _line(outcome: Outcome) -> str:
    said = f"{outcome.way:11} {outcome.asked:5} prompts, {len(outcome.differing)} differ"
    if outcome.worst is not None:
        said += f", by {outcome.worst:.1e} at most"
    return said + "".join(f"\n    {case}" for case in outcome.differing)


def _progress(text: str) -> None:
    """For who watches: on a terminal."""
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
