"""``memfs bench``: measures memfs on this machine, its arms side by side in one run.

What is measured is a kind, and each kind a module of this folder, named in KINDS, which has
``EPILOG`` (its examples), ``add_arguments(parser)``, ``measure(args, say) -> facts`` and
``show(facts)``, which prints them for people. What kinds share is in ``harness``.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from typing import Any

from memfs.cli import output
from memfs.cli.bench import harness

HELP = "measure memfs on this machine"
EPILOG = """\
examples:
  memfs bench ttft
  memfs bench ttft --tokens 1024,4096 --runs 9 --json > docs/results/ttft.json
  memfs bench mount --device cuda
  memfs bench fs --help

Medians of paired runs, with their range. A bench uses a store of its own, and a runtime that it
starts and stops. What --json prints has the machine, the date and the command in it, and is what is
kept of a run; without it a table in Markdown is printed.
"""

KINDS = {
    "ttft": "time to first token: the text prefilled, its KV cache from the file, and resident",
    "mount": "KV caches from each tier into the model, beside a plain copy of their bytes",
    "choice": "whether mounting ever makes a question slower than its text does",
    "compose": "several cubes put together: how close to the prefill of all texts, at what cost",
    "decode": "the time of each token after the first, and that of transformers' own generate",
    "clients": "tokens a second of several clients that ask at once",
    "int8": "int8 storage beside exact: bytes, seconds to mount, how near the answers stay",
    "start": "until a mount can be used, and until the model can",
    "fs": "a mount beside the disk it lies on and beside a FUSE program in C",
}
"""Every kind, in the order the help shows, with its one line; each is ``memfs.cli.bench.<name>``.
Its module is light to import: torch and the model come when it measures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what is measured", metavar="WHAT", required=True)
    for name, line in KINDS.items():
        kind = _module(name)
        sub = kinds.add_parser(
            name,
            help=line,
            description=line[:1].upper() + line[1:] + ".",
            epilog=kind.EPILOG,
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        kind.add_arguments(sub)
        sub.add_argument(
            "--runs", type=harness.number, default=5, metavar="N", help="counted runs (5)"
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.set_defaults(what=name)


def run(args: argparse.Namespace) -> int:
    with output.Progress() as progress:
        measured = _module(args.what).measure(args, progress.update)
    command = shlex.join(["memfs", *(word for word in args.given if word != "--json")])
    ran = {"what": args.what, "command": command, "runs": args.runs}
    facts = {**harness.machine(), **ran, **measured}
    if args.json:
        output.print_json(facts)
        return 0
    show(facts)
    return 0


def show(facts: harness.Facts) -> None:
    """Prints what a run found, and where: from the run itself, or from its ``--json``."""
    print(harness.heading(facts))
    _module(facts["what"]).show(facts)


def _module(kind: str) -> Any:
    return importlib.import_module(f"{__name__}.{kind}")
