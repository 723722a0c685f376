"""``memfs bench mount``: KV caches into the model from each tier, beside a plain copy.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Facts, Say

EPILOG = """\
examples:
  memfs bench mount --runs 15
  memfs bench mount --device cuda --tokens 4096
"""


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
    from memfs.runtime.measure.mounting import mount_rates  # torch

    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    lines = mount_rates(directory, config, args.tokens, args.runs, say)
    return {"model": config.model, "mount": lines}


def show(facts: Facts) -> None:
    # What is on the device is not moved, so it has no share.
    lines = [line | {"share_of_copy": line["share_of_copy"] or "-"} for line in facts["mount"]]
    harness.show_lines(lines)
