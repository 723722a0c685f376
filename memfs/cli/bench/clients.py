"""``memfs bench clients``: tokens a second of several clients that ask at once.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Cube, Facts, Say
from memfs.config import Config
from memfs.runtime.client import connect
from memfs.runtime.measure.spread import spread

EPILOG = """\
examples:
  memfs bench clients
  memfs bench clients --clients 1,16,32 --tokens 256 --runs 9

Each client has a connection and a cube of its own, which is mounted. tokens_a_second counts the
tokens of all, from the first request to the last answer; times_one is that beside one client in the
same run; first_s is the time to first token of each.
"""

QUESTION = "Copy the log from its beginning, day by day and word by word."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clients",
        type=harness.numbers,
        default=[1, 2, 4, 8],
        metavar="N,N",
        help="that ask at once, the first to compare with (1,2,4,8)",
    )
    parser.add_argument(
        "--tokens", type=harness.number, default=512, metavar="N", help="of each memory (512)"
    )
    parser.add_argument(
        "--answer",
        type=harness.number,
        default=64,
        metavar="N",
        help="tokens of each answer, at most (64)",
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    rates: dict[int, list[float]] = defaultdict(list)
    firsts: dict[int, list[float]] = defaultdict(list)
    with harness.store() as store, harness.runtime(config) as client:
        cubes = []
        for number in range(max(args.clients)):
            say(f"memory {number + 1} of {max(args.clients)}")
            text = harness.text_of(directory, args.tokens, seed=100 * number)
            cubes.append(store.cube(f"memory-{number}", text))
            client.call("encode", **cubes[-1], mount=True)
        for run in range(args.runs + 1):  # the first warms up and is not counted
            for count in args.clients:
                say(f"run {run} of {args.runs}: {count} clients")
                rate, first = _at_once(config, cubes[:count], args.answer)
                if run:
                    rates[count].append(rate)
                    firsts[count] += first
    one = rates[args.clients[0]]
    lines = [
        {
            "clients": count,
            "tokens_a_second": spread(rates[count]),
            "times_one": spread([r / o for r, o in zip(rates[count], one, strict=True)]),
            "first_s": spread(firsts[count]),
        }
        for count in args.clients
    ]
    return {
        "model": config.model,
        "memory_tokens": args.tokens,
        "answer_tokens": args.answer,
        "threads": harness.threads(config),
        "clients": lines,
    }


def show(facts: Facts) -> None:
    harness.show_lines(facts["clients"])


def _at_once(config: Config, cubes: list[Cube], limit: int) -> tuple[float, list[float]]:
    """A question to each cube, all at once: tokens a second of all, each's time to first token."""

    def one(cube: Cube) -> Facts:
        with connect(config, start=False) as client:
            return client.call("ask", cubes=[cube], question=QUESTION, max_tokens=limit)

    with ThreadPoolExecutor(len(cubes)) as clients:
        began = time.perf_counter()
        reports = list(clients.map(one, cubes))
        seconds = time.perf_counter() - began
    tokens = sum(report["tokens"] for report in reports)
    return tokens / seconds, [report["ttft_s"] for report in reports]
