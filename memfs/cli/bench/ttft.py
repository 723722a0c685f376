"""``memfs bench ttft``: the time to first token with a memory as text, from its file, and resident.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Cube, Facts, Say
from memfs.runtime.client import RuntimeClient
from memfs.runtime.measure.spread import spread

EPILOG = """\
examples:
  memfs bench ttft
  memfs bench ttft --tokens 1024,4096 --runs 9 --json
"""

QUESTION = "What did the keeper write in the log that evening?"
"""22 tokens are computed for it: 11 of its own, 11 of the default model's template around it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=harness.numbers,
        default=[256, 1024, 2048, 4096, 7168],
        metavar="N,N",
        help="lengths of the memories (256,1024,2048,4096,7168)",
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    lines = []
    with harness.store() as store, harness.runtime(config) as client:
        for tokens in args.tokens:
            cube = store.cube(f"memory-{tokens}", harness.text_of(directory, tokens))
            say(f"{tokens} tokens: encoding")
            made = client.call("encode", **cube)
            lines.append(_arms(client, cube, made["tokens"], args.runs, say))
    return {"model": config.model, "ttft": lines}


def show(facts: Facts) -> None:
    harness.show_lines(facts["ttft"])


def _arms(client: RuntimeClient, cube: Cube, tokens: int, runs: int, say: Say) -> Facts:
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
    saved = [1 - f / t for f, t in zip(arms["file"][1:], arms["text"][1:], strict=True)]
    return {
        "tokens": tokens,
        "question_tokens": question_tokens,
        **{f"{arm}_s": spread(times[1:]) for arm, times in arms.items()},
        "less_from_file": spread(saved),
    }
