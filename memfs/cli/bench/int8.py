"""``memfs bench int8``: what int8 storage costs and saves, beside exact storage.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Facts, Say

EPILOG = """\
examples:
  memfs bench int8
  memfs bench int8 --dtype float32 --json
  memfs bench int8 --documents 2 --tokens 1024 --runs 3

The answers from the exact KV cache are the reference: at each of their steps, the token that the
model holds likeliest next and the KL divergence of its probabilities. "exact, other chunks" is what
the model's own rounding does to the same measures, with nothing stored at all.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        type=harness.number,
        default=8,
        metavar="N",
        help="invented ones, with five questions to each (8)",
    )
    parser.add_argument(
        "--tokens",
        type=harness.numbers,
        default=[1024, 4096],
        metavar="N,N",
        help="lengths of the memories that are mounted (1024,4096)",
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    from memfs.runtime.measure.int8 import compare, mount_seconds  # torch

    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    resident, answers = compare(directory, config, args.documents, say)
    return {
        "model": config.model,
        "dtype": resident.fingerprint["dtype"],
        "answers": answers,
        "mount": mount_seconds(resident, args.tokens, args.runs, say),
    }


def show(facts: Facts) -> None:
    print(f"answers in {facts['dtype']}, beside those from the exact KV cache:")
    harness.show_lines(facts["answers"])
    print("\nfrom the page cache into the model:")
    harness.show_lines(facts["mount"])
