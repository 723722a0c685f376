"""``memfs bench choice``: whether mounting ever makes a question slower than its text does.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse
from collections import Counter

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Cube, Facts, Say
from memfs.runtime.client import RuntimeClient
from memfs.runtime.measure.spread import spread

EPILOG = """\
examples:
  memfs bench choice
  memfs bench choice --tokens 128,512 --questions 16,1024 --runs 9

mounting is the time to first token of a cube that has a KV cache and is not in the model: the
runtime loads that or prefills the text, whichever it takes to be faster, and way is what it did
most often. text is the same question without KV caches. share_of_text is one beside the other in
the same run: over 100% mounting was slower.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=harness.numbers,
        default=[128, 512, 2048, 7000],
        metavar="N,N",
        help="lengths of the memories (128,512,2048,7000)",
    )
    parser.add_argument(
        "--questions",
        type=harness.numbers,
        default=[16, 128, 1024],
        metavar="N,N",
        help="lengths of the questions (16,128,1024)",
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
            client.call("encode", **cube)
            for length in args.questions:
                question = harness.text_of(directory, length + 1, seed=1000)
                say(f"{tokens} tokens, {length} of the question")
                lines.append(_line(client, cube, question, args.runs))
        rates = client.call("status")["rates"]
    return {
        "model": config.model,
        "threads": harness.threads(config),
        "rates": rates,
        "choice": lines,
    }


def show(facts: Facts) -> None:
    harness.show_lines(facts["choice"])


def _line(client: RuntimeClient, cube: Cube, question: str, runs: int) -> Facts:
    ways: Counter[str] = Counter()
    times: dict[bool, list[float]] = {True: [], False: []}
    report: Facts = {}
    for run in range(runs + 1):  # the first warms up and is not counted
        # In turns, so that neither arm always follows the other.
        for kv in (True, False) if run % 2 else (False, True):
            if kv and ways:
                client.call("unmount", **cube)
            harness.settle()
            report = client.call("ask", cubes=[cube], question=question, kv=kv, max_tokens=1)
            times[kv].append(report["ttft_s"])
            if kv:
                ways[report["cubes"][0]["chose"]["way"]] += 1
    client.call("unmount", **cube)
    mounting, text = times[True][1:], times[False][1:]
    memory = report["cubes"][0]["tokens"]
    return {
        "tokens": memory,
        "question_tokens": report["prompt_tokens"] - memory,
        "way": ways.most_common(1)[0][0],
        "mounting_s": spread(mounting),
        "text_s": spread(text),
        "share_of_text": spread([m / t for m, t in zip(mounting, text, strict=True)]),
    }
