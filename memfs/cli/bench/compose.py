"""``memfs bench compose``: several cubes put together, beside the prefill of all their texts.

Used by ``bench``, in the main thread.
"""

from __future__ import annotations

import argparse

from memfs.cli import targets
from memfs.cli.bench import harness
from memfs.cli.bench.harness import Facts, Say
from memfs.errors import InvalidRequest
from memfs.runtime.asking.policy import Policy

EPILOG = """\
examples:
  memfs bench compose
  memfs bench compose --cubes 4 --policies rotate,link:16,blend:0.1
  memfs bench compose --questions 3 --runs 3 --json

Eight invented documents of some 330 tokens with ten questions each, taken 2, 4 and 8 at a time. kl
is the mean over the tokens of the full prefill's answers, in nats; share_of_rows what is computed,
in rows times layers, of what the full prefill computes. --runs is how often each set is put
together; it is asked once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cubes", type=harness.numbers, default=[2, 4, 8], metavar="N,N", help="at a time (2,4,8)"
    )
    parser.add_argument(
        "--policies",
        default="rotate,link:4,link:8,link:16,link:32,blend:0.05,blend:0.1,blend:0.15,blend:0.2",
        metavar="P,P",
        help="as compose in the configuration, to be compared (%(default)s)",
    )
    parser.add_argument(
        "--questions", type=harness.number, default=10, metavar="N", help="about each document (10)"
    )
    targets.add_model_arguments(parser)


def measure(args: argparse.Namespace, say: Say) -> Facts:
    from memfs.runtime.measure.composing import compositions  # torch

    policies = [Policy.parse(text) for text in args.policies.split(",")]
    if min(args.cubes) < 2:
        raise InvalidRequest("--cubes are 2 or more at a time")
    config = harness.config_of(args)
    directory = harness.model_directory(config, say)
    lines = compositions(directory, config, args.cubes, policies, args.questions, args.runs, say)
    return {"model": config.model, "compose": lines}


def show(facts: Facts) -> None:
    harness.show_lines(facts["compose"])
