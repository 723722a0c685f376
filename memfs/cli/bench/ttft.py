"""``memfs bench ttft``: the time to first token with a memory as text, from its file, and resident.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memfs.cli import targets
from memfs.cli.bench import harness, memos
from memfs.cli.bench.harness import Cube, Facts, Say
from memfs.config import DEFAULT_MODEL, Config
from memfs.errors import InvalidRequest, Refused
from memfs.runtime.client import RuntimeClient
from memfs.runtime.measure import shapes
from memfs.runtime.measure.spread import spread

EPILOG = """\
examples:
  memfs bench ttft
  memfs bench ttft --tokens 1024,4096 --runs 9 --json > docs/results/ttft.json
  memfs bench ttft --grid                    the lengths MemOS publishes, beside what it publishes
  memfs bench ttft --grid --shape qwen3-8b   likewise on a model as large as theirs

build is the text made into its KV file, synced to disk; load that file from the page cache into the
model, checked; text, file and resident are from the request to the first token, the load included
where there is one; less_… how much less that is than with the text. --grid also shows what MemOS
publishes of it.

--shape makes a model of random weights in a temporary directory (TMPDIR): 16 GB for qwen3-8b, which
is meant for an accelerator. Times do not depend on what the weights are.
"""

QUESTION = "What did the keeper write in the log that evening?"
"""22 tokens are computed for it: 11 of its own, 11 of the default model's template around it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--tokens",
        type=harness.numbers,
        default=[256, 1024, 2048, 4096, 7168],
        metavar="N,N",
        help="lengths of the memories (256,1024,2048,4096,7168)",
    )
    lengths.add_argument(
        "--grid",
        action="store_true",
        help=f"memories of {_listed(memos.MEMORIES)} tokens, each with questions of"
        f" {_listed(memos.QUESTIONS)}",
    )
    parser.add_argument(
        "--shape", choices=shapes.SHAPES, help="a model of this shape with random weights"
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    with _model(args, say) as (config, directory):
        lines = []
        with harness.store() as store, harness.runtime(config) as client:
            status = client.call("status")
            for tokens in memos.MEMORIES if args.grid else args.tokens:
                cube = store.cube(f"memory-{tokens}", harness.text_of(directory, tokens))
                questions = _questions(directory) if args.grid else [QUESTION]
                lines += _lines(client, cube, questions, args.runs, say)
    if args.grid:
        for line, cuts in zip(lines, memos.CUTS.values(), strict=True):
            line["less_published"] = dict(zip(memos.MODELS, cuts, strict=True))
    return {
        "model": args.shape or config.model,
        "device": harness.device_name(status["device"]),
        **{name: status[name] for name in ("dtype", "token_bytes")},
        "threads": harness.threads(config),
        "ttft": lines,
    }


def show(facts: Facts) -> None:
    lines = [dict(line) for line in facts["ttft"]]
    for line in lines:
        published = line.pop("less_published", {})
        line |= {f"less, {name}": cut for name, cut in published.items()}
    harness.show_lines(lines)


@contextmanager
def _model(args: argparse.Namespace, say: Say) -> Iterator[tuple[Config, Path]]:
    """The configuration of the runtime, and its model's directory.

    Raises InvalidRequest for a shape and a model at once, ModelUnusable where it has no room.
    """
    config = harness.config_of(args)
    if args.shape is None:
        yield config, harness.model_directory(config, say)
        return
    if args.model is not None:
        raise InvalidRequest("--shape is a model; --model names another")
    tokenizer_from = harness.model_directory(dataclasses.replace(config, model=DEFAULT_MODEL), say)
    if args.dtype is None:
        config = dataclasses.replace(config, dtype="bfloat16")
    with tempfile.TemporaryDirectory(prefix="memfs-bench-") as name:
        say(f"making a model of the shape {args.shape}")
        directory = Path(name, args.shape)
        directory.mkdir()
        shapes.make(args.shape, directory, tokenizer_from, config)
        yield dataclasses.replace(config, model=str(directory)), directory


def _questions(directory: Path) -> list[str]:
    """Questions of the grid's lengths, not counting the template around them."""
    # A memory ends with one token more than its text has.
    return [harness.text_of(directory, tokens + 1, seed=1000) for tokens in memos.QUESTIONS]


def _lines(
    client: RuntimeClient, cube: Cube, questions: list[str], runs: int, say: Say
) -> list[Facts]:
    """What one memory costs, and each question with it."""
    name = cube["path"]
    made: Facts = {}

    def build() -> None:
        made.update(client.call("encode", force=True, **cube))

    def load() -> None:
        client.call("mount", **cube)

    def unload() -> None:
        client.call("unmount", **cube)
        harness.settle()

    say(f"{name}: encoding")
    build_s = _timed(build, runs, before=harness.settle)
    load()
    say(f"{name}: mounting")
    load_s = _timed(load, runs, before=unload)
    lines = []
    for question in questions:
        times, computed, way = _arms(client, cube, question, runs, say)
        line = {"tokens": made["tokens"], "question_tokens": computed, "way": way}
        line |= {"build_s": spread(build_s), "load_s": spread(load_s)}
        line |= {f"{arm}_s": spread(taken) for arm, taken in times.items()}
        for arm, column in (("file", "less_from_file"), ("resident", "less_resident")):
            pairs = zip(times[arm], times["text"], strict=True)
            line[column] = spread([1 - ours / text for ours, text in pairs])
        lines.append(line)
    return lines


def _timed(work: Callable[[], None], runs: int, before: Callable[[], None]) -> list[float]:
    """Seconds of each run; the first warms up and is not counted."""
    times = []
    for _ in range(runs + 1):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times[1:]


def _arms(
    client: RuntimeClient, cube: Cube, question: str, runs: int, say: Say
) -> tuple[dict[str, list[float]], int, str]:
    """Each run asks three times: with the text, with the KV file not yet in the model, resident.

    Gives the seconds to the first token of each, how many tokens are computed for the question, and
    whether the file was loaded: where prefilling is faster, the runtime does that.
    """
    arms: dict[str, list[float]] = {"text": [], "file": [], "resident": []}
    computed, way = 0, ""
    for number in range(runs + 1):  # the first warms up and is not counted
        say(f"{cube['path']}: run {number} of {runs}")
        for arm, times in arms.items():
            if arm == "file":
                client.call("unmount", **cube)
            harness.settle()
            report = client.call(
                "ask", cubes=[cube], question=question, kv=arm != "text", max_tokens=1
            )
            (used,) = report["cubes"]
            if arm != "text" and used["how"] != "kv":
                raise Refused(f"{cube['path']}: not answered from its KV cache: {used['why']}")
            if arm == "file":
                way = used["chose"]["way"]
            times.append(report["ttft_s"])
            computed = report["prompt_tokens"] - report["cached_tokens"]
    return {arm: times[1:] for arm, times in arms.items()}, computed, way


def _listed(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))
