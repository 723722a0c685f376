"""``memfs bench decode``: the time of each token after the first, with a memory mounted.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Facts, Say

EPILOG = """\
examples:
  memfs bench decode
  memfs bench decode --tokens 1024,4096 --runs 9

mounted has the memory from its KV file, prompt the same text as a prompt to the same engine,
generate to transformers' own generate on the same weights, with its default cache and sdpa.
share_prompt and share_generate are mounted's time beside each in the same run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=harness.numbers,
        default=[4096],
        metavar="N,N",
        help="lengths of the memory (4096)",
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    from memfs.runtime.measure.decoding import token_times  # torch

    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    lines = token_times(directory, config, args.tokens, args.runs, say)
    return {"model": config.model, "threads": harness.threads(config), "decode": lines}


def show(facts: Facts) -> None:
    harness.show_lines(facts["decode"])
